"""Cross-image relational knowledge distillation, the mini-batch term."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from drd_hf.losses.base import FeatureLoss, checked_temperature, in_float32, on_grid_of, unit
from drd_hf.relations.precision import full_precision

# The similarities of two images that fit in this many bytes are formed whole, larger ones in blocks of rows.
BLOCK_BYTES = 64 * 2**20
# exp((cosine - 1) / T) is at least exp(-2 / T), which must stay a normal float32 number: no row needs its own maximum.
MAX_EXPONENT = 60


@in_float32
def cross_image_kl(
    student: Tensor, teacher: Tensor, temperature: float = 0.1, max_positions: int | None = 56**2
) -> Tensor:
    """Mean over all pairs of images, and over the positions of the first, of KL(teacher || student).

    For images i and j the cosines of each position of i with all positions of j, divided by T, go through a softmax over
    the positions of j. Those of j with i are the same numbers, transposed: both are compared, and differentiated, in one
    pass, which leaves a third of the multiplications of the plain form. The gradient cannot be differentiated again.

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
    with full_precision(s.device.type):
        if positions**2 * s.element_size() <= BLOCK_BYTES and 2 / temperature <= MAX_EXPONENT:
            total = _PairsKL.apply(s, t, temperature)
        else:
            total = _blocks_kl(s, t, temperature)
    return total / (batch**2 * positions)


def _pooling(grid: tuple[int, int], limit: int | None) -> int:
    side = 1
    while limit is not None and math.prod(math.ceil(length / side) for length in grid) > limit:
        side += 1
    return side


class _PairsKL(torch.autograd.Function):
    """Sum of the divergences of unit vectors s (B, C_s, N) and t (B, C_t, N), every two images once."""

    @staticmethod
    def forward(ctx, s, t, temperature):
        total, grad = _pairs_kl(s, t, temperature, need_grad=ctx.needs_input_grad[0])
        ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (grad,) = ctx.saved_tensors
        return grad * slope, None, None


def _pairs_kl(s: Tensor, t: Tensor, temperature: float, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    batch, _, n = s.shape
    p, q, scratch = (s.new_empty(n, n) for _ in range(3))
    grad = torch.zeros_like(s) if need_grad else None
    total = s.new_zeros(())
    for i in range(batch):
        for j in range(i, batch):
            torch.mm(s[i].mT, s[j], out=p)
            torch.mm(t[i].mT, t[j], out=q)
            difference = torch.sub(q, p, out=scratch)
            for similarities in (p, q):  # to softmax numerators, of rows and of columns
                similarities.sub_(1).div_(temperature).exp_()
            difference.mul_(q)
            # Rows are i's divergences to j, columns j's to i; an image's own map is symmetric and counts once.
            slopes = []
            for dim in (1, 0) if i != j else (1,):
                sum_p, sum_q = p.sum(dim, keepdim=True), q.sum(dim, keepdim=True)
                divergence = difference.sum(dim, keepdim=True) / (sum_q * temperature) + sum_p.log() - sum_q.log()
                total = total + divergence.sum()
                slopes.append((1 / sum_p, 1 / sum_q))
            if not need_grad:
                continue
            # d KL / d cosine is (softmax of p - softmax of q) / T; here that of ij and, transposed, that of ji.
            if i == j:
                slopes.append([one.mT for one in slopes[0]])
            (p_rows, q_rows), (p_columns, q_columns) = slopes
            p.mul_(torch.add(p_rows, p_columns, out=scratch))
            p.sub_(q.mul_(torch.add(q_rows, q_columns, out=scratch)))
            grad[i].addmm_(s[j], p.mT)
            if i != j:
                grad[j].addmm_(s[i], p)
    return total, grad.div_(temperature) if need_grad else None


def _blocks_kl(s: Tensor, t: Tensor, temperature: float) -> Tensor:
    """The same in blocks of rows, whose similarities are formed again in the backward pass."""
    batch, _, positions = s.shape
    rows = max(1, min(positions, BLOCK_BYTES // (s.element_size() * batch * positions)))
    total = 0.0
    for image in range(batch):
        for start in range(0, positions, rows):
            block = s[image, :, start : start + rows], s, t[image, :, start : start + rows], t, temperature
            total = total + checkpoint(_rows_kl, *block, use_reentrant=False, preserve_rng_state=False)
    return total


def _rows_kl(rows_s: Tensor, s: Tensor, rows_t: Tensor, t: Tensor, temperature: float) -> Tensor:
    """Sum of the divergences of some positions of an image, (C, R), to those of all images, (B, C, N)."""
    with full_precision(s.device.type):  # in the backward pass too
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
