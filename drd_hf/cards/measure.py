"""What a trained model is: its scores, cost and pictures, measured for its card and kept in `run.json`."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import rasterio
import torch.distributed as dist
from datasets import Dataset, IterableDataset
from PIL import Image
from transformers import PreTrainedModel

from drd_hf.cards.facts import (
    CARD_HASH_KEY,
    CARD_KEY,
    COMPARISON_NAME,
    CONFUSION_NAME,
    CURVES_NAME,
    DUAL_RELATION,
    RUN_NAME,
    TRAINED_NAME,
    Example,
    MeasuredResult,
    ModelCardFacts,
    Profile,
    facts_from_json,
    facts_to_json,
    hub_id,
)
from drd_hf.cards.render import write_model_card
from drd_hf.cards.text import last_part
from drd_hf.checkpoints import STAGING_PREFIX
from drd_hf.data.facts import CITYSCAPES, POTSDAM, VAIHINGEN, DatasetFacts
from drd_hf.data.preview import PreviewTile, preview_tiles
from drd_hf.data.scenes import SCENES
from drd_hf.data.splits import SegmentationSplits, StreamedSegmentationSplits
from drd_hf.data.transforms import normalization_of, undecoded
from drd_hf.errors import UserError
from drd_hf.evaluation import (
    SourceEvaluation,
    evaluate_model,
    evaluate_sources,
    find_protocol,
    finite_json,
    protocol_of,
    same_labels,
)
from drd_hf.evaluation.protocols import Protocol
from drd_hf.evaluation.report import without_empty
from drd_hf.evaluation.tiles import require_size
from drd_hf.features import gives_class_scores
from drd_hf.inference import predict_image
from drd_hf.models import bands_of, colors_of, count_parameters
from drd_hf.pictures import comparison_picture
from drd_hf.plots import CURVE_COLORS, confusion_picture, curves_picture
from drd_hf.profiling import device_name, profile_models

EXAMPLES = 3
EXAMPLE_CELL = 140  # pixels: the picture of the examples stays below 200 kB
PROFILE_ROUNDS = 7
COLUMNS = {"model": "this model", "teacher": "teacher", "student_alone": "student alone"}


@dataclass(frozen=True)
class TrainedModel:
    """A model with its image processor, and the channels of the dataset that it reads (None: all)."""

    model: PreTrainedModel
    processor: Any
    channels: Sequence[int] | None = None


@dataclass(frozen=True)
class Origins:
    """What a card says beside what is measured: names and Hub ids of where the model comes from, and its licence."""

    model_name: str
    dataset: str
    teacher: str | None = None
    base_model: str | None = None
    license: str | None = None
    distillation: Mapping[str, Any] | None = None


def measure_run(
    folder: str | os.PathLike,
    run: Mapping[str, Any],
    models: Mapping[str, TrainedModel],
    splits: SegmentationSplits | StreamedSegmentationSplits,
    evaluate_on: Sequence[str],
    origins: Origins,
    batch_size: int = 8,
    device=None,
) -> dict[str, Any]:
    """Score and profile a trained model, and write its card, pictures, examples and, last of all, `run.json`.

    Every split of `evaluate_on` is scored tile by tile. Where images are larger than tiles, the last one is also scored
    on whole images, by the protocol of its classes and with every reference that the dataset has.

    Where a `torch.distributed` process group is initialised every rank calls this with the same models: the whole images
    are shared over the ranks, and the main process does the rest alone.

    Args:
        folder: of the model; what is written there appears when it is whole.
        run: what is known of the training, for `run.json`: `settings`, `seed`, `steps`, `versions`, `command`, `log`, and
            `hardware`.
        models: `model`, and where there is one `teacher` and `student_alone`; these are scored if they know the classes.
        splits: of `load_splits`.
        batch_size: tiles in a forward pass.
        device: default CUDA if there is one, else CPU.

    Returns:
        The content of `run.json`: `run` and what was measured. {} on other ranks than the main one.
    """
    info, folder, evaluate_on = splits.info, Path(folder), list(dict.fromkeys(evaluate_on))
    scored = {
        name: trained
        for name, trained in models.items()
        if gives_class_scores(trained.model) and same_labels(trained.model, info.id2label)
    }
    if "model" not in scored:
        ours = list(models["model"].model.config.id2label.values())
        raise UserError(f"the model predicts {ours}, {info.name} has {list(info.id2label.values())}: give its dataset")
    last, evaluations = evaluate_on[-1], {}
    if info.num_tiles[last] > info.num_sources[last]:
        evaluations = {
            name: without_empty(
                evaluate_sources(
                    trained.model, trained.processor, splits[last], info, reference=None, batch_size=batch_size,
                    device=device, channels=trained.channels,
                ),
                None,
                f"{info.name} {last}",
            )
            for name, trained in scored.items()
        }  # fmt: skip
    # What the ranks do together comes first: nobody waits for the main process until its connection times out.
    if dist.is_available() and dist.is_initialized() and dist.get_rank() > 0:
        return {}

    results, matrix = {}, None
    for name, trained in scored.items():
        for split in evaluate_on:
            metrics = evaluate_model(
                trained.model, trained.processor, splits[split], batch_size, device, trained.channels, info=info
            )
            results.setdefault(name, {})[split] = metrics.compute()
            if name == "model":
                matrix, counted_on = metrics.matrix, f"{split}: {protocol_of(info)}, {info.tile_size} px"
    measured = [
        _result(info.name, split, f"{protocol_of(info)}, {info.tile_size} px", {n: results[n][split] for n in results})
        for split in reversed(evaluate_on)  # the test split, which is what readers look for, comes last in a run
    ]
    whole = {}
    if evaluations:
        protocol = find_protocol("auto", info)
        whole = {name: {last: protocol.scores(found.metrics)} for name, found in evaluations.items()}
        measured = [*_whole_image_results(info.name, last, protocol, evaluations), *measured]
        reference, counted = next(iter(evaluations["model"].metrics.items()))
        matrix, counted_on = counted.matrix, f"{last}: {_in_words(protocol, reference, evaluations['model'])}"

    profiled = {"model": models["model"].model}
    if "teacher" in models and _runs_on(models["teacher"].model, info.tile_size):
        profiled["teacher"] = models["teacher"].model
    costs = {
        row["model"]: row
        for row in profile_models(profiled, [info.tile_size], device=device, rounds=PROFILE_ROUNDS, memory=False)
    }
    run = {
        **run,
        "results": results,
        "whole_images": whole,
        "num_parameters": costs["model"]["parameters"],
        "milliseconds_per_tile": {
            "tile_size": info.tile_size,
            "milliseconds": costs["model"]["milliseconds"],
            "device": device_name(models["model"].model.device),
        },
        "profile": costs,
    }
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))
    try:
        title = f"{info.name}, {counted_on}"
        confusion_picture(matrix.tolist(), list(info.id2label.values()), title, staging / CONFUSION_NAME)
        curves = write_curves(staging / CURVES_NAME, run["log"], f"Training on {info.name}")
        examples = _write_examples(staging, scored, splits, last)
        facts = _facts(run, models, splits, origins, measured, costs)
        facts = replace(
            facts,
            confusion=title,
            curves=curves,
            examples=examples,
            comparison=(staging / COMPARISON_NAME).is_file(),
        )
        for name in ("figures", "examples"):
            _replace_folder(staging / name, folder / name, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    content = finish_record(folder, run, facts)
    (folder / TRAINED_NAME).unlink(missing_ok=True)
    return content


def finish_record(folder: str | os.PathLike, run: Mapping[str, Any], facts: ModelCardFacts) -> dict[str, Any]:
    """Write the card of `facts`, and after it `run.json`, with `run`, the facts, and by what the card is known again.

    Returns:
        What `run.json` holds.
    """
    kept = facts_to_json(facts)
    card = write_model_card(folder, facts_from_json(kept))
    content = {**run, CARD_KEY: kept, CARD_HASH_KEY: hashlib.sha256(card.read_bytes()).hexdigest()}
    write_record(Path(folder) / RUN_NAME, content)
    return content


def write_record(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that appears when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(finite_json(dict(content)), indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def training_curves(log: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Panels for `curves_picture` from the log of a training: the loss with its weighted terms, and validation mIoU.

    Of many terms a panel has as many as it can tell apart.
    """
    losses: dict[str, list] = {}
    scores: dict[str, list] = {}
    for entry in log:
        for name, value in entry.items():
            if not isinstance(value, (int, float)) or "step" not in entry:
                continue
            if name in ("loss", "task_loss") or name.endswith("_weighted"):
                title = {"loss": "loss", "task_loss": "from labels"}.get(name)
                title = title or f"{name.removesuffix('_weighted').replace('_', ' ')}, weighted"
                losses.setdefault(title, []).append((entry["step"], float(value)))
            elif name == "eval_mean_iou":
                scores.setdefault("mIoU", []).append((entry["step"], float(value)))
    panels = {"Training loss": losses, "Validation mIoU": scores}
    return {title: dict(islice(curves.items(), len(CURVE_COLORS))) for title, curves in panels.items() if curves}


