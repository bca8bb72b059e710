"""Intra-class feature variation distillation."""

import torch
import torch.nn.functional as F
from torch import Tensor

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError
from drd_hf.losses.base import FeatureLoss, in_float32, on_grid_of, unit


@in_float32
def intra_class_distance(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Mean squared difference, over the labelled positions, of the cosine of each position to the mean of its class.

    The mean is taken over the positions of one image that have the class. Public code divides by all positions,
    ignored ones included; here only labelled ones count, and without any the distance is 0.

    Args:
        student: (B, C_s, H, W); receives the gradient, through the means too.
        teacher: (B, C_t, H_t, W_t); resized to the student's grid.
        labels: (B, h, w) integers, 255 where ignored; the nearest one is taken for each position.
    """
    teacher = on_grid_of(student, teacher)
    labels = F.interpolate(labels[:, None].float(), student.shape[-2:], mode="nearest").long().flatten(1)  # (B, N)
    of_student, of_teacher = (_cosines_to_class_means(f, labels) for f in (student, teacher))
    labelled = labels != IGNORE_INDEX
    return ((of_student - of_teacher).square() * labelled).sum() / labelled.sum().clamp_min(1)


def _cosines_to_class_means(features: Tensor, labels: Tensor) -> Tensor:
    batch, channels = features.shape[:2]
    rows = features.flatten(2).mT.reshape(-1, channels)  # (B N, C)
    # Every image has 256 bins, so that no number of classes is needed. The bin of a position is never empty.
    bins = (labels + 256 * torch.arange(batch, device=labels.device)[:, None]).flatten()
    sums = rows.new_zeros(256 * batch, channels).index_add(0, bins, rows)
    counts = torch.bincount(bins, minlength=256 * batch).to(rows.dtype)
    means = sums[bins] / counts[bins][:, None]
    return (unit(rows, 1) * unit(means, 1)).sum(1).unflatten(0, (batch, -1))  # (B, N)


class IFVDLoss(FeatureLoss):
    """Intra-class feature variation distillation, `intra_class_distance`; only labelled pixels teach.

    Wang et al., "Intra-class Feature Variation Distillation for Semantic Segmentation", ECCV 2020. Weight 20 as in CIRKD's
    code (200 in the authors').
    """

    def __init__(self, layers, weight: float = 20.0, **widths):
        super().__init__(layers, {"ifvd": weight}, **widths)

    def compare(self, index, student, teacher, labels):
        if labels is None:
            raise UserError("ifvd compares the pixels of each class and needs labels: choose another loss")
        return {"ifvd": intra_class_distance(student, teacher, labels)}
