"""Predictions for images of any size, by overlapping windows."""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import PreTrainedModel

from drd_hf.data.tiles import tile_origins
from drd_hf.data.transforms import normalization_of, normalize
from drd_hf.errors import UserError


def predict_image(
    model: PreTrainedModel,
    processor,
    image,
    tile: int = 512,
    overlap: float = 0.25,
    batch_size: int = 4,
    return_probabilities: bool = False,
) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
    """Class ids of an image of any size at its native resolution.

    Windows of `tile` pixels overlap by the share `overlap`; their class probabilities are blended with a Hann window, so
    that no seam shows where two meet. The last window of a row or column is shifted inward: no border is padded.

    Args:
        model: a semantic segmentation model; used on the device it is on, and left in eval mode.
        processor: its image processor, of which only the normalisation is used: nothing is resized or cropped.
        image: PIL image, or uint8 array (H, W, 3).
        tile: side of the windows in pixels; an image smaller than that is one window.
        overlap: share of a window that the next one covers again, 0 <= overlap < 1.
        batch_size: windows per forward pass.
        return_probabilities: also give the blended probabilities.

    Returns:
        uint8 (H, W) class ids; with `return_probabilities` also float32 (K, H, W), which add up to 1 over K. Memory is
        4 * K bytes per pixel.

    Raises:
        UserError: the image is not RGB uint8, or `tile` and `overlap` leave no step.
    """
    image = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise UserError(f"image must be RGB uint8 (H, W, 3), got {image.dtype} {image.shape}")
    if not 0 <= overlap < 1 or tile < 1:
        raise UserError(f"tile={tile}, overlap={overlap}: give a tile of at least 1 pixel and 0 <= overlap < 1")
    height, width = image.shape[:2]
    window = (min(tile, height), min(tile, width))
    stride = max(1, round(tile * (1 - overlap)))
    corners = [
        (row, column)
        for row in tile_origins(height, window[0], min(stride, window[0]))
        for column in tile_origins(width, window[1], min(stride, window[1]))
    ]
    device = next(model.parameters()).device
    weight = torch.outer(_hann(window[0]), _hann(window[1])).to(device)  # (h, w)
    total = torch.zeros(model.config.num_labels, height, width, device=device)
    weights = torch.zeros(height, width, device=device)
    model.eval()
    with torch.inference_mode():
        for start in range(0, len(corners), batch_size):
            batch = corners[start : start + batch_size]
            windows = [image[row : row + window[0], column : column + window[1]] for row, column in batch]
            pixels = torch.from_numpy(np.stack(windows)).to(device).permute(0, 3, 1, 2)  # (B, 3, h, w) uint8
            pixel_values = normalize(pixels, *normalization_of(processor))
            logits = model(pixel_values=pixel_values.to(next(model.parameters()).dtype)).logits
            logits = F.interpolate(logits.float(), size=window, mode="bilinear", align_corners=False)
            for (row, column), probabilities in zip(batch, logits.softmax(dim=1), strict=True):
                place = (slice(row, row + window[0]), slice(column, column + window[1]))
                total[(slice(None), *place)] += probabilities * weight
                weights[place] += weight
    total /= weights
    classes = total.argmax(dim=0).to(torch.uint8).cpu().numpy()
    return (classes, total.cpu().numpy()) if return_probabilities else classes


def _hann(length: int) -> torch.Tensor:
    """Hann window without its zero ends: every pixel keeps some weight."""
    return torch.sin((torch.arange(length) + 0.5) / length * torch.pi).square()
