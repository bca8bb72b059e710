"""Cross-image relational knowledge distillation, the mini-batch term."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drd_hf.losses.base import FeatureLoss, checked_temperature, in_float32, on_grid_of, unit

# The similarities of this many bytes are formed at a time; more are formed again in the backward pass.
BLOCK_BYTES = 64 * 2**20


@in_float32
def cross_image_kl(
    student: Tensor, teacher: Tensor, temperature: float = 0.1, max_positions: int | None = 56**2
) -> Tensor:
    """Mean over all pairs of images, and over the positions of the first, of KL(teacher || student).

    For images i and j the cosines of each position of i with all positions of j, divided by T, go through a softmax over
    the positions of j.

    Args:
        student: (B, C_s, H, W); receives the gradient.
        teacher: (B, C_t, H_t, W_t); resized to the student's grid.
        temperature: T > 0.
        max_positions: a larger grid is average-pooled by the smallest whole number that leaves no more than these; None
            pools nothing. Public code pools by 2, or not at all. Operations grow with the square of batch times positions.
    """
    teacher = on_grid_of(student, teacher)
    if (side := _pooling(student.shape[-2:], max_positions)) > 1:
        student, teacher = (F.avg_pool2d(f, side, ceil_mode=True) for f in (student, teacher))
    s, t = unit(student.flatten(2), 1), unit(teacher.flatten(2), 1)  # (B, C, N)
    batch, _, positions = s.shape
    row_bytes = s.element_size() * batch * positions
    rows = max(1, min(positions, BLOCK_BYTES // row_bytes))
    all_fit = batch * positions * row_bytes <= BLOCK_BYTES
    total = 0.0
    for image in range(batch):
        for start in range(0, positions, rows):
            block = s[image, :, start : start + rows], s, t[image, :, start : start + rows], t, temperature
            if all_fit:
                total = total + _rows_kl(*block)
            else:
                total = total + checkpoint(_rows_kl, *block, use_reentrant=False, preserve_rng_state=False)
    return total / (batch**2 * positions)


def _pooling(grid: tuple[int, int], limit: int | None) -> int:
    side = 1
    while limit is not None and math.prod(math.ceil(length / side) for length in grid) > limit:
        side += 1
    return side


def _rows_kl(rows_s: Tensor, s: Tensor, rows_t: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Sum of the divergences of some positions of an image, (C, R), to those of all images, (B, C, N)."""
    with torch.autocast(s.device.type, enabled=False):
        log_s = F.log_softmax(rows_s.mT @ s / temperature, dim=2)  # (B, R, N)
        log_t = F.log_softmax(rows_t.mT @ t / temperature, dim=2)
        return (log_t.exp() * (log_t - log_s)).sum()


class CIRKDLoss(FeatureLoss):
    """Cross-image relations within the mini-batch, `cross_image_kl`.

    Yang et al., "Cross-Image Relational Knowledge Distillation for Semantic Segmentation", CVPR 2022. T 0.1 and weight 1 as
    in the authors' code. The memory-bank terms of the paper are left out; in several processes each compares its own images.
    """

    def __init__(
        self, layers, weight: float = 1.0, temperature: float = 0.1, max_positions: int | None = 56**2, **widths
    ):
        super().__init__(layers, {"cirkd": weight}, **widths)
        self.temperature = checked_temperature(temperature)
        self.max_positions = max_positions

    def compare(self, index, student, teacher, labels):
        return {"cirkd": cross_image_kl(student, teacher, self.temperature, self.max_positions)}
