"""Relations of predictions: the aligned form of Dual Relation Distillation for maps of class probabilities."""

from torch import Tensor

from drd_hf.losses.base import DistillationLoss, in_float32, on_grid_of, require_equal_classes
from drd_hf.losses.dual_relation import relation_weights
from drd_hf.relations import channel_alignment_distance, spatial_alignment_distance


@in_float32
def class_alignment_distances(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """How far the relations of two models' class probabilities agree, (between positions, between classes).

    `drd_hf.relations.spatial_alignment_distance` and `channel_alignment_distance` of the probabilities, with the positions of
    the batch taken as those of one image: each class less its mean over the batch, so that how much of it an image has counts
    too. Every class weighs the same in the second one, however rare it is: one minus its correlation with the teacher's, which
    is the intra-class term of DIST (Huang et al., NeurIPS 2022). In the first a class counts the more the more it varies.

    Args:
        student: (B, K, h, w) logits; receives the gradient.
        teacher: (B, K, h_t, w_t) logits; resized to the student's grid.

    Returns:
        Two scalars, float32 (float64 where both are float64), as of the two distances.

    Raises:
        UserError: the two have different numbers of classes.
    """
    require_equal_classes(student, teacher)
    scores = student, on_grid_of(student, teacher)
    s, t = (z.softmax(1).transpose(0, 1).flatten(1, 2)[None] for z in scores)  # (1, K, B h, w)
    return spatial_alignment_distance(s, t), channel_alignment_distance(s, t)


class ClassRelationLoss(DistillationLoss):
    """Relations of class probabilities, `class_alignment_distances`.

    Args:
        spatial_weight, channel_weight: weights of the terms ``spatial_class_alignment`` and ``channel_class_alignment``;
            a term of weight 0 is left out.

    Shape:
        logits (B, K, h, w), of any two sizes -> {"spatial_class_alignment": scalar, "channel_class_alignment": scalar}
    """

    needs_logits = True

    def __init__(self, spatial_weight: float = 2.0, channel_weight: float = 6.0):
        super().__init__()
        self.weights = relation_weights(spatial_class_alignment=spatial_weight, channel_class_alignment=channel_weight)

    def forward(self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None):
        names = "spatial_class_alignment", "channel_class_alignment"
        terms = zip(names, class_alignment_distances(student_logits, teacher_logits), strict=True)
        return {name: value for name, value in terms if name in self.weights}
