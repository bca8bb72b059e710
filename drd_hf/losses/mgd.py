"""Masked generative distillation."""

import torch
from torch import Tensor, nn

from drd_hf.errors import UserError
from drd_hf.losses.base import FeatureLoss, add_projectors, in_float32, on_grid_of, require_equal_widths


def generator(channels: int) -> nn.Sequential:
    """Makes the teacher's features of masked ones: two 3x3 convolutions with a ReLU between them."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )


def random_mask(features: Tensor, masked_share: float) -> Tensor:
    """(B, 1, H, W), 0 at a random share of the positions and 1 elsewhere."""
    batch, _, height, width = features.shape
    drawn = torch.rand(batch, 1, height, width, device=features.device)
    return (drawn <= 1 - masked_share).to(features.dtype)


@in_float32
def summed_square_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Sum of squared differences, mean over the batch alone.

    Args:
        student: (B, C, H, W); receives the gradient.
        teacher: (B, C, H_t, W_t); resized to the student's grid.
    """
    require_equal_widths(student, teacher)
    return (student - on_grid_of(student, teacher)).square().sum() / len(student)


class MaskedFeatureLoss(FeatureLoss):
    """Features that are generated from the student's masked ones; a subclass compares them with the teacher's.

    For each pair of layers a generator of two 3x3 convolutions at the teacher's width trains with the student, beside the
    projector. Both are dropped afterwards.
    """

    needs_equal_widths = True

    def __init__(self, layers, weights: dict[str, float], masked_share: float, **widths):
        if not 0 <= masked_share < 1:
            raise UserError(f"masked_share={masked_share} must be at least 0 and below 1")
        super().__init__(layers, weights)
        self.masked_share = masked_share
        self.generators = nn.ModuleDict()
        if widths:
            self.prepare(**widths)

    def prepare(self, student_widths, teacher_widths):
        add_projectors(self.projectors, self.layers, student_widths, teacher_widths, bias=True)
        for index, (_, teacher_layer) in enumerate(self.layers):
            if str(index) not in self.generators:
                self.generators[str(index)] = generator(teacher_widths[teacher_layer])

    def generated(self, index: int, student: Tensor) -> Tensor:
        if str(index) not in self.generators:
            raise UserError(f"{type(self).__name__} needs student_widths and teacher_widths without a trainer")
        module = self.generators[str(index)]
        student = student.to(module[0].weight.dtype)
        return module(student * random_mask(student, self.masked_share))


class MGDLoss(MaskedFeatureLoss):
    """Masked generative distillation, `summed_square_distance` of the generated features.

    Yang et al., "Masked Generative Distillation", ECCV 2022. Share 0.75 of masked positions and weight 2e-5 as in the
    authors' code for segmentation. The term is a sum over channels and positions, and grows with both.
    """

    def __init__(self, layers, weight: float = 2e-5, masked_share: float = 0.75, **widths):
        super().__init__(layers, {"mgd": weight}, masked_share, **widths)

    def compare(self, index, student, teacher, labels):
        return {"mgd": summed_square_distance(self.generated(index, student), teacher)}
