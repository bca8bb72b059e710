"""Segmentation scores from one confusion matrix over a whole evaluation, counted batch by batch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError, nearest

if TYPE_CHECKING:
    from transformers import EvalPrediction

# Trainer pads labels and predictions of ranks with smaller tiles with this value before it gathers them.
TRAINER_PADDING = -100

# Pixels counted at a time on the CPU: few enough that the intermediate codes stay in the cache of a core.
CHUNK = 1 << 18

# torch has little arithmetic for these types, so they are widened.
WIDER = {torch.bool: torch.uint8, torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}


def count_pairs(
    predictions: torch.Tensor, references: torch.Tensor, num_labels: int, ignore_index: int | None = IGNORE_INDEX
) -> torch.Tensor:
    """Confusion matrix of class ids.

    Args:
        predictions: class ids of any integer type and any shape.
        references: class ids of the same shape on the same device; the integer type may be another.
        num_labels: K; the classes are 0..K-1.
        ignore_index: reference value that is not counted, whatever is predicted there. None: every pixel counts.

    Returns:
        `(K, K)` int64 on the device of the data, rows = reference, columns = prediction.

    Raises:
        UserError: a value outside 0..K-1 at a pixel that is not ignored.
    """
    k = num_labels
    # Every id outside 0..K-1 becomes -1 or K, and ids are counted from -1, so that one table holds the classes and
    # the strangers; codes have the narrowest type that numbers its cells.
    width = k + 2
    predictions, references = as_tensor(predictions).reshape(-1), as_tensor(references).reshape(-1)
    on_cpu = predictions.device.type == "cpu"
    chunk = CHUNK if on_cpu else max(1, predictions.numel())
    code = torch.uint8 if width**2 <= 2**8 else torch.int16 if width**2 <= 2**15 else torch.int32
    table = torch.zeros(width**2, dtype=torch.int64, device=predictions.device)
    ignored = 0
    for prediction, reference in zip(predictions.split(chunk), references.split(chunk), strict=True):
        codes = _limited(prediction, k).to(code).add_(_limited(reference, k).to(code), alpha=width)
        codes.add_(width + 1)  # where a -1 has wrapped around, this wraps back
        table += torch.bincount(codes if on_cpu else codes.to(torch.int32), minlength=width**2)
        is_ignored = equal(reference, ignore_index)
        # numpy counts ten times faster than torch
        ignored = ignored + (np.count_nonzero(is_ignored) if on_cpu else torch.count_nonzero(is_ignored))
    table = table.view(width, width)
    pairs = table[1:-1, 1:-1].clone()

    strange_references, strange_predictions = table[[0, -1]].sum(), table[1:-1, [0, -1]].sum(dim=1)
    if ignore_index is not None and 0 <= ignore_index < k:  # a class that is not to be counted
        pairs[ignore_index] = strange_predictions[ignore_index] = 0
    else:
        strange_references = strange_references - ignored
    if int(strange_references + strange_predictions.sum()):
        refuse_unknown(predictions, references, k, ignore_index)
    return pairs


def refuse_unknown(predictions: torch.Tensor, references: torch.Tensor, k: int, ignore_index: int | None) -> None:
    """Raise UserError if there is an id outside 0..K-1 at a pixel that is not ignored."""
    besides = "" if ignore_index is None else f" (and {ignore_index} = ignored)"
    counted = ~equal(references, ignore_index)
    for what, ids, more in (("references", references, besides), ("predictions", predictions, "")):
        limited = _limited(ids, k)
        strange = counted & ((limited != ids) | equal(limited, -1) | equal(limited, k))
        if strange.any():
            found = ids[strange].unique().tolist()
            listed = ", ".join(map(str, found[:8])) + (", ..." if len(found) > 8 else "")
            raise UserError(f"{what} contain {listed}: the classes are 0..{k - 1}{more}")


class SegmentationMetrics:
    """Streaming IoU, F1, accuracy and Cohen's kappa of a semantic segmentation.

    All scores come from ONE confusion matrix over everything seen since the last `reset`, never from means of
    per-image scores. The matrix is int64, `(K, K)`, rows = reference, columns = prediction, on the device of the data;
    memory does not grow with the number of images.

    Args:
        id2label: class names; the keys are 0..K-1 (or these numbers as strings, as JSON has them).
        ignore_index: reference value that is not counted; None counts every pixel.
        mean_over: names of the classes that `mean_iou`, `mean_f1` and `mean_accuracy` average over; default all.
            Only the means change: pixels of the other classes stay in the matrix, so a class is still charged for
            what it takes from them, and `overall_accuracy` and `kappa` always count all K classes. With the first
            five classes of six this is the usual ISPRS protocol (as GeoSeg computes it).

    Works as `compute_metrics` of a `Trainer` with `batch_eval_metrics=True` (see `__call__`) and on its own:

    >>> metrics = SegmentationMetrics({0: "ground", 1: "building"})
    >>> metrics.update(torch.tensor([[0, 1, 1]]), torch.tensor([[0, 1, 255]]))
    >>> metrics.compute()["mean_iou"]
    1.0
    """

    def __init__(
        self,
        id2label: Mapping[int | str, str],
        ignore_index: int | None = IGNORE_INDEX,
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
        self.mean_over = self.class_names if mean_over is None else self._known(mean_over)
        self.reset()

    @classmethod
    def from_matrix(
        cls, matrix, id2label: Mapping[int | str, str], mean_over: Iterable[str] | None = None
    ) -> SegmentationMetrics:
        """Metrics that have counted `matrix`, `(K, K)`, rows = reference: a report's confusion matrix, for example."""
        metrics = cls(id2label, mean_over=mean_over)
        matrix, k = torch.as_tensor(matrix), len(metrics.class_names)
        if matrix.shape != (k, k) or matrix.is_floating_point():
            raise UserError(
                f"the matrix is {matrix.dtype} of shape {tuple(matrix.shape)}: expected integers ({k}, {k}) for {k} classes"
            )
        metrics._matrix = matrix.to(torch.int64, copy=True)
        return metrics

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
            UserError: shapes that do not fit, or a value outside 0..K-1 at a pixel that is not ignored. Nothing of
                the batch is counted then.
        """
        predictions, references = class_maps(predictions, references, len(self.class_names))
        pairs = count_pairs(predictions, references, len(self.class_names), self.ignore_index)
        self._matrix = self._matrix.to(pairs.device) + pairs

    def merge(self, other: SegmentationMetrics) -> None:
        """Add the counts of `other`, which must have the same classes in the same order."""
        if other.class_names != self.class_names:
            raise UserError(f"cannot merge metrics of the classes {other.class_names} into {self.class_names}")
        self._matrix = self._matrix + other._matrix.to(self._matrix.device)

    def summed_over_ranks(self) -> SegmentationMetrics:
        """New metrics with the counts of all ranks, the same on every rank; these metrics stay as they are.

        For evaluations in which each rank counts its own share of the data. Every rank must call it. Without an
        initialised `torch.distributed` process group it is a copy. A Trainer gathers before it calls `__call__`:
        nothing is left to sum there.
        """
        matrix = self._matrix
        if dist.is_available() and dist.is_initialized():
            on_cpu = dist.get_backend() in ("gloo", "mpi")
            # A rank that had no data has its matrix on the CPU, where NCCL and its like cannot reach it.
            matrix = matrix.to("cpu" if on_cpu else torch.accelerator.current_accelerator(), copy=True)
            dist.all_reduce(matrix)
        total = type(self)(dict(enumerate(self.class_names)), self.ignore_index, self.mean_over)
        total._matrix = matrix.clone()
        return total

    def compute(
        self, reset: bool = False, mean_over: Iterable[str] | None = None, per_category: bool = False
    ) -> dict[str, float | list[float]]:
        """Scores from 0 to 1 (kappa from -1) as Python floats.

        Keys: `mean_iou`, `mean_f1`, `mean_accuracy`, `overall_accuracy`, `kappa`, then for every class `iou_<name>`,
        `f1_<name>` and `accuracy_<name>` (the accuracy of a class is its recall).

        A class that the reference does not contain is left out of every mean, predicted or not, so that a test split
        without that class does not poison the mean. Its own `accuracy_` is NaN; its `iou_` and `f1_` are 0 where it
        was predicted and NaN where it was not. Scores of nothing at all are NaN.

        Args:
            reset: the counts start again at zero.
            mean_over: names of the classes that the means of this call average over, instead of those of the
                constructor: several protocols from one evaluation.
            per_category: also `per_category_iou`, `per_category_f1` and `per_category_accuracy`, lists in the order of
                the classes, under the keys that `evaluate` uses. Off by default: a Trainer logs numbers, not lists.

        Raises:
            UserError: `mean_over` names an unknown class, or none.
        """
        mean_over = self.mean_over if mean_over is None else self._known(mean_over)
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
        averaged = np.isin(self.class_names, mean_over) & (in_reference > 0)
        result = {
            f"mean_{score}": float(values[averaged].mean()) if averaged.any() else math.nan
            for score, values in scores.items()
        }
        result |= {"overall_accuracy": float(overall_accuracy), "kappa": float(kappa)}
        for score, values in scores.items():
            result |= {f"{score}_{name}": float(value) for name, value in zip(self.class_names, values, strict=True)}
        if per_category:
            result |= {f"per_category_{score}": values.tolist() for score, values in scores.items()}
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
        predictions, references = eval_prediction.predictions, as_tensor(eval_prediction.label_ids)
        if isinstance(predictions, (tuple, list)):
            predictions = predictions[0]
        if references.is_floating_point():
            raise UserError(f"labels are {references.dtype}: pass integer class ids")
        padding = equal(references, TRAINER_PADDING)
        if padding.any() and self.ignore_index is not None:
            references = references.to(torch.int64).masked_fill(padding, self.ignore_index)
        self.update(predictions, references)
        return self.compute(reset=True) if compute_result else {}

    def _known(self, names: Iterable[str]) -> list[str]:
        names = list(names)
        for name in names:
            if name not in self.class_names:
                raise UserError(f"mean_over: no class is called {name!r}; nearest: {nearest(name, self.class_names)}")
        if not names:
            raise UserError("mean_over is empty: name at least one class, or leave it out to average over all classes")
        return names


def class_maps(predictions, references, num_labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions (class ids or logits `(B, K, h, w)`) and references as class ids of one shape on one device."""
    predictions, references = as_tensor(predictions), as_tensor(references)
    if references.is_floating_point():
        raise UserError(f"references are {references.dtype}: pass integer class ids")
    references = references.to(predictions.device)
    if predictions.is_floating_point():
        k = num_labels
        fits = predictions.ndim == 4 and references.ndim == 3 and predictions.shape[1] == k
        if not fits or len(predictions) != len(references):
            raise UserError(
                f"logits have shape {tuple(predictions.shape)}, references {tuple(references.shape)}: "
                f"expected logits (B, {k}, h, w) for {k} classes and references (B, H, W)"
            )
        size = references.shape[-2:]
        logits = F.interpolate(predictions.float(), size=size, mode="bilinear", align_corners=False)  # (B, K, H, W)
        predictions = logits.argmax(dim=1)
    if predictions.shape != references.shape:
        raise UserError(
            f"predictions have shape {tuple(predictions.shape)}, references {tuple(references.shape)}: "
            "pass class ids of the same shape, or float logits (B, K, h, w)"
        )
    return predictions, references


