"""What every distillation loss has in common."""

from abc import ABC, abstractmethod

from torch import Tensor, nn


class DistillationLoss(nn.Module, ABC):
    """A loss between student and teacher, as named raw terms and their weights.

    A subclass sets
        weights: {term: weight}; the trainer adds `weight * term` to the task loss and logs both.
        student_layers, teacher_layers: names of the layers whose feature maps it reads (may be empty).
        needs_logits: True if it compares class scores, so that both models must have the same labels.
    and implements `forward`. Trainable parts (projectors) are made in `prepare`.
    """

    weights: dict[str, float]
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    needs_logits: bool = False

    def prepare(  # noqa: B027 (most losses have no trainable parts)
        self, student_widths: dict[str, int], teacher_widths: dict[str, int]
    ) -> None:
        """Called once before training with the channels of each layer, {layer: C}. The default needs nothing."""

    @abstractmethod
    def forward(
        self,
        student_features: dict[str, Tensor],
        teacher_features: dict[str, Tensor],
        student_logits: Tensor | None = None,
        teacher_logits: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Raw terms, {term: scalar}.

        Args:
            student_features, teacher_features: {layer: (B, C, H, W)}.
            student_logits, teacher_logits: (B, classes, h, w), of any two sizes.
            labels: (B, H, W) int64, 255 where ignored.
        """
