"""Dual Relation Distillation."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from drd_hf.errors import UserError
from drd_hf.losses.base import DistillationLoss, add_projectors, layer_pairs
from drd_hf.relations import (
    RELATIONS,
    channel_alignment_distance,
    channel_relation_distance,
    resize_to,
    spatial_alignment_distance,
    spatial_relation_distance,
)


class DualRelationLoss(DistillationLoss):
    """Distances between the spatial and the channel relations of student and teacher (arXiv 2506.20688).

    For each pair of layers ``spatial_relation_distance(student, teacher)`` and
    ``channel_relation_distance(student, teacher, projection=projector)``, averaged over the pairs. Spatial relations never
    need equal widths. The projector, a 1x1 convolution to the teacher's width, exists only for a pair whose widths differ
    and only if the channel weight is not 0; it trains with the student and is dropped afterwards.

    Args:
        layers: pairs (student layer, teacher layer), dotted module names; a third element is the pair's weight in the average,
            1 unless given.
        spatial_weight, channel_weight: weights of the two terms; a term of weight 0 is not computed.
        relation: ``"cosine"`` or ``"attention"``, see `drd_hf.relations`.
        temperature: T of the attention relation.
        resize_relations_to: side of the square grid with as many positions as relations are compared on at most. A larger
            map of the student is shrunk in proportion (bilinear, antialiased), a smaller one stays; the teacher's follows
            the student's. None compares on the student's own grid, whatever its size. Cost grows with the positions.
        teacher_term: False leaves the constant of the teacher out of the spatial term where that saves work, see
            `spatial_relation_distance`: same gradients, but the logged value is no distance.
        student_widths, teacher_widths: {layer: channels}; the trainer finds them itself, give them to use the loss
            without a trainer.

    Shape:
        features {layer: (B, C, H, W)} -> {"spatial_relation": scalar, "channel_relation": scalar}

    Example:
        >>> import torch
        >>> loss = DualRelationLoss([("s", "t")], student_widths={"s": 8}, teacher_widths={"t": 16})
        >>> terms = loss({"s": torch.randn(2, 8, 32, 32)}, {"t": torch.randn(2, 16, 32, 32)})
        >>> sorted(terms)
        ['channel_relation', 'spatial_relation']
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, str] | tuple[str, str, float]],
        spatial_weight: float = 3.0,
        channel_weight: float = 3.0,
        relation: str = "cosine",
        temperature: float = 1.0,
        resize_relations_to: int | None = 56,
        teacher_term: bool = True,
        student_widths: dict[str, int] | None = None,
        teacher_widths: dict[str, int] | None = None,
    ):
        super().__init__()
        self.layers, self.layer_weights = layer_pairs(layers, "DualRelationLoss")
        if relation not in RELATIONS:
            raise UserError(f"relation={relation!r} is not known, choose one of {', '.join(RELATIONS)}")
        if not temperature > 0:
            raise UserError(f"temperature={temperature} must be greater than 0")
        self.student_layers = tuple(s for s, _ in self.layers)
        self.teacher_layers = tuple(t for _, t in self.layers)
        self.weights = relation_weights(spatial_relation=spatial_weight, channel_relation=channel_weight)
        self.relation = relation
        self.temperature = temperature
        self.resize_relations_to = _checked_limit(resize_relations_to)
        self.teacher_term = teacher_term
        self.projectors = nn.ModuleDict()
        if student_widths is not None and teacher_widths is not None:
            self.prepare(student_widths, teacher_widths)

    def prepare(self, student_widths: dict[str, int], teacher_widths: dict[str, int]) -> None:
        if "channel_relation" in self.weights:
            add_projectors(self.projectors, self.layers, student_widths, teacher_widths)

    def forward(
        self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None
    ) -> dict[str, Tensor]:
        terms = dict.fromkeys(self.weights, 0.0)
        for index, ((student_layer, teacher_layer), share) in enumerate(
            zip(self.layers, self.layer_weights, strict=True)
        ):
            student = student_features[student_layer]
            grid = grid_within(*student.shape[-2:], self.resize_relations_to)
            student, teacher = resize_to(student, grid), resize_to(teacher_features[teacher_layer].detach(), grid)
            if "spatial_relation" in terms:
                distance = spatial_relation_distance(
                    student, teacher, self.relation, self.temperature, teacher_term=self.teacher_term
                )
                terms["spatial_relation"] = terms["spatial_relation"] + share * distance
            if "channel_relation" in terms:
                weight = self.projectors[str(index)].weight[:, :, 0, 0] if str(index) in self.projectors else None
                distance = channel_relation_distance(
                    student, teacher, self.relation, self.temperature, projection=weight
                )
                terms["channel_relation"] = terms["channel_relation"] + share * distance
        return terms


