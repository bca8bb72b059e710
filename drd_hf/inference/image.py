"""Predictions for images in memory."""

import numpy as np
import torch
from PIL import Image
from transformers import PreTrainedModel

from drd_hf.errors import UserError
from drd_hf.features import input_channels
from drd_hf.inference.windows import blended_blocks, class_ids, window_grid
from drd_hf.models import bands_of


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
    that no seam shows where two meet. An image whose sides are no multiples of 32 is continued by its reflection, on the
    right and below, and the last window of a row or column is shifted inward to end there: no window is stretched, or
    lies between the pixels of a network's coarsest features. (Give a `tile` that is a multiple of 32 for that.)

    Args:
        model: a semantic segmentation model; used on the device it is on, and left in eval mode.
        processor: its image processor, of which only the normalisation is used: nothing is resized or cropped.
        image: uint8 array (H, W, C) with the C bands that the model reads, in its order; for a model of three bands also
            a PIL image, which is read as RGB.
        tile: side of the windows in pixels; an image smaller than that is one window.
        overlap: share of a window that the next one covers again, 0 <= overlap < 1.
        batch_size: windows per forward pass.
        return_probabilities: also give the blended probabilities.

    Returns:
        uint8 (H, W) class ids; with `return_probabilities` also float32 (K, H, W), which add up to 1 over K. These take
        4 * K bytes per pixel; without them what is in memory grows with the width of the image alone.

    Raises:
        UserError: the image is not uint8 with the bands of the model, `tile` and `overlap` leave no step, or the
            model answers with NaN or infinity.
    """
    bands = input_channels(model)
    if isinstance(image, Image.Image):
        if bands != 3:
            raise UserError(f"{_reads(model)}, which a PIL image cannot hold: pass a uint8 array (H, W, {bands})")
        image = image.convert("RGB")
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[2] != bands or image.dtype != np.uint8:
        raise UserError(f"{_reads(model)}: pass a uint8 array (H, W, {bands}), not {image.dtype} {image.shape}")
    if not image.size:
        raise UserError(f"an image of {image.shape[0]} x {image.shape[1]} pixels has nothing to predict")
    grid = window_grid(*image.shape[:2], tile, overlap)
    classes = torch.empty(image.shape[:2], dtype=torch.uint8, device=model.device)
    probabilities = torch.empty(model.config.num_labels, *image.shape[:2]) if return_probabilities else None

    def read(row: int, pixels: np.ndarray) -> None:
        pixels[:] = image[row : row + len(pixels)]

    for row, column, block, _ in blended_blocks(model, processor, read, grid, batch_size):
        place = (slice(row, row + block.shape[1]), slice(column, column + block.shape[2]))
        classes[place] = class_ids(block)
        if probabilities is not None:
            probabilities[(slice(None), *place)] = block.cpu()
    classes = classes.cpu().numpy()
    return classes if probabilities is None else (classes, probabilities.numpy())


def _reads(model: PreTrainedModel) -> str:
    names, number = bands_of(model.config), input_channels(model)
    return f"the model reads {number} bands" + (f" ({', '.join(names)})" if names else "")
