"""Scores of a model tile by tile, and its speed."""

import math
import statistics
import time
from collections.abc import Iterable, Sequence

import torch
from datasets import IterableDataset
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from drd_hf.data.splits import SegmentationInfo
from drd_hf.data.transforms import EvalTransform, SegmentationCollator, undecoded
from drd_hf.errors import UserError
from drd_hf.evaluation.protocols import references_of
from drd_hf.features import input_channels
from drd_hf.inference.windows import NotFinite
from drd_hf.metrics import SegmentationMetrics

EVALUATION_PROTOCOL = "tiles, each pixel once"


def evaluate_model(
    model: PreTrainedModel,
    processor,
    dataset,
    batch_size: int = 8,
    device: str | torch.device | None = None,
    channels: Sequence[int] | None = None,
    label: str = "label",
    info: SegmentationInfo | None = None,
) -> SegmentationMetrics:
    """Predict every tile of a split and count the pixels.

    Tiles are predicted one by one at their own resolution, without test-time augmentation. A pixel covered by
    overlapping tiles of one source image is counted in the first of them only; pixels labelled 255 never count.

    Args:
        model: a semantic segmentation model; put in eval mode. It gets tiles in the dtype of its weights.
        processor: its image processor.
        dataset: one split from `load_splits`.
        batch_size: tiles per forward pass.
        device: default CUDA if there is one, else CPU.
        channels: channels of the tiles that the model reads, in its order. None: all.
        label: column of the reference, `label` or `label_eroded`.
        info: of the prepared dataset; a streamed split needs it.

    Returns:
        The metrics object, for `.compute()` and `.matrix`.

    Raises:
        UserError: the dataset has labels that the model does not know; the model answers with NaN or infinity.
    """
    device = usable_device(device)
    model = model.to(device).eval()
    metrics = SegmentationMetrics(model.config.id2label)
    loader = DataLoader(
        _tiles(dataset, label, info),
        batch_size=batch_size,
        collate_fn=SegmentationCollator(processor, num_labels=model.config.num_labels, channels=channels),
    )
    with torch.inference_mode():
        for batch in tqdm(loader, desc="evaluate", unit="batch"):
            logits = model(pixel_values=batch["pixel_values"].to(device, model.dtype)).logits
            if not logits.isfinite().all():
                raise NotFinite
            metrics.update(logits, batch["labels"].to(device))
    return metrics


def _tiles(dataset, label: str, info: SegmentationInfo | None):
    if not isinstance(dataset, IterableDataset):
        return undecoded(dataset).with_transform(EvalTransform(dataset, label=label))
    if info is None:
        raise UserError("a streamed split is evaluated with the info of its dataset: give info=splits.info")
    columns = list(dataset.features)
    return undecoded(dataset).map(
        EvalTransform(info=info, label=label), batched=True, batch_size=8, remove_columns=columns
    )


def protocol_of(info: SegmentationInfo, label: str = "label") -> str:
    """How `evaluate_model` counted, in words; with the name of the reference unless there is only the full one."""
    names = {column: name for name, column in references_of(info).items()}
    if list(names.values()) == ["full"]:
        return EVALUATION_PROTOCOL
    return f"{EVALUATION_PROTOCOL}, {names[label]} reference"


def finite_json(value):
    """A report without NaN and infinity, which are no JSON: the score of a class that does not occur becomes null."""
    if isinstance(value, dict):
        return {name: finite_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [finite_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def same_labels(model: PreTrainedModel, id2label: dict[int, str]) -> bool:
    """Whether the model has exactly these classes, in this order."""
    return {int(i): name for i, name in model.config.id2label.items()} == dict(id2label)


def check_labels(model: PreTrainedModel, id2label: dict[int, str], what: str) -> None:
    """Refuse a model whose classes are not the dataset's, in name and order."""
    if not same_labels(model, id2label):
        ours = list(model.config.id2label.values())
        raise UserError(f"{what} predicts {ours}, the dataset has {list(id2label.values())}")


def milliseconds_per_tile(
    models: Iterable[PreTrainedModel],
    tile_size: int,
    device: str | torch.device | None = None,
    rounds: int = 15,
    batch_size: int = 1,
) -> list[float]:
    """Median time of one forward pass on one blank tile (or `batch_size` of them), in milliseconds, for each model.

    The models take turns within every round, so that a change of the machine's speed meets all of them alike.

    Args:
        models: semantic segmentation models.
        tile_size: side of the tile in pixels.
        device: default CUDA if there is one, else CPU.
        rounds: timed passes of each model, after two that are not counted.
        batch_size: tiles in a pass.

    Raises:
        UserError: a model does not run on tiles of this size.
    """
    device = usable_device(device)
    models = [model.to(device).eval() for model in models]
    shape = (tile_size, tile_size)
    tiles = [
        torch.zeros(batch_size, input_channels(model), *shape, device=device, dtype=model.dtype) for model in models
    ]
    times = [[] for _ in models]
    with torch.inference_mode():
        for turn in range(rounds + 2):
            for model, tile, of_model in zip(models, tiles, times, strict=True):
                start = time.perf_counter()
                try:
                    model(pixel_values=tile)
                except (RuntimeError, ValueError) as error:
                    raise _refusal(model, tile_size, error) from error
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if turn >= 2:
                    of_model.append(1000 * (time.perf_counter() - start))
    return [statistics.median(of_model) for of_model in times]


def require_size(model: PreTrainedModel, size: int) -> None:
    """Refuse a model that does not run on one blank tile of `size` x `size` pixels; it is left as it was.

    Raises:
        UserError: names the model, the size and the reason.
    """
    training = model.training
    tile = torch.zeros(1, input_channels(model), size, size, device=model.device, dtype=model.dtype)
    try:
        # Not inference mode: models that cache tensors (BEiT) could not be trained with them.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(pixel_values=tile)
    except (RuntimeError, ValueError) as error:
        raise _refusal(model, size, error) from error
    finally:
        model.train(training)


def _refusal(model, size: int, error: Exception) -> UserError:
    """In one line that a model does not run on tiles of a size; a `UserError` of the model says so itself."""
    if isinstance(error, UserError):
        return error
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"{type(model).__name__} does not run on tiles of {size}x{size} pixels ({reason})")


def usable_device(name: str | torch.device | None) -> torch.device:
    """The device of this name; without one CUDA if there is a GPU, else the CPU."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name}: not available here ({str(error).strip().splitlines()[0]})") from error
    return device
