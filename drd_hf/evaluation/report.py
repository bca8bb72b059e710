"""What an evaluation says: a table, JSON, plots, and a folder that appears when all of it is there."""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState

from drd_hf.data.splits import SegmentationInfo
from drd_hf.errors import UserError
from drd_hf.evaluation.protocols import Protocol, distance_label
from drd_hf.evaluation.sources import JoinedSource
from drd_hf.evaluation.tiles import finite_json
from drd_hf.evaluation.whole import SourceEvaluation
from drd_hf.plots import bars_picture, confusion_picture, errors_picture

SCORES_NAME = "scores.json"


def join_processes(device: str | None) -> PartialState | None:
    """The processes of `accelerate launch` or `torchrun`; None if this one is alone."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return None
    cpu = str(device).startswith("cpu") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu, timeout=timedelta(days=30))  # the others may wait for one that has large images


def check_output(output: str | Path, overwrite: bool) -> None:
    """Refuse a file or folder that cannot be written, or that is there already. Changes nothing.

    Raises:
        UserError: its parent folder does not exist or is not for writing; it is there and `overwrite` is false or it is no evaluation.
    """
    output = Path(output)
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist")
    if not os.access(output.resolve().parent, os.W_OK):
        raise UserError(f"--output {output}: its folder cannot be written")
    if output.suffix == ".json":
        if output.is_dir():
            raise UserError(f"--output {output}: is a folder; a name that ends in .json is a file of scores")
    elif output.exists() and not (output.is_dir() and not any(output.iterdir())):
        if not (output / SCORES_NAME).is_file():
            raise UserError(f"--output {output}: is there and is no evaluation: give another name")
        if not overwrite:
            raise UserError(f"--output {output}: is there already: give --overwrite true or another name")


@contextmanager
def output_errors(output: str | Path) -> Iterator[None]:
    """A full disk, a lack of rights and the like become a `UserError` that names the output."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from error


