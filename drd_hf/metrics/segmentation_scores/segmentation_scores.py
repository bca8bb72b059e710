"""The scores of drd_hf.metrics as an `evaluate` metric, counted as the maps come in."""

from collections.abc import Mapping, Sequence

import datasets
import evaluate  # the module, not its classes: evaluate.load takes the first of them that it finds here
import numpy as np
import torch
import torch.distributed as dist

from drd_hf.errors import UserError
from drd_hf.metrics import SegmentationMetrics
from drd_hf.metrics.confusion import as_tensor

DESCRIPTION = """
Mean IoU, F1, accuracy, overall accuracy and Cohen's kappa of a semantic segmentation, and the scores of every class, from
one confusion matrix over all maps. The maps are counted when they are added and are not kept: no cache file, and memory
that does not grow with their number.
"""

USAGE = """
Args:
    predictions: list of 2-D maps of class ids (lists, numpy arrays or torch tensors; each may have its own size), or one
        array (N, H, W).
    references: the same for the reference. Ids are 0..255.
    num_labels: number of classes K; needless with id2label.
    ignore_index: reference id that is not counted (default 255).
    id2label: class names by id; default "0", "1", ...
    mean_over: names of the classes that the means average over; default all.
    The settings are passed to `compute`, or to `evaluate.load` as its defaults.

Returns:
    mean_iou, mean_f1, mean_accuracy, overall_accuracy, kappa, iou_<name>, f1_<name> and accuracy_<name> for every class,
    and the lists per_category_iou, per_category_f1, per_category_accuracy and confusion_matrix (rows = reference).

Example:
    >>> scores = evaluate.load(drd_hf.metrics.EVALUATE_MODULE)
    >>> scores.add_batch(predictions=[[[0, 1, 1]]], references=[[[0, 1, 255]]])
    >>> scores.compute(num_labels=2)["mean_iou"]
    1.0
"""

IDS = 256


class SegmentationScores(evaluate.Metric):
    """An `evaluate` metric; see `inputs_description`.

    What comes in is counted in one table of all pairs of the ids 0..255 (half a megabyte), from which `compute` takes
    the classes: neither their number nor the ignored id need be known before. With `num_process` above 1 `compute` sums
    over the ranks of `torch.distributed`, which must be initialised; process 0 returns the scores, the others None.
    """

    def __init__(
        self,
        *args,
        num_labels: int | None = None,
        ignore_index: int | None = 255,
        id2label: Mapping[int | str, str] | None = None,
        mean_over: Sequence[str] | None = None,
        **kwargs,
    ):
        self.settings = {
            "num_labels": num_labels,
            "ignore_index": ignore_index,
            "id2label": id2label,
            "mean_over": mean_over,
        }
        if num_labels is not None or id2label is not None:
            _empty(**self.settings)  # refuse early
        self._counts, self._maps = _all_ids(), 0
        super().__init__(*args, **kwargs)

    def _info(self) -> evaluate.MetricInfo:
        maps = datasets.List(datasets.List(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation="",
            inputs_description=USAGE,
            features=datasets.Features({"predictions": maps, "references": maps}),
        )

    def __len__(self) -> int:
        return self._maps

    def add(self, *, prediction=None, reference=None, predictions=None, references=None):
        """Count one map and its reference; `evaluate.combine` calls them `predictions` and `references`."""
        prediction = predictions if prediction is None else prediction
        reference = references if reference is None else reference
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions=None, references=None):
        """Count a batch of maps and their references."""
        counts, maps = _count(predictions, references)
        self._counts.merge(counts)
        self._maps += maps

    def compute(self, *, predictions=None, references=None, **settings):
        """Scores of the maps added so far and of those given here; then the counts start again at zero.

        Where the input is refused, what was added before stays counted.
        """
        unknown = sorted(set(settings) - set(self.settings))
        if unknown:
            raise UserError(f"no option is called {', '.join(unknown)}: there are {', '.join(self.settings)}")
        settings = self.settings | settings
        _empty(**settings)
        if self.num_process > 1 and not (dist.is_initialized() and dist.get_world_size() == self.num_process):
            raise UserError(
                f"num_process is {self.num_process}, but torch.distributed is not initialised with as many: start the "
                "processes with accelerate launch or torchrun, and initialise before compute"
            )
        counts = _all_ids()
        counts.merge(self._counts)
        if predictions is not None or references is not None:
            counts.merge(_count(predictions, references)[0])
            maps = self._maps + len(predictions)
        else:
            maps = self._maps
        if not maps and self.num_process == 1:
            raise UserError("no maps were added: call add or add_batch before compute, or pass maps to it")
        if self.num_process > 1:
            counts = counts.summed_over_ranks()
        result = None if self.process_id else self._scores(counts.matrix.cpu().numpy(), **settings)
        self._counts, self._maps = _all_ids(), 0
        return result

    def _scores(self, table: np.ndarray, **settings) -> dict:
        """Scores from the table of all pairs of ids, `(256, 256)`, rows = reference."""
        metrics, ignore_index = _empty(**settings), settings["ignore_index"]
        k = len(metrics.class_names)
        if ignore_index is not None:
            table[ignore_index] = 0
        strangers = {"references": table[k:].sum(axis=1), "predictions": table[:, k:].sum(axis=0)}
        for what, counts in strangers.items():
            if counts.any():
                found = ", ".join(str(k + i) for i in np.flatnonzero(counts)[:8])
                besides = (
                    f" (and {ignore_index} = ignored)" if what == "references" and ignore_index is not None else ""
                )
                raise UserError(f"{what} contain {found}: the classes are 0..{k - 1}{besides}")
        metrics = SegmentationMetrics.from_matrix(
            table[:k, :k], dict(enumerate(metrics.class_names)), metrics.mean_over
        )
        return metrics.compute(per_category=True) | {"confusion_matrix": metrics.matrix.tolist()}


