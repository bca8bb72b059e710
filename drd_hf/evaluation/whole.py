"""Scores of a model on whole images: the windows of one image are blended before its pixels are counted."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from drd_hf.data.splits import SegmentationInfo
from drd_hf.errors import UserError
from drd_hf.evaluation.augmentation import SCALES, AugmentedModel
from drd_hf.evaluation.protocols import references_of
from drd_hf.evaluation.sources import JoinedSource, joined_sources
from drd_hf.evaluation.tiles import check_labels, usable_device
from drd_hf.inference import predict_image
from drd_hf.inference.windows import NotFinite
from drd_hf.metrics import BoundaryIoU, SegmentationMetrics


@dataclass(frozen=True)
class EvaluatedSource:
    """What happened to one image. `overall_accuracy` is by reference, NaN where that has no labelled pixel."""

    number: int
    name: str
    height: int
    width: int
    filled_pixels: int
    overall_accuracy: dict[str, float]


@dataclass(frozen=True)
class SourceEvaluation:
    """Counts over all images of all ranks, by reference.

    Attributes:
        metrics: one confusion matrix for each reference.
        outlines: Boundary IoU of the full reference, if it was asked for and there is one.
        sources: the images that were scored, in the order of the split.
        unlabelled: names of images without a reference, which were not predicted.
        description: how it was counted, in words.
    """

    metrics: dict[str, SegmentationMetrics]
    outlines: dict[str, BoundaryIoU]
    sources: tuple[EvaluatedSource, ...]
    unlabelled: tuple[str, ...]
    description: str


def evaluate_sources(
    model: PreTrainedModel,
    processor,
    dataset,
    info: SegmentationInfo,
    tile: int | None = None,
    overlap: float = 0.25,
    reference: str | None = "full",
    tta: Iterable[str] = (),
    tta_scales: Iterable[float] = SCALES,
    batch_size: int = 4,
    device: str | torch.device | None = None,
    channels: list[int] | None = None,
    boundary_distance: float | None = None,
    on_source: Callable[[JoinedSource, np.ndarray], None] | None = None,
) -> SourceEvaluation:
    """Predict the whole images of a split and count every pixel once.

    The tiles of an image are put together again, the image is predicted by overlapping windows that are blended, and
    the one prediction is compared with each reference. Pixels labelled 255 never count. Where tiles without a label
    were left out of the dataset the image is missing: what the windows see there is the mean colour of the rest
    (`filled_pixels` of the sources).

    Where a `torch.distributed` process group is initialised the images are shared over the ranks, all of which get the
    same counts.

    Args:
        model: a semantic segmentation model, with the classes of the dataset; put in eval mode.
        processor: its image processor, for its normalisation.
        dataset: a split of `load_splits`, streamed or not; one image of it is in memory at a time.
        info: of the prepared dataset.
        tile: side of the windows in pixels. None: that of the dataset's tiles.
        overlap: share of a window that the next one covers again.
        reference: `full`, `eroded`, `both`, or None for all that the dataset has.
        tta: test-time augmentation, any of `AUGMENTATIONS`, with the factors `tta_scales`.
        batch_size: windows per forward pass.
        device: default CUDA if there is one, else CPU.
        channels: channels of the dataset that the model reads, in its order. None: all.
        boundary_distance: also count the Boundary IoU of the full reference, with this distance (see `BoundaryIoU`).
        on_source: called with each image of this rank and its prediction, uint8 (H, W).

    Raises:
        UserError: other classes than the dataset's, a reference or bands that it does not have, wrong options, a
            damaged tile, answers of NaN or infinity.
    """
    columns = references_of(info, reference)
    check_labels(model, info.id2label, "the model")
    tile = info.tile_size if tile is None else tile
    model = model.to(usable_device(device)).eval()
    tta = list(tta)
    if tta:
        model = AugmentedModel(model, tta, tta_scales)
    metrics = {name: SegmentationMetrics(info.id2label) for name in columns}
    outlines = {}
    if boundary_distance is not None and "full" in columns:
        outlines["full"] = BoundaryIoU(info.id2label, boundary_distance)
    distributed = dist.is_available() and dist.is_initialized()
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if distributed else (0, 1)

    def score(source: JoinedSource) -> EvaluatedSource | None:
        labels = {name: source.references[column] for name, column in columns.items()}
        labels = {name: label for name, label in labels.items() if label is not None}
        if not labels:
            return None
        image = source.image if channels is None else source.image[..., channels]
        try:
            prediction = predict_image(model, processor, image, tile, overlap, batch_size)
        except NotFinite as error:
            raise UserError(f"{source.name}: {error}") from None
        accuracy = {}
        for name, label in labels.items():
            of_source = SegmentationMetrics(info.id2label)
            try:
                of_source.update(prediction, label)
            except UserError as error:
                raise UserError(f"{source.name}: {error}") from None
            metrics[name].merge(of_source)
            accuracy[name] = of_source.compute()["overall_accuracy"]
            if name in outlines:
                outlines[name].update(prediction, label)
        if on_source is not None:
            on_source(source, prediction)
        return EvaluatedSource(source.number, source.name, *image.shape[:2], source.filled_pixels, accuracy)

    evaluated, unlabelled = [], []
    with tqdm(desc="evaluate", unit="tile", total=_number_of_tiles(dataset), disable=rank > 0) as progress:
        for source in joined_sources(dataset, list(dict.fromkeys(columns.values())), rank, world_size):
            scored = score(source)
            if scored is None:
                unlabelled.append((source.number, source.name))
            else:
                evaluated.append(scored)
            progress.update(source.tiles)
            del source  # before the next one is read
    if distributed:
        metrics = {name: counted.summed_over_ranks() for name, counted in metrics.items()}
        outlines = {name: counted.summed_over_ranks() for name, counted in outlines.items()}
        evaluated, unlabelled = _of_all_ranks(evaluated), _of_all_ranks(unlabelled)
    description = f"whole images, blended windows of {tile} px that overlap by {overlap:.0%}, each pixel once"
    return SourceEvaluation(
        metrics=metrics,
        outlines=outlines,
        sources=tuple(sorted(evaluated, key=lambda source: source.number)),
        unlabelled=tuple(name for _, name in sorted(unlabelled)),
        description=f"{description}; {model.description}" if tta else description,
    )


def _number_of_tiles(dataset) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _of_all_ranks(items: list) -> list:
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for of_rank in gathered for item in of_rank]
