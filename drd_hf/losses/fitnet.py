"""FitNets: the teacher's features as hints."""

from torch import Tensor

from drd_hf.losses.base import FeatureLoss, in_float32, on_grid_of, require_equal_widths


@in_float32
def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the features.

    Args:
        student: (B, C, H, W); receives the gradient.
        teacher: (B, C, H_t, W_t); resized to the student's grid.
    """
    require_equal_widths(student, teacher)
    return (student - on_grid_of(student, teacher)).square().mean()


class FitNetLoss(FeatureLoss):
    """Hints of the teacher's features, `feature_distance`.

    Romero et al., "FitNets: Hints for Thin Deep Nets", ICLR 2015. Weight 10 as in CIRKD's code, which projects maps of equal
    widths too.
    """

    needs_equal_widths = True

    def __init__(self, layers, weight: float = 10.0, **widths):
        super().__init__(layers, {"fitnet": weight}, **widths)

    def compare(self, index, student, teacher, labels):
        return {"fitnet": feature_distance(student, teacher)}