def as_tensor(values) -> torch.Tensor:
    """The values as a tensor that torch can calculate with; numpy arrays and lists are copied only where they must be."""
    if not isinstance(values, torch.Tensor):
        values = np.asarray(values)
        shared = values.flags.c_contiguous and values.flags.writeable and min(values.strides, default=0) >= 0
        if not shared or not values.dtype.isnative:  # torch takes no reversed, read-only or byte-swapped arrays
            values = np.array(values, dtype=values.dtype.newbyteorder("="), order="C")
        values = torch.from_numpy(values)
    values = values.detach()
    return values.to(WIDER.get(values.dtype, values.dtype))


def equal(ids: torch.Tensor, value: int | None) -> torch.Tensor:
    """Where the ids are `value`, as bool. torch wraps a number into the tensor's type: a uint8 of 156 equals its -100."""
    kind = torch.iinfo(ids.dtype)
    if value is None or not kind.min <= value <= kind.max:
        return torch.zeros_like(ids, dtype=torch.bool)
    return ids == value


def _limited(ids: torch.Tensor, k: int) -> torch.Tensor:
    """A copy in which what lies outside 0..K-1 is -1 or K."""
    kind = torch.iinfo(ids.dtype)
    return ids.clamp(max(-1, kind.min), min(k, kind.max))