class AlignedRelationLoss(DistillationLoss):
    """Dual Relation Distillation by alignment: relations are compared by cosines, over all images of a batch.

    `drd_hf.relations.spatial_alignment_distance` of the positions and `channel_alignment_distance` of the channels. Against
    `DualRelationLoss`, the plain form, features are centred in each image, positions of different images are related too,
    relations count the more the more the features vary there, and channels are related to those of the teacher instead of to each
    other. Both distances are one minus a cosine, whatever the scale of the features. The form is this project's own.

    A projector to the teacher's width exists for the pairs in `layers` whose widths differ, unless the channel weight is 0; it
    trains with the student and is dropped afterwards. Related are the images of one forward pass: not those of other GPUs, nor of other
    batches that are accumulated.

    Args:
        layers: pairs whose positions and channels are compared, as in `DualRelationLoss`.
        spatial_layers: more pairs whose positions alone are compared. In the mean they have as much weight in all as `layers`.
        spatial_weight, channel_weight: weights of the two terms, each a mean over its pairs; a term of weight 0 is not computed.
        resize_relations_to, student_widths, teacher_widths: as in `DualRelationLoss`.

    Shape:
        features {layer: (B, C, H, W)} -> {"spatial_alignment": scalar, "channel_alignment": scalar}

    Example:
        >>> import torch
        >>> loss = AlignedRelationLoss([("s", "t")], student_widths={"s": 8}, teacher_widths={"t": 16})
        >>> terms = loss({"s": torch.randn(2, 8, 32, 32)}, {"t": torch.randn(2, 16, 32, 32)})
        >>> sorted(terms)
        ['channel_alignment', 'spatial_alignment']
    """

    def __init__(
        self,
        layers: Sequence[tuple[str, str] | tuple[str, str, float]],
        spatial_layers: Sequence[tuple[str, str] | tuple[str, str, float]] = (),
        spatial_weight: float = 2.0,
        channel_weight: float = 10.0,
        resize_relations_to: int | None = 56,
        student_widths: dict[str, int] | None = None,
        teacher_widths: dict[str, int] | None = None,
    ):
        super().__init__()
        self.layers, self.layer_weights = layer_pairs(layers, "AlignedRelationLoss")
        more, shares = layer_pairs(spatial_layers, "AlignedRelationLoss") if spatial_layers else ([], [])
        half = 0.5 if more else 1.0
        self.pairs = [  # (pair, share in the spatial term, share in the channel term)
            *((pair, half * share, share) for pair, share in zip(self.layers, self.layer_weights, strict=True)),
            *((pair, half * share, 0.0) for pair, share in zip(more, shares, strict=True)),
        ]
        self.weights = relation_weights(spatial_alignment=spatial_weight, channel_alignment=channel_weight)
        if "spatial_alignment" not in self.weights:
            self.pairs = self.pairs[: len(self.layers)]
        self.student_layers = tuple(s for (s, _), *_ in self.pairs)
        self.teacher_layers = tuple(t for (_, t), *_ in self.pairs)
        self.resize_relations_to = _checked_limit(resize_relations_to)
        self.projectors = nn.ModuleDict()
        if student_widths is not None and teacher_widths is not None:
            self.prepare(student_widths, teacher_widths)

    def prepare(self, student_widths: dict[str, int], teacher_widths: dict[str, int]) -> None:
        if "channel_alignment" in self.weights:
            add_projectors(self.projectors, self.layers, student_widths, teacher_widths)

    def forward(
        self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None
    ) -> dict[str, Tensor]:
        terms = dict.fromkeys(self.weights, 0.0)
        for index, ((student_layer, teacher_layer), spatial, channel) in enumerate(self.pairs):
            student = student_features[student_layer]
            grid = grid_within(*student.shape[-2:], self.resize_relations_to)
            student, teacher = resize_to(student, grid), resize_to(teacher_features[teacher_layer].detach(), grid)
            if "spatial_alignment" in terms:
                distance = spatial_alignment_distance(student, teacher)
                terms["spatial_alignment"] = terms["spatial_alignment"] + spatial * distance
            if "channel_alignment" in terms and channel:
                weight = self.projectors[str(index)].weight[:, :, 0, 0] if str(index) in self.projectors else None
                distance = channel_alignment_distance(student, teacher, projection=weight)
                terms["channel_alignment"] = terms["channel_alignment"] + channel * distance
        return terms


def relation_weights(**weights: float) -> dict[str, float]:
    """Those of a spatial and a channel term that are not 0."""
    for weight in weights.values():
        if not 0 <= weight < math.inf:
            raise UserError(f"relation weight {weight} must be a number, 0 or above")
    if not any(weights.values()):
        raise UserError("both relation weights are 0, nothing would be distilled: give one above 0")
    return {term: weight for term, weight in weights.items() if weight != 0}


def grid_within(height: int, width: int, limit: int | None) -> tuple[int, int]:
    """(height, width) shrunk in proportion to at most `limit` squared positions; unchanged without a limit."""
    if limit is None or height * width <= limit**2:
        return height, width
    scale = limit / math.sqrt(height * width)
    height = min(max(1, round(height * scale)), limit**2)
    return height, max(1, min(round(width * scale), limit**2 // height))


def _checked_limit(limit: int | None) -> int | None:
    if limit is not None and limit < 1:
        raise UserError(f"resize_relations_to={limit} must be at least 1, or None for no limit")
    return limit
