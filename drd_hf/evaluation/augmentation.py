"""Test-time augmentation: the mean answer of a model for a window seen mirrored, turned and scaled."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from transformers.modeling_outputs import SemanticSegmenterOutput

from drd_hf.errors import UserError, nearest

AUGMENTATIONS = ("flips", "quarter_turns", "scales")
SCALES = (0.75, 1.0, 1.25)


class AugmentedModel:
    """A model that answers with the mean of its class probabilities over several views of the images.

    It stands in for the model in `predict_image` and wherever else one is called with `pixel_values`; each window is
    augmented by itself, so memory does not grow with the image. The views are all combinations of

    - flips: as it is, mirrored left to right, top to bottom, and both;
    - quarter turns: by 0, 90, 180 and 270 degrees; with flips the 8 symmetries of the square, each once;
    - scales: resampled by each factor (bilinear, averaged where it shrinks).

    Answers are turned back exactly and resized to the image before the softmax.

    Args:
        model: a semantic segmentation model.
        augmentations: any of `AUGMENTATIONS`.
        scales: factors for `scales`.

    Raises:
        UserError: an unknown augmentation, none, or a factor outside 0.1 to 10.
    """

    def __init__(self, model, augmentations: Iterable[str], scales: Iterable[float] = SCALES):
        augmentations, scales = list(augmentations), list(scales)
        for name in augmentations:
            if name not in AUGMENTATIONS:
                raise UserError(f"unknown test-time augmentation {name!r}; nearest: {nearest(name, AUGMENTATIONS)}")
        if not augmentations or not scales or not all(0.1 <= scale <= 10 for scale in scales):
            raise UserError(
                f"test-time augmentation {augmentations} with the scales {scales}: give one of "
                f"{', '.join(AUGMENTATIONS)}, and scales from 0.1 to 10"
            )
        self.model, self.config = model, model.config
        self.scales = scales if "scales" in augmentations else [1.0]
        flips, turns = "flips" in augmentations, "quarter_turns" in augmentations
        # (quarter turns, mirrored left to right before); top to bottom is mirrored and turned twice.
        self.views = [
            (turn, flip)
            for turn in (range(4) if turns else (0, 2) if flips else (0,))
            for flip in ((False, True) if flips else (False,))
        ]
        parts = ["flips"] * flips + ["quarter turns"] * turns
        if "scales" in augmentations:
            parts.append(f"scales {' '.join(f'{scale:g}' for scale in self.scales)}")
        self.description = f"test-time augmentation: {', '.join(parts)} ({len(self.views) * len(self.scales)} views)"

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def to(self, device) -> "AugmentedModel":
        self.model.to(device)
        return self

    def eval(self) -> "AugmentedModel":
        self.model.eval()
        return self

    def __call__(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        """Logarithms (B, K, H, W) of the mean probabilities for images (B, C, H, W): their softmax is the mean."""
        size = pixel_values.shape[-2:]
        total = torch.zeros((), device=pixel_values.device)
        for scale in self.scales:
            images = _scaled(pixel_values, scale)
            for turn, flip in self.views:
                view = (images.flip(-1) if flip else images).rot90(turn, (-2, -1))
                logits = self.model(pixel_values=view).logits.float().rot90(-turn, (-2, -1))
                logits = logits.flip(-1) if flip else logits
                logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
                total = total + logits.softmax(dim=1)
        mean = total / (len(self.views) * len(self.scales))
        return SemanticSegmenterOutput(logits=mean.clamp_min(torch.finfo(mean.dtype).tiny).log())


def _scaled(images: torch.Tensor, scale: float) -> torch.Tensor:
    if scale == 1:
        return images
    size = [max(1, round(length * scale)) for length in images.shape[-2:]]
    scaled = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return scaled.to(images.dtype)
