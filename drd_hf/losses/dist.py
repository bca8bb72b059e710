"""DIST: correlations instead of divergences of class probabilities."""

from torch import Tensor

from drd_hf.losses.base import DistillationLoss, checked_weights, in_float32, on_grid_of, require_equal_classes, unit


@in_float32
def correlation_distances(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """1 - Pearson correlation of class probabilities: (over classes, mean over pixels; over pixels, mean over classes).

    Where one side is constant there is no correlation: it counts as 0, without a gradient. Public code adds 1e-8 to the
    denominator instead.

    Args:
        student: (B, K, h, w) logits; receives the gradient.
        teacher: (B, K, h_t, w_t) logits; resized to the student's grid.
    """
    require_equal_classes(student, teacher)
    scores = student, on_grid_of(student, teacher)
    s, t = (z.softmax(1).transpose(0, 1).flatten(1) for z in scores)  # (K, B N)
    return _one_minus_correlation(s, t, 0), _one_minus_correlation(s, t, 1)


def _one_minus_correlation(s: Tensor, t: Tensor, dim: int) -> Tensor:
    s, t = (unit(p - p.mean(dim, keepdim=True), dim, of=p) for p in (s, t))
    return 1 - (s * t).sum(dim).mean()


class DISTLoss(DistillationLoss):
    """Correlations of class probabilities, `correlation_distances`.

    Huang et al., "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022. Weights 1 and 1 as in the authors' code for
    segmentation.
    """

    needs_logits = True

    def __init__(self, inter_weight: float = 1.0, intra_weight: float = 1.0):
        super().__init__()
        self.weights = checked_weights({"dist_inter": inter_weight, "dist_intra": intra_weight})

    def forward(self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None):
        inter, intra = correlation_distances(student_logits, teacher_logits)
        return {"dist_inter": inter, "dist_intra": intra}
