"""Similarity-preserving knowledge distillation."""

from torch import Tensor

from drd_hf.losses.base import FeatureLoss, in_float32, unit


@in_float32
def batch_similarity_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the B x B Gram matrices of the images of a batch, their rows scaled to length 1.

    Of a batch of one image it is 0. Widths and sizes may differ, nothing is resized.

    Args:
        student: (B, C_s, H, W); receives the gradient.
        teacher: (B, C_t, H_t, W_t).
    """
    maps = [unit(f.flatten(1) @ f.flatten(1).mT, 1) for f in (student, teacher)]
    return (maps[0] - maps[1]).square().mean()


class SPLoss(FeatureLoss):
    """Similarities between the images of a batch, `batch_similarity_distance`.

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019. Weight 3000 as in RepDistiller's code. In
    several processes each compares its own images.
    """

    def __init__(self, layers, weight: float = 3000.0, **widths):
        super().__init__(layers, {"sp": weight}, **widths)

    def compare(self, index, student, teacher, labels):
        return {"sp": batch_similarity_distance(student, teacher)}
