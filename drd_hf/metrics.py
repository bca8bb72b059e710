"""Segmentation scores from one confusion matrix over a whole evaluation, counted batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import EvalPrediction

# Trainer pads labels and predictions of ranks with smaller tiles with this value before it gathers them.
TRAINER_PADDING = -100


class SegmentationMetrics:
    """Streaming IoU, F1, accuracy and Cohen's kappa of a semantic segmentation.

    All scores come from ONE confusion matrix over everything seen since the last `reset`, never from means of
    per-image scores. The matrix is int64, `(K, K)`, rows = reference, columns = prediction, on the device of the data.

    Args:
        id2label: class names; the keys are 0..K-1 (or these numbers as strings, as JSON has them).
        ignore_index: reference value that is not counted.
        mean_over: names of the classes that `mean_iou`, `mean_f1` and `mean_accuracy` average over; default all.
            `overall_accuracy` and `kappa` always count all K classes.

    Works as `compute_metrics` of a `Trainer` with `batch_eval_metrics=True` (see `__call__`) and on its own:

    >>> metrics = SegmentationMetrics({0: "ground", 1: "building"})
    >>> metrics.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 255]]))
    >>> metrics.compute()["mean_iou"]
    1.0
    """

    def __init__(
        self,
        id2label: Mapping[int | str, str],
        ignore_index: int = IGNORE_INDEX,
        mean_over: Iterable[str] | None = None,
    ):
        by_id = {int(i): str(name) for i, name in id2label.items()}
        if not by_id or sorted(by_id) != list(range(len(by_id))):
            raise UserError(f"id2label has the keys {sorted(by_id)}: number the classes 0, 1, ... without gaps")
        self.class_names = [by_id[i] for i in range(len(by_id))]
        twice = sorted({name for name in self.class_names if self.class_names.count(name) > 1})
        if twice:
            raise UserError(f"id2label names {', '.join(twice)} more than once: give every class its own name")
        self.ignore_index = ignore_index
        self.mean_over = self.class_names if mean_over is None else list(mean_over)
        for name in self.mean_over:
            if name not in self.class_names:
                raise UserError(f"mean_over: no class is called {name!r}; nearest: {nearest(name, self.class_names)}")
        if not self.mean_over:
            raise UserError("mean_over is empty: name at least one class, or leave it out to average over all classes")
        self.reset()

    @property
    def matrix(self) -> torch.Tensor:
        """A copy of the `(K, K)` int64 confusion matrix: rows = reference, columns = prediction."""
        return self._matrix.clone()

    def reset(self) -> None:
        """Forget everything counted so far."""
        self._matrix = torch.zeros(len(self.class_names), len(self.class_names), dtype=torch.int64)

    def update(self, predictions, references) -> None:
        """Count one batch.

        Args:
            predictions: integer class ids of the shape of `references`, or float logits `(B, K, h, w)`, which are
                resized to the references (bilinear, `align_corners=False`) before the argmax.
            references: integer class ids, `(B, H, W)` or `(H, W)`. Both are torch tensors or numpy arrays.

        Raises:
            UserError: shapes that do not fit, or a value outside 0..K-1 at a pixel that is not ignored.
        """
        predictions, references = _tensor(predictions), _tensor(references)
        if references.is_floating_point():
            raise UserError(f"references are {references.dtype}: pass integer class ids")
        references = references.to(predictions.device, torch.int64)
        if predictions.is_floating_point():
            predictions = self._class_ids(predictions, references)
        if predictions.shape != references.shape:
            raise UserError(
                f"predictions have shape {tuple(predictions.shape)}, references {tuple(references.shape)}: "
                "pass class ids of the same shape, or float logits (B, K, h, w)"
            )
        counted = references != self.ignore_index
        reference, prediction = references[counted], predictions.to(torch.int64)[counted]
        self._refuse_unknown("references", reference, f" (and {self.ignore_index} = ignored)")
        self._refuse_unknown("predictions", prediction, "")
        k = len(self.class_names)
        pairs = torch.bincount(reference * k + prediction, minlength=k * k).view(k, k)
        self._matrix = self._matrix.to(pairs.device) + pairs

    def merge(self, other: SegmentationMetrics) -> None:
        """Add the counts of `other`, which must have the same classes in the same order."""
        if other.class_names != self.class_names:
            raise UserError(f"cannot merge metrics of the classes {other.class_names} into {self.class_names}")
        self._matrix = self._matrix + other._matrix.to(self._matrix.device)

    def compute(self, reset: bool = False) -> dict[str, float]:
        """Scores from 0 to 1 (kappa from -1) as Python floats; with `reset` the counts start again at zero.

        Keys: `mean_iou`, `mean_f1`, `mean_accuracy`, `overall_accuracy`, `kappa`, then for every class `iou_<name>`,
        `f1_<name>` and `accuracy_<name>` (the accuracy of a class is its recall).

        A class that the reference does not contain is left out of every mean, predicted or not, so that a test split
        without that class does not poison the mean. Its own `accuracy_` is NaN; its `iou_` and `f1_` are 0 where it
        was predicted and NaN where it was not. Scores of nothing at all are NaN.
        """
        matrix = self._matrix.cpu().numpy().astype(np.float64)
        correct, in_reference, predicted = matrix.diagonal(), matrix.sum(axis=1), matrix.sum(axis=0)
        total = matrix.sum()
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN that is meant
            scores = {
                "iou": correct / (in_reference + predicted - correct),
                "f1": 2 * correct / (in_reference + predicted),
                "accuracy": correct / in_reference,
            }
            overall_accuracy = correct.sum() / total
            by_chance = (in_reference / total) @ (predicted / total)
            kappa = (overall_accuracy - by_chance) / (1 - by_chance)
        averaged = np.isin(self.class_names, self.mean_over) & (in_reference > 0)
        result = {
            f"mean_{score}": float(values[averaged].mean()) if averaged.any() else math.nan
            for score, values in scores.items()
        }
        result |= {"overall_accuracy": float(overall_accuracy), "kappa": float(kappa)}
        for score, values in scores.items():
            result |= {f"{score}_{name}": float(value) for name, value in zip(self.class_names, values, strict=True)}
        if reset:
            self.reset()
        return result

    def __call__(self, eval_prediction: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        """`compute_metrics` of a `Trainer`: count one batch; at the last one return the scores and start again.

        Set `batch_eval_metrics=True`, so that the Trainer hands over every batch and does not keep the logits of the
        whole evaluation. On several ranks the Trainer gathers predictions and labels (and drops the samples repeated
        to fill the last batch) before it calls this, so every rank counts everything; nothing is reduced here. Where
        a model returns more than its logits, the logits are the first entry.
        """
        predictions, references = eval_prediction.predictions, _tensor(eval_prediction.label_ids)
        if isinstance(predictions, (tuple, list)):
            predictions = predictions[0]
        if references.is_floating_point():
            raise UserError(f"labels are {references.dtype}: pass integer class ids")
        references = references.to(torch.int64)
        self.update(predictions, references.masked_fill(references == TRAINER_PADDING, self.ignore_index))
        return self.compute(reset=True) if compute_result else {}

    def _class_ids(self, logits: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
        k = len(self.class_names)
        if logits.ndim != 4 or references.ndim != 3 or logits.shape[1] != k or len(logits) != len(references):
            raise UserError(
                f"logits have shape {tuple(logits.shape)}, references {tuple(references.shape)}: "
                f"expected logits (B, {k}, h, w) for {k} classes and references (B, H, W)"
            )
        size = references.shape[-2:]
        logits = F.interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)  # (B, K, H, W)
        return logits.argmax(dim=1)

    def _refuse_unknown(self, what: str, values: torch.Tensor, besides: str) -> None:
        k = len(self.class_names)
        unknown = values[(values < 0) | (values >= k)]
        if len(unknown):
            found = unknown.unique().tolist()
            listed = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
            raise UserError(f"{what} contain {listed}: the classes are 0..{k - 1}{besides}")


def _tensor(values) -> torch.Tensor:
    if isinstance(values, torch.Tensor):
        return values.detach()
    return torch.from_numpy(np.array(values, order="C"))  # a copy: torch takes no reversed and no read-only views