def write_curves(path: Path, log: Sequence[Mapping[str, Any]], title: str) -> bool:
    """Draw what was logged; False, and no file, if that is nothing."""
    panels = training_curves(log)
    if panels:
        curves_picture(panels, "step", title, path)
    return bool(panels)


def ground_sampling_distance(splits: SegmentationSplits | StreamedSegmentationSplits) -> float | None:
    """Metres that a pixel of the tiles is wide, by the facts of the dataset or the georeference of its first tile."""
    info = splits.info
    known = known_dataset(info.name)
    if known and known.ground_sampling_distance:
        return known.ground_sampling_distance / info.scale
    if not info.georeferenced:
        return None
    first = next(iter(next(iter(splits.values())).with_format(None).select_columns(["crs", "transform"])), None)
    if not first or not first["crs"] or not first["transform"]:
        return None
    try:
        crs = rasterio.crs.CRS.from_user_input(first["crs"])
        metres = crs.linear_units_factor[1] if crs.is_projected else None
    except rasterio.errors.CRSError:
        return None
    a, b, _, d, e, _ = first["transform"]
    return metres and abs(a * e - b * d) ** 0.5 * metres


def known_dataset(name: str) -> DatasetFacts | None:
    """What is known about the dataset of this name beside what its prepared form says."""
    known = (POTSDAM.dataset, VAIHINGEN.dataset, CITYSCAPES.dataset, SCENES)
    return next((facts for facts in known if facts.name == name), None)


