"""Channel-wise distillation."""

import torch.nn.functional as F
from torch import Tensor

from drd_hf.losses.base import (
    DistillationLoss,
    FeatureLoss,
    checked_temperature,
    checked_weights,
    in_float32,
    on_grid_of,
    require_equal_classes,
    require_equal_widths,
)


@in_float32
def channel_kl(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """KL divergence of what every channel makes of the positions, a softmax over them; mean over channels and batch, times T^2.

    Args:
        student: (B, C, H, W) features or logits; receives the gradient.
        teacher: (B, C, H_t, W_t); resized to the student's grid.
        temperature: T > 0.
    """
    require_equal_widths(student, teacher)
    teacher = on_grid_of(student, teacher)
    log_s, log_t = (F.log_softmax(f.flatten(2) / temperature, dim=2) for f in (student, teacher))
    return (log_t.exp() * (log_t - log_s)).sum(2).mean() * temperature**2


class CWDLoss(FeatureLoss):
    """Channel-wise distillation of features, `channel_kl`.

    Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021. T 4 and weight 50 as in CIRKD's code,
    which divides by the student's width where it projects; here the mean is over the channels that are compared.
    """

    needs_equal_widths = True

    def __init__(self, layers, weight: float = 50.0, temperature: float = 4.0, **widths):
        super().__init__(layers, {"cwd": weight}, **widths)
        self.temperature = checked_temperature(temperature)

    def compare(self, index, student, teacher, labels):
        return {"cwd": channel_kl(student, teacher, self.temperature)}


class CWDLogitLoss(DistillationLoss):
    """Channel-wise distillation of class scores, `channel_kl`; T 4 and weight 3 as in CIRKD's code."""

    needs_logits = True

    def __init__(self, weight: float = 3.0, temperature: float = 4.0):
        super().__init__()
        self.weights = checked_weights({"cwd_logits": weight})
        self.temperature = checked_temperature(temperature)

    def forward(self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None):
        require_equal_classes(student_logits, teacher_logits)
        return {"cwd_logits": channel_kl(student_logits, teacher_logits, self.temperature)}