def _all_ids() -> SegmentationMetrics:
    return SegmentationMetrics({i: str(i) for i in range(IDS)}, ignore_index=None)


def _empty(num_labels, ignore_index, id2label, mean_over) -> SegmentationMetrics:
    """Metrics of these settings that have counted nothing; UserError where the settings make no sense."""
    if id2label is None:
        if num_labels is None:
            raise UserError("neither num_labels nor id2label is known: pass one to compute or to evaluate.load")
        id2label = {i: str(i) for i in range(num_labels)}
    if num_labels not in (None, len(id2label)) or not 1 <= len(id2label) <= IDS:
        raise UserError(
            f"num_labels is {num_labels}, id2label has {len(id2label)} classes: give 1 to {IDS}, and the same"
        )
    if ignore_index is not None and not 0 <= ignore_index < IDS:
        raise UserError(
            f"ignore_index is {ignore_index}: ids are 0..{IDS - 1}, so mark ignored pixels with one of these"
        )
    return SegmentationMetrics(id2label, ignore_index, mean_over)


def _count(predictions, references) -> tuple[SegmentationMetrics, int]:
    """Pairs of ids in one batch, and its number of maps."""
    if predictions is None or references is None:
        raise UserError("predictions or references are missing: pass both")
    if len(predictions) != len(references):
        raise UserError(f"there are {len(predictions)} predictions and {len(references)} references: pass as many")
    counts = _all_ids()
    for what, maps in (("predictions", predictions), ("references", references)):
        for ids in map(as_tensor, [maps] if isinstance(maps, (np.ndarray, torch.Tensor)) else maps):
            if ids.numel() and not ids.is_floating_point() and not 0 <= int(ids.min()) <= int(ids.max()) < IDS:
                raise UserError(f"{what} contain {int(ids.min())} to {int(ids.max())}: ids are 0..{IDS - 1}")
    if all(isinstance(maps, (np.ndarray, torch.Tensor)) for maps in (predictions, references)):
        counts.update(_ids(predictions), references)
    else:
        for prediction, reference in zip(predictions, references, strict=True):
            counts.update(_ids(prediction), reference)
    return counts, len(predictions)


def _ids(predictions):
    predictions = as_tensor(predictions)
    if predictions.is_floating_point():
        raise UserError(f"predictions are {predictions.dtype}: pass integer class ids")
    return predictions
