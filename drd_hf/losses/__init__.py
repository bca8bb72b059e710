"""Distillation losses: objects that are passed to the trainer."""

from drd_hf.losses.base import DistillationLoss
from drd_hf.losses.dual_relation import DualRelationLoss
from drd_hf.losses.logits import PixelLogitLoss, pixel_kl

__all__ = ["DistillationLoss", "DualRelationLoss", "PixelLogitLoss", "pixel_kl"]
