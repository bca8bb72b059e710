"""Attention transfer."""

from torch import Tensor

from drd_hf.losses.base import FeatureLoss, in_float32, on_grid_of, unit


def attention_map(features: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, N): the mean over channels of the squares at each position, as a vector of length 1."""
    return unit(features.square().mean(1).flatten(1), 1)


@in_float32
def attention_transfer_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the attention maps.

    Args:
        student: (B, C_s, H, W); receives the gradient.
        teacher: (B, C_t, H_t, W_t); resized to the student's grid.
    """
    return (attention_map(student) - attention_map(on_grid_of(student, teacher))).square().mean()


class ATLoss(FeatureLoss):
    """Attention transfer, `attention_transfer_distance`.

    Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017. Weight 10000 as in CIRKD's code.
    """

    def __init__(self, layers, weight: float = 10000.0, **widths):
        super().__init__(layers, {"at": weight}, **widths)

    def compare(self, index, student, teacher, labels):
        return {"at": attention_transfer_distance(student, teacher)}
