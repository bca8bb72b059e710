"""Double similarity distillation: where attention changes between layers, and how categories resemble each other."""

from collections.abc import Sequence
from itertools import combinations

import torch.nn.functional as F
from torch import Tensor

from drd_hf.losses.attention_transfer import attention_map
from drd_hf.losses.base import (
    DistillationLoss,
    checked_weights,
    in_float32,
    layer_pairs,
    on_grid_of,
    require_equal_classes,
    unit,
)
from drd_hf.relations import resize_to


def pixel_similarity_distance(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean squared difference of the residual attentions, over all pairs of taps.

    Each tap becomes its `attention_map`; the residual of two taps is their difference, scaled to length 1. The taps of a
    model must share a grid for that: all are resized to that of the student's tap before its last.

    Args:
        student: taps [(B, C_i, H_i, W_i), ...], two or more in the order of the forward pass; receive the gradient.
        teacher: as many taps, of any widths and sizes.
    """
    grid = student[-2].shape[-2:]

    @in_float32
    def attentions(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        return attention_map(resize_to(s, grid)), attention_map(resize_to(t, grid))

    maps = [attentions(s, t) for s, t in zip(student, teacher, strict=True)]
    distances = []
    for (first_s, first_t), (second_s, second_t) in combinations(maps, 2):
        residual_s = unit(second_s - first_s, 1, of=first_s)
        residual_t = unit(second_t - first_t, 1, of=first_t)
        distances.append((residual_s - residual_t).square().mean())
    return sum(distances) / len(distances)


@in_float32
def category_similarity_distance(student: Tensor, teacher: Tensor, temperature: float = 4.0) -> Tensor:
    """Mean squared difference of P P^T, P being the class scores average-pooled by 2 as a softmax over the positions.

    Args:
        student: (B, K, h, w) logits; receives the gradient.
        teacher: (B, K, h_t, w_t) logits; resized to the student's grid.
        temperature: T > 0 of the softmax.
    """
    require_equal_classes(student, teacher)
    scores = student, on_grid_of(student, teacher)
    maps = [(F.avg_pool2d(z, 2, ceil_mode=True).flatten(2) / temperature).softmax(2) for z in scores]
    return (maps[0] @ maps[0].mT - maps[1] @ maps[1].mT).square().mean()


class DSDLoss(DistillationLoss):
    """Double similarity distillation: `pixel_similarity_distance` of the layers and the class scores, and
    `category_similarity_distance` of the class scores.

    Feng et al., "Double Similarity Distillation for Semantic Image Segmentation", TIP 2021. Weights 1000 and 10 as in CIRKD's
    code, which takes the scores of an auxiliary head as its first tap; here it is a layer, for the models of transformers need not
    have such a head.

    Args:
        layers: pairs (student layer, teacher layer) in the order of the forward pass; a weight of a pair has no meaning here.
        pixel_weight, category_weight: weights of the two terms.
    """

    needs_logits = True

    def __init__(self, layers, pixel_weight: float = 1000.0, category_weight: float = 10.0):
        super().__init__()
        pairs, _ = layer_pairs(layers, "DSDLoss")
        self.student_layers, self.teacher_layers = (tuple(names) for names in zip(*pairs, strict=True))
        self.weights = checked_weights({"psd": pixel_weight, "csd": category_weight})

    def forward(self, student_features, teacher_features, student_logits=None, teacher_logits=None, labels=None):
        student = [*(student_features[layer] for layer in self.student_layers), student_logits]
        teacher = [*(teacher_features[layer] for layer in self.teacher_layers), teacher_logits]
        return {
            "psd": pixel_similarity_distance(student, teacher),
            "csd": category_similarity_distance(student_logits, teacher_logits),
        }
