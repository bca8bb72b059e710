"""Distillation losses: objects that are passed to the trainer, or named by `DistillationConfig.method`.

Each is a pure function of student and teacher, and a class over it that knows its layers, weight and projectors. `docs/losses.md` has
a table of what each transfers, costs and needs.

A projector, a 1x1 convolution to the teacher's width, exists only where a definition needs equal widths and they differ. The
teacher's map is resized to the student's grid (bilinear, antialiased where it shrinks; `pixel_kl` without antialiasing). All compute in
float32 without autocast, in float64 where both inputs are, and give the teacher no gradient. Only `IFVDLoss` reads labels: tiles
without any teach by all others. A vector of length zero has no direction: it stays zero, and its gradient is zero.
"""

from drd_hf.losses.afdcd import AfDCDLoss, omni_contrast
from drd_hf.losses.attention_transfer import ATLoss, attention_transfer_distance
from drd_hf.losses.base import DistillationLoss, FeatureLoss
from drd_hf.losses.cirkd import CIRKDLoss, cross_image_kl
from drd_hf.losses.class_relation import ClassRelationLoss, class_alignment_distances
from drd_hf.losses.cwd import CWDLogitLoss, CWDLoss, channel_kl
from drd_hf.losses.dist import DISTLoss, correlation_distances
from drd_hf.losses.dsd import DSDLoss, category_similarity_distance, pixel_similarity_distance
from drd_hf.losses.dual_relation import AlignedRelationLoss, DualRelationLoss
from drd_hf.losses.fitnet import FitNetLoss, feature_distance
from drd_hf.losses.ickd import ICKDLoss, channel_correlation_distance
from drd_hf.losses.ifvd import IFVDLoss, intra_class_distance
from drd_hf.losses.logits import PixelLogitLoss, pixel_kl
from drd_hf.losses.mgd import MGDLoss, summed_square_distance
from drd_hf.losses.skd import SKDLoss, pairwise_distance
from drd_hf.losses.sp import SPLoss, batch_similarity_distance

__all__ = [
    "ATLoss",
    "AfDCDLoss",
    "AlignedRelationLoss",
    "CIRKDLoss",
    "CWDLogitLoss",
    "CWDLoss",
    "ClassRelationLoss",
    "DISTLoss",
    "DSDLoss",
    "DistillationLoss",
    "DualRelationLoss",
    "FeatureLoss",
    "FitNetLoss",
    "ICKDLoss",
    "IFVDLoss",
    "MGDLoss",
    "PixelLogitLoss",
    "SKDLoss",
    "SPLoss",
    "attention_transfer_distance",
    "batch_similarity_distance",
    "category_similarity_distance",
    "channel_correlation_distance",
    "channel_kl",
    "class_alignment_distances",
    "correlation_distances",
    "cross_image_kl",
    "feature_distance",
    "intra_class_distance",
    "omni_contrast",
    "pairwise_distance",
    "pixel_kl",
    "pixel_similarity_distance",
    "summed_square_distance",
]