def _facts(run, models, splits, origins: Origins, measured, costs) -> ModelCardFacts:
    model, processor, info = models["model"].model, models["model"].processor, splits.info
    bands = bands_of(model.config) or ()
    _, mean, std, _ = normalization_of(processor)
    mean, std = ((values * len(bands))[: len(bands)] for values in (mean, std))  # one value may stand for all bands
    known, teacher = known_dataset(info.name), costs.get("teacher", {})
    teacher_id = hub_id(origins.teacher)
    return ModelCardFacts(
        model_name=origins.model_name,
        architecture=type(model).__name__,
        num_parameters=count_parameters(model),
        id2label=dict(info.id2label),
        colors=[list(color) for color in info.colors],
        colors_in_config=colors_of(model.config) == [tuple(color) for color in info.colors],
        bands=bands,
        image_mean=mean,
        image_std=std,
        license=origins.license,
        base_model=[origins.base_model] if hub_id(origins.base_model) else [],
        dataset_name=info.name,
        dataset_id=hub_id(origins.dataset),
        dataset_description=known and known.description,
        dataset_license="; ".join(filter(None, (info.license, info.terms))) or None,
        dataset_citation=known and known.citation,
        tile_size=info.tile_size,
        num_tiles=dict(info.num_tiles),
        ground_sampling_distance=ground_sampling_distance(splits),
        teacher=(teacher_id or last_part(origins.teacher)) if origins.teacher else None,
        teacher_id=teacher_id,
        teacher_num_parameters=count_parameters(models["teacher"].model) if "teacher" in models else None,
        results=measured,
        distillation=origins.distillation,
        dual_relation=any(name in (origins.distillation or ()) for name in DUAL_RELATION),
        training=_effective(_without_folders(run["settings"])),
        seed=run["seed"],
        steps=run["steps"],
        hardware=run["hardware"],
        versions=run["versions"],
        command=run["command"],
        profile=Profile(
            tile_size=info.tile_size,
            device=device_name(model.device),
            milliseconds=costs["model"]["milliseconds"],
            flops=costs["model"]["flops"],
            teacher_milliseconds=teacher.get("milliseconds"),
            teacher_flops=teacher.get("flops"),
        ),
    )


