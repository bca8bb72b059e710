"""Augmentation-free dense contrastive distillation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from drd_hf.errors import UserError
from drd_hf.losses.base import in_float32, on_grid_of, require_equal_widths
from drd_hf.losses.mgd import MaskedFeatureLoss, summed_square_distance

GROUPS = 16  # of channels, as in public code


@in_float32
def omni_contrast(
    student: Tensor, teacher: Tensor, groups: int = GROUPS, pool: int = 4, patch: int = 4, temperature: float = 0.07
) -> Tensor:
    """Contrast of groups of channels within small patches; sum over the groups, mean over positions and batch.

    Both maps are max-pooled and cut into patches; each position's channels are cut into groups. A vector of the student
    is to be nearer (negative L1 distance, divided by T, cross-entropy) to the teacher's of the same position and group than
    to those of other groups anywhere in the patch.

    Where public code needs sizes that divide, here: pooling cells at the border may be smaller; rows and columns that
    fill no patch are left out; a side shorter than a patch is one patch; there are gcd(C, `groups`) groups.

    Args:
        student: (B, C, H, W); receives the gradient.
        teacher: (B, C, H_t, W_t); resized to the student's grid.
    """
    require_equal_widths(student, teacher)
    maps = student, on_grid_of(student, teacher)
    student, teacher = (F.max_pool2d(f, pool, ceil_mode=True) for f in maps)
    groups = math.gcd(student.shape[1], groups)
    s, t = _patches(student, groups, patch), _patches(teacher, groups, patch)  # (patches, places * groups, C / groups)
    similarities = -torch.cdist(s, t, p=1) / temperature
    group = torch.arange(s.shape[1], device=s.device) % groups
    same_place = torch.eye(len(group), dtype=torch.bool, device=s.device)
    left_out = (group[:, None] == group) & ~same_place
    positives = similarities.diagonal(dim1=1, dim2=2)
    terms = similarities.masked_fill(left_out, -math.inf).logsumexp(2) - positives
    return terms.sum() * groups / terms.numel()


def _patches(features: Tensor, groups: int, patch: int) -> Tensor:
    height, width = (min(patch, length) for length in features.shape[-2:])
    rows, columns = features.shape[2] // height, features.shape[3] // width
    cut = features[:, :, : rows * height, : columns * width]
    # (B, groups, C / groups, rows, height, columns, width)
    cut = cut.unflatten(1, (groups, -1)).unflatten(4, (columns, width)).unflatten(3, (rows, height))
    return cut.permute(0, 3, 5, 4, 6, 1, 2).reshape(len(cut) * rows * columns, height * width * groups, -1)


class AfDCDLoss(MaskedFeatureLoss):
    """Features generated from masked ones, `summed_square_distance` and `omni_contrast`.

    Fan et al., "Augmentation-free Dense Contrastive Knowledge Distillation for Efficient Semantic Segmentation", NeurIPS 2023.
    Weights 2e-6 and 5e-3 as in the authors' command for Cityscapes, other settings as in their code. They add `PixelLogitLoss` at
    weight 1, and their projector has two branches there; here it is the plain one of their code.
    """

    def __init__(
        self, layers, masked_weight: float = 2e-6, contrast_weight: float = 5e-3, masked_share: float = 0.75, **widths
    ):
        weights = {"afdcd_masked": masked_weight, "afdcd_contrast": contrast_weight}
        super().__init__(layers, weights, masked_share, **widths)

    def compare(self, index, student, teacher, labels):
        if math.gcd(teacher.shape[1], GROUPS) == 1:  # one group has nothing to be contrasted with
            raise UserError(
                f"afdcd: {self.teacher_layers[index]} has {teacher.shape[1]} channels, an odd number that cannot be cut "
                "into groups; give other layers by feature_layers, or another method"
            )
        generated = self.generated(index, student)
        return {
            "afdcd_masked": summed_square_distance(generated, teacher),
            "afdcd_contrast": omni_contrast(generated, teacher),
        }
