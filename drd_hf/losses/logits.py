"""Pixel-wise distillation of class probabilities."""

import torch.nn.functional as F
from torch import Tensor

from drd_hf.errors import UserError
from drd_hf.losses.base import DistillationLoss, checked_weights, in_float32, require_equal_classes


@in_float32
def pixel_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Mean over pixels of ``KL(softmax(teacher / T) || softmax(student / T)) * T^2``.

    Args:
        student: (B, K, h, w) logits; receives the gradient.
        teacher: (B, K, h_t, w_t) logits; resized to the student's grid (bilinear) where sizes differ.
        temperature: T > 0.
        mask: (B, h, w) bool, the pixels that count; None: all. No pixel gives 0.
    """
    require_equal_classes(student, teacher)
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
    log_s = F.log_softmax(student / temperature, dim=1)
    log_t = F.log_softmax(teacher / temperature, dim=1)
    divergence = (log_t.exp() * (log_t - log_s)).sum(dim=1)  # (B, h, w)
    if mask is None:
        return divergence.mean() * temperature**2
    return (divergence * mask).sum() / mask.sum().clamp_min(1) * temperature**2


class PixelLogitLoss(DistillationLoss):
    """Pixel-wise knowledge distillation, `pixel_kl` on the student's own grid (default T 1 and weight 1 as in CIRKD).

    Args:
        weight: weight of the term ``logit``.
        temperature: T > 0.
    """

    needs_logits = True

    def __init__(self, weight: float = 1.0, temperature: float = 1.0):
        super().__init__()
        if not temperature > 0:
            raise UserError(f"logit temperature {temperature} must be greater than 0")
        self.weights = checked_weights({"logit": weight})
        self.temperature = temperature

    def forward(
        self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None
    ) -> dict[str, Tensor]:
        return {"logit": pixel_kl(student_logits, teacher_logits, self.temperature)}
