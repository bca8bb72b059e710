"""Structured knowledge distillation: pairwise similarities of regions."""

import torch.nn.functional as F
from torch import Tensor

from drd_hf.losses.base import FeatureLoss, in_float32, on_grid_of
from drd_hf.relations import spatial_relation_distance


@in_float32
def pairwise_distance(student: Tensor, teacher: Tensor, pool: int = 2) -> Tensor:
    """Mean squared difference of the cosine maps between the regions that a max-pooling leaves.

    Computed by `drd_hf.relations.spatial_relation_distance`, which forms no N x N map where that costs more.

    Args:
        student: (B, C_s, H, W); receives the gradient.
        teacher: (B, C_t, H_t, W_t); resized to the student's grid.
        pool: side of a region; the last row and column of regions may be smaller, as in public code (`ceil_mode`).
    """
    teacher = on_grid_of(student, teacher)
    student, teacher = (F.max_pool2d(f, pool, ceil_mode=True) for f in (student, teacher))
    return spatial_relation_distance(student, teacher)


class SKDLoss(FeatureLoss):
    """Pair-wise term of structured knowledge distillation, `pairwise_distance`.

    Liu et al., "Structured Knowledge Distillation for Semantic Segmentation", CVPR 2019. Max-pooling of 2 and weight 10 as
    in CIRKD's code. The adversarial term of the paper is left out; its pixel-wise term is `PixelLogitLoss`.
    """

    def __init__(self, layers, weight: float = 10.0, pool: int = 2, **widths):
        super().__init__(layers, {"skd": weight}, **widths)
        self.pool = pool

    def compare(self, index, student, teacher, labels):
        return {"skd": pairwise_distance(student, teacher, self.pool)}
