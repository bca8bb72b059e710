"""Distillation losses: objects that are passed to the trainer."""

from .base import DistillationLoss
from .dual_relation import DualRelationLoss
from .logits import PixelLogitLoss, pixel_kl

__all__ = ["DistillationLoss", "DualRelationLoss", "PixelLogitLoss", "pixel_kl"]
