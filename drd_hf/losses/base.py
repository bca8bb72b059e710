"""What distillation losses have in common."""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from drd_hf.errors import UserError
from drd_hf.relations import resize_to
from drd_hf.relations.precision import ZERO_SQUARED, compute_dtype


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


class FeatureLoss(DistillationLoss):
    """Terms of feature maps, averaged over one or more pairs of layers; a subclass says in `compare` what they are.

    Args:
        layers: pairs (student layer, teacher layer), dotted module names; a third element is the pair's weight in the average,
            1 unless given.
        weights: {term: weight}.
        student_widths, teacher_widths: {layer: channels}; the trainer finds them itself, give them to use the loss
            without a trainer.
    """

    # Whether maps of different widths cannot be compared. The student's is then projected to the teacher's width by a 1x1
    # convolution, which trains with the student and is dropped afterwards.
    needs_equal_widths = False

    def __init__(
        self,
        layers: Sequence[tuple[str, str] | tuple[str, str, float]],
        weights: dict[str, float],
        student_widths: dict[str, int] | None = None,
        teacher_widths: dict[str, int] | None = None,
    ):
        super().__init__()
        self.layers, self.layer_weights = layer_pairs(layers, type(self).__name__)
        self.student_layers = tuple(s for s, _ in self.layers)
        self.teacher_layers = tuple(t for _, t in self.layers)
        self.weights = checked_weights(weights)
        self.projectors = nn.ModuleDict()
        if student_widths is not None and teacher_widths is not None:
            self.prepare(student_widths, teacher_widths)

    def prepare(self, student_widths: dict[str, int], teacher_widths: dict[str, int]) -> None:
        if self.needs_equal_widths:
            add_projectors(self.projectors, self.layers, student_widths, teacher_widths)

    @abstractmethod
    def compare(self, index: int, student: Tensor, teacher: Tensor, labels: Tensor | None) -> dict[str, Tensor]:
        """Terms of pair number `index`, {term: scalar}, computed without autocast.

        Args:
            student: (B, C, H, W), projected where there is a projector.
            teacher: (B, C_t, H_t, W_t), as the teacher gives it.
            labels: (B, h, w) int64, 255 where ignored.
        """

    def forward(
        self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None
    ) -> dict[str, Tensor]:
        terms = dict.fromkeys(self.weights, 0.0)
        for index, ((student_layer, teacher_layer), share) in enumerate(
            zip(self.layers, self.layer_weights, strict=True)
        ):
            student, teacher = student_features[student_layer], teacher_features[teacher_layer].detach()
            with torch.autocast(student.device.type, enabled=False):
                if str(index) in self.projectors:
                    projector = self.projectors[str(index)]
                    student = projector(student.to(projector.weight.dtype))
                compared = self.compare(index, student, teacher, labels)
            for name, value in compared.items():
                terms[name] = terms[name] + share * value
        return terms


def layer_pairs(layers, loss: str) -> tuple[list[tuple[str, str]], list[float]]:
    """(student layer, teacher layer) pairs and their shares in the average, which add up to 1.

    Raises:
        UserError: no pair, something that is no pair, or a weight that is not between 0 and a million.
    """
    if not layers:
        raise UserError(f"{loss} needs at least one (student layer, teacher layer) pair")
    for pair in layers:
        if not 2 <= len(pair) <= 3 or not all(isinstance(weight, (int, float)) for weight in pair[2:]):
            raise UserError(
                f"layer pair {pair}: give (student layer, teacher layer) or (student layer, teacher layer, weight)"
            )
        if not all(0 < weight < 1e6 for weight in pair[2:]):
            raise UserError(
                f"layer pair {pair[0]}={pair[1]} has weight {float(pair[2])}, give one above 0 and below 1e6"
            )
    weights = [float(weight[0]) if weight else 1.0 for _, _, *weight in layers]
    return [(str(s), str(t)) for s, t, *_ in layers], [weight / sum(weights) for weight in weights]


def checked_weights(weights: dict[str, float]) -> dict[str, float]:
    for term, weight in weights.items():
        if not 0 < weight < math.inf:
            raise UserError(f"{term} weight {weight} must be a number above 0")
    return {term: float(weight) for term, weight in weights.items()}


def checked_temperature(temperature: float) -> float:
    if not 0 < temperature < math.inf:
        raise UserError(f"temperature={temperature} must be a number greater than 0")
    return float(temperature)


def add_projectors(projectors: nn.ModuleDict, layers, student_widths, teacher_widths, bias: bool = False) -> None:
    """A 1x1 convolution to the teacher's width for each pair of layers whose widths differ, under its index."""
    for index, (student_layer, teacher_layer) in enumerate(layers):
        c_s, c_t = student_widths[student_layer], teacher_widths[teacher_layer]
        if c_s != c_t and str(index) not in projectors:
            projectors[str(index)] = nn.Conv2d(c_s, c_t, kernel_size=1, bias=bias)


def in_float32(function):
    """Makes a function of (student, teacher, ...) compute in float32, or in float64 if both are: without autocast.

    Half precision overflows in squares and in Gram matrices. No gradient flows to the teacher.
    """

    @functools.wraps(function)
    def computed(student: Tensor, teacher: Tensor, *args, **kwargs):
        dtype = compute_dtype(student, teacher)
        with torch.autocast(student.device.type, enabled=False):
            return function(student.to(dtype), teacher.detach().to(dtype), *args, **kwargs)

    return computed


def unit(vectors: Tensor, dim: int, of: Tensor | None = None) -> Tensor:
    """Vectors along `dim` scaled to length 1. A zero vector has no direction: it stays zero, and so is its gradient.

    `of` are the vectors, of some length along `dim`, that these are differences of: where no more is left than their
    rounding, it counts as zero.
    """
    squares = vectors.square().sum(dim, keepdim=True)
    is_zero = squares < ZERO_SQUARED
    if of is not None:
        is_zero |= squares < (16 * torch.finfo(of.dtype).eps) ** 2 * of.detach().square().sum(dim, keepdim=True)
    return vectors * squares.masked_fill(is_zero, 1.0).rsqrt().masked_fill(is_zero, 0.0)


def on_grid_of(student: Tensor, teacher: Tensor) -> Tensor:
    """The teacher's map on the student's grid: bilinear, antialiased where it shrinks."""
    return resize_to(teacher, student.shape[-2:])


def require_equal_widths(student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise UserError(
            f"feature maps of {student.shape[1]} and {teacher.shape[1]} channels cannot be compared: project the student's to "
            "the teacher's width first (losses do it where they know student_widths and teacher_widths)"
        )


def require_equal_classes(student: Tensor, teacher: Tensor) -> None:
    if student.shape[1] != teacher.shape[1]:
        raise UserError(f"logits of {student.shape[1]} and {teacher.shape[1]} classes cannot be compared")