def _runs_on(model: PreTrainedModel, size: int) -> bool:
    """A teacher of features alone has seen crops in training, and need not take tiles."""
    try:
        require_size(model, size)
    except UserError:
        return False
    return True


def _result(dataset: str, split: str, protocol: str, metrics: Mapping[str, Mapping[str, float]]) -> MeasuredResult:
    return MeasuredResult(
        dataset, split, protocol, metrics["model"], metrics.get("teacher"), metrics.get("student_alone")
    )


def _whole_image_results(
    dataset: str, split: str, protocol: Protocol, evaluations: Mapping[str, SourceEvaluation]
) -> list[MeasuredResult]:
    """One result for each reference, with the means over each group of classes."""
    results = []
    for reference in evaluations["model"].metrics:
        start = f"{protocol.name}/{reference}/"
        metrics = {}
        for name, found in evaluations.items():
            scores = protocol.scores(found.metrics)
            keys = {key: key.removeprefix(start) for key in scores if key.startswith(start)}
            metrics[name] = {
                short if "/mean_" in short and len(protocol.groups) > 1 else short.partition("/")[2]: scores[key]
                for key, short in keys.items()
            }
        results.append(_result(dataset, split, _in_words(protocol, reference, evaluations["model"]), metrics))
    return results


def _in_words(protocol: Protocol, reference: str, evaluation: SourceEvaluation) -> str:
    named = [f"protocol {protocol.name}"] if protocol.name != "plain" else []
    if list(evaluation.metrics) != ["full"]:
        named.append(f"{reference} reference")
    return ", ".join([*named, evaluation.description])


def _write_examples(
    folder: Path,
    models: Mapping[str, TrainedModel],
    splits: SegmentationSplits | StreamedSegmentationSplits,
    split: str,
) -> list[Example]:
    """Tiles as JPEG files and a picture of what the models see in them, unless the terms forbid to hand the pixels on."""
    info = splits.info
    channels = {name: list(trained.channels or range(len(info.bands))) for name, trained in models.items()}
    bands = [info.bands[i] for i in channels["model"]]
    if info.may_be_shared is not True or len(bands) != 3:
        return []
    shown = {name: trained for name, trained in models.items() if channels[name] == channels["model"]}
    examples, rows = [], []
    (folder / "examples").mkdir()
    for number, tile in enumerate(_example_tiles(splits, split, bands), 1):
        path = f"examples/{split}_{number}.jpg"
        Image.fromarray(tile.image).save(folder / path, quality=90)
        examples.append(Example(path, tile.caption))
        if tile.label is not None:
            seen = [predict_image(t.model, t.processor, tile.image, info.tile_size) for t in shown.values()]
            rows.append([tile.image, tile.label, *seen])
    if rows:
        titles = ["image", "reference", *(COLUMNS[name] for name in shown)]
        comparison_picture(rows, titles, info.colors, info.id2label, folder / COMPARISON_NAME, EXAMPLE_CELL)
    return examples


def _example_tiles(splits, split: str, bands: list[str]) -> list[PreviewTile]:
    tiles = splits[split]
    if isinstance(tiles, IterableDataset):  # what its first files give
        rows = list(islice(undecoded(tiles), 8 * EXAMPLES))
        tiles = Dataset.from_list(rows, features=undecoded(tiles).features)
    return preview_tiles(SegmentationSplits({split: tiles}, splits.info), split, EXAMPLES, bands=bands)


def _without_folders(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which files and folders of this machine have their last name only."""
    return {
        name: last_part(value) if isinstance(value, str) and ("/" in value or "\\" in value) and os.path.exists(value) else value
        for name, value in settings.items()
    }  # fmt: skip


def _effective(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without the length of the training that had no effect: steps win over epochs."""
    without = "num_train_epochs" if settings.get("max_steps", -1) > 0 else "max_steps"
    return {name: value for name, value in settings.items() if name != without}


def _replace_folder(new: Path, final: Path, staging: Path) -> None:
    """`new` takes the place of `final`, which goes into `staging`; without `new` there is no `final` afterwards."""
    if final.exists():
        os.replace(final, staging / f"old_{final.name}")
    if new.exists():
        os.replace(new, final)


__all__ = [
    "Origins",
    "TrainedModel",
    "finish_record",
    "ground_sampling_distance",
    "measure_run",
    "training_curves",
    "write_curves",
    "write_record",
]
