"""Inter-channel correlation knowledge distillation."""

from torch import Tensor

from drd_hf.losses.base import FeatureLoss, in_float32, require_equal_widths, unit


@in_float32
def channel_correlation_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum over an image's channel maps of squared differences, divided by C; mean over the batch.

    A channel map is the Gram matrix of the channels, C x C, its rows scaled to length 1. It has the same size on any grid, so
    that nothing is resized.

    Args:
        student: (B, C, H, W); receives the gradient.
        teacher: (B, C, H_t, W_t).
    """
    require_equal_widths(student, teacher)
    maps = [unit(f.flatten(2) @ f.flatten(2).mT, 2) for f in (student, teacher)]
    return (maps[0] - maps[1]).square().sum() / (student.shape[0] * student.shape[1])


class ICKDLoss(FeatureLoss):
    """Correlations between channels, `channel_correlation_distance`.

    Liu et al., "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation", ICCV 2021. Weight 2.5 as
    for the authors' code. Other public code divides by the batch size once more: there a weight pulls B times less.
    """

    needs_equal_widths = True

    def __init__(self, layers, weight: float = 2.5, **widths):
        super().__init__(layers, {"ickd": weight}, **widths)

    def compare(self, index, student, teacher, labels):
        return {"ickd": channel_correlation_distance(student, teacher)}