@contextmanager
def staged_folder(output: str | Path, state: PartialState | None = None) -> Iterator[Path]:
    """A folder beside `output` to write into; it takes the place of `output` when the block ends without an error.

    All processes get the same one; the main process makes and moves it. What an interrupted run left in it is removed.
    """
    output = Path(output)
    is_main = state is None or state.is_main_process
    staging = output.with_name(f".{output.name}.unfinished")
    if is_main:
        shutil.rmtree(staging, ignore_errors=True)
        with output_errors(output):
            staging.mkdir()
    if state is not None:
        state.wait_for_everyone()
    try:
        yield staging
        if state is not None:
            state.wait_for_everyone()
        if is_main:
            old = output.with_name(f".{output.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            with output_errors(output):
                if output.exists():
                    os.replace(output, old)
                os.replace(staging, output)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if is_main:
            shutil.rmtree(staging, ignore_errors=True)


def write_scores(path: Path, content: dict) -> None:
    """JSON that appears when it is whole; the scores of classes that do not occur are null."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with output_errors(path):
            temporary.write_text(json.dumps(finite_json(content), indent=1) + "\n", encoding="utf-8")
            os.replace(temporary, path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def report(evaluation: SourceEvaluation, protocol: Protocol, info: SegmentationInfo, split: str) -> dict:
    """Everything that was counted, under keys that say the protocol."""
    return {
        "dataset": info.name,
        "split": split,
        "protocol": protocol.name,
        "counted": evaluation.description,
        "tile_size": info.tile_size,
        "scale": info.scale,
        "classes": list(info.id2label.values()),
        "scores": protocol.scores(evaluation.metrics, evaluation.outlines),
        "confusion_matrices": {
            f"{protocol.name}/{name}": counted.matrix.tolist() for name, counted in evaluation.metrics.items()
        },
        "sources": [
            {
                "name": source.name,
                "height": source.height,
                "width": source.width,
                "filled_pixels": source.filled_pixels,
                **{
                    f"{protocol.name}/{name}/overall_accuracy": value
                    for name, value in source.overall_accuracy.items()
                },
            }
            for source in evaluation.sources
        ],
        "unlabelled_sources": list(evaluation.unlabelled),
    }


def print_report(evaluation: SourceEvaluation, protocol: Protocol, info: SegmentationInfo, split: str) -> None:
    """Table of the scores, under what was counted."""
    number = len(evaluation.sources)
    images = f", {number} image{'s' * (number != 1)}" if number else ""
    print(f"{info.name} {split}{images}; {evaluation.description}")
    if filled := [source.filled_pixels for source in evaluation.sources if source.filled_pixels]:
        print(f"{sum(filled)} unlabelled pixels of {len(filled)} images are in no tile; mean colour stands for them")
    if unlabelled := evaluation.unlabelled:
        print(f"without labels, left out: {', '.join(unlabelled[:5])}{', ...' * (len(unlabelled) > 5)}")
    print(f"\n{score_table(evaluation, protocol, info)}")


def write_report(
    path: Path, evaluation: SourceEvaluation, protocol: Protocol, info: SegmentationInfo, split: str
) -> None:
    """`scores.json` and the plots into a folder, or the scores alone into a file whose name ends in .json."""
    content = report(evaluation, protocol, info, split)
    if path.suffix == ".json":
        write_scores(path, content)
    else:
        write_scores(path / SCORES_NAME, content)
        with output_errors(path):
            write_plots(path, evaluation, protocol, info)


def score_table(evaluation: SourceEvaluation, protocol: Protocol, info: SegmentationInfo) -> str:
    """The scores for people: for each reference a line per class, then the means."""
    scores = protocol.scores(evaluation.metrics, evaluation.outlines)
    classes, everything = list(info.id2label.values()), list(protocol.groups)[-1]
    lines = []
    for reference in evaluation.metrics:
        start = f"{protocol.name}/{reference}"
        columns = [("IoU", "iou", ""), ("F1", "f1", ""), ("accuracy", "accuracy", "")]
        if outline := evaluation.outlines.get(reference):
            distance = distance_label(outline.distance)
            columns.append((f"boundary IoU {distance}", "boundary_iou", f"_{distance}"))
        rows = [(name, [f"{everything}/{key}_{name}{end}" for _, key, end in columns]) for name in classes]
        for group in protocol.groups:
            rows.append(
                (f"mean of {group.replace('_', ' ')}", [f"{group}/mean_{key}{end}" for _, key, end in columns])
            )
        rows += [("overall accuracy", [f"{everything}/overall_accuracy"]), ("kappa", [f"{everything}/kappa"])]
        width = max(len(title) for title, _ in (*rows, (start, ()))) + 2
        widths = [max(len(title), 6) + 2 for title, _, _ in columns]
        lines.append(f"{start:{width}}" + "".join(f"{c[0]:>{w}}" for c, w in zip(columns, widths, strict=True)))
        for title, keys in rows:
            values = (f"{scores[f'{start}/{key}']:{w}.4f}" for key, w in zip(keys, widths, strict=False))
            lines.append(f"{title:{width}}" + "".join(values))
        lines.append("")
    return "\n".join(lines[:-1])


def write_plots(folder: Path, evaluation: SourceEvaluation, protocol: Protocol, info: SegmentationInfo) -> None:
    """`confusion_REFERENCE.png` and `classes_REFERENCE.png` for each reference."""
    names = list(info.id2label.values())
    for reference, counted in evaluation.metrics.items():
        what = f"{protocol.name}/{reference}"
        confusion_picture(
            counted.matrix.tolist(),
            names,
            f"{info.name}, {what}: percent of the pixels of each reference class",
            folder / f"confusion_{reference}.png",
        )
        found = counted.compute(per_category=True)
        bars = {"IoU": found["per_category_iou"], "F1": found["per_category_f1"]}
        if outline := evaluation.outlines.get(reference):
            values = outline.compute()
            bars[f"boundary IoU {distance_label(outline.distance)}"] = [
                values[f"boundary_iou_{name}"] for name in names
            ]
        bars_picture(bars, names, info.colors, f"{info.name}, {what}", folder / f"classes_{reference}.png")


def write_source_picture(
    folder: Path, source: JoinedSource, prediction: np.ndarray, column: str, info: SegmentationInfo
) -> Path:
    """`sources/NUMBER_NAME.png`: image, reference, prediction and errors."""
    reference = source.references[column]
    if reference is None:
        reference = next(label for label in source.references.values() if label is not None)
    image = source.image[..., :3] if source.image.shape[2] >= 3 else np.repeat(source.image[..., :1], 3, axis=2)
    name = re.sub(r"[^\w.-]+", "_", source.name)[-100:]
    path = folder / "sources" / f"{source.number:04d}_{name}.png"
    with output_errors(path):
        return errors_picture(image, reference, prediction, info.colors, info.id2label, source.name, path)


def without_empty(evaluation: SourceEvaluation, chosen: str | None, what: str) -> SourceEvaluation:
    """The evaluation without references that have no labelled pixel.

    Raises:
        UserError: such a reference was chosen by name, or all are so.
    """
    empty = [name for name, counted in evaluation.metrics.items() if not counted.matrix.any()]
    if empty and (chosen is not None or len(empty) == len(evaluation.metrics)):
        raise UserError(f"{what}: no pixel has a label in the {' or the '.join(empty)} reference, nothing to score")
    kept = {name: counted for name, counted in evaluation.metrics.items() if name not in empty}
    outlines = {name: counted for name, counted in evaluation.outlines.items() if name in kept}
    return replace(evaluation, metrics=kept, outlines=outlines)
