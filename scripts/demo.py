"""The main job on generated scenes, in minutes on two CPU cores: train a teacher, train a student alone, distil the same
student on the same schedule, score the three on scenes that none of them has seen.

    python scripts/demo.py --output demo

It runs the same commands that real data needs, and prints them. The output folder holds the tiles, the three models (the
distilled student with its card), a table and pictures.
"""

import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from drd_hf import UserError, load_image_processor, load_splits, load_teacher
from drd_hf.arguments import parse_arguments
from drd_hf.data import EvalTransform, SegmentationCollator
from drd_hf.errors import run_script
from drd_hf.evaluation import milliseconds_per_tile
from drd_hf.models import count_parameters
from drd_hf.pictures import comparison_picture

HERE = Path(__file__).resolve().parent
STEPS = (
    "prepare_dataset.py --dataset scenes --output {out}/tiles --scenes_train 24 --scenes_validation 4 --scenes_test 16 "
    "--scene_size 384 --tile_size 192 --seed 0 --num_proc 2 --overwrite",
    "train_teacher.py --config {configs}/scenes_upernet-small.yaml --dataset {out}/tiles --output_dir {out}/teacher",
    "train_teacher.py --config {configs}/scenes_upernet-mini.yaml --dataset {out}/tiles --output_dir {out}/student_alone",
    "distill.py --config {configs}/scenes_upernet-mini_from_upernet-small.yaml --dataset {out}/tiles "
    "--teacher {out}/teacher --student_alone {out}/student_alone --output_dir {out}/student",
)
MODELS = {"teacher": "teacher", "student alone": "student_alone", "distilled student": "student"}


@dataclass
class DemoArguments:
    output: str = field(default="demo", metadata={"help": "Folder for everything that the demo makes."})
    max_steps: int | None = field(default=None, metadata={"help": "Cut all trainings short, to try the demo itself."})


def run_commands(output: Path, max_steps: int | None) -> None:
    for step in STEPS:
        script, *options = shlex.split(step.format(out=output, configs=HERE / "configs"))
        if not script.startswith("prepare"):
            options += ["--overwrite", "true", *(["--max_steps", str(max_steps)] if max_steps else [])]
        print(f"\n$ python scripts/{script} {shlex.join(options)}", flush=True)
        done = subprocess.run([sys.executable, str(HERE / script), *options])
        if done.returncode:
            raise UserError(f"scripts/{script} failed with status {done.returncode}, see above")


def table(output: Path, models: dict, tile_size: int) -> str:
    scores = json.loads((output / "student" / "run.json").read_text())["results"]
    keys = {"teacher": "teacher", "student alone": "student_alone", "distilled student": "model"}
    milliseconds = milliseconds_per_tile(models.values(), tile_size, "cpu")
    lines = ["| model | parameters | mIoU | mF1 | overall accuracy | ms per tile |", "|---|---:|---:|---:|---:|---:|"]
    for (name, model), ms in zip(models.items(), milliseconds, strict=True):
        test = scores[keys[name]]["test"]
        shown = " | ".join(f"{test[key]:.4f}" for key in ("mean_iou", "mean_f1", "overall_accuracy"))
        lines.append(f"| {name} | {count_parameters(model):,} | {shown} | {ms:.1f} |")
    return "\n".join(lines)


def pictures(output: Path, models: dict, splits, count: int = 6) -> Path:
    """Image, reference and the three predictions of evenly spaced test tiles."""
    test = splits["test"]
    rows = []
    for index in np.linspace(0, len(test) - 1, count).round().astype(int):
        item = test.select([int(index)]).with_transform(EvalTransform())[0]
        row = [item["image"].permute(1, 2, 0).numpy(), item["labels"].numpy()]
        for name, model in models.items():
            batch = SegmentationCollator(load_image_processor(str(output / MODELS[name])))([item])
            device = next(model.parameters()).device
            with torch.inference_mode():
                logits = model(pixel_values=batch["pixel_values"].to(device)).logits
            logits = torch.nn.functional.interpolate(logits, size=item["labels"].shape, mode="bilinear")
            row.append(logits.argmax(1)[0].to(torch.uint8).cpu().numpy())
        rows.append(row)
    titles = ["image", "reference", *models]
    return comparison_picture(rows, titles, splits.info.colors, splits.info.id2label, output / "comparison.png")


def main() -> None:
    (args,) = parse_arguments(DemoArguments, description=__doc__)
    output, start = Path(args.output), time.monotonic()
    if output.exists() and any(output.iterdir()) and not (output / "tiles").is_dir():
        raise UserError(f"{output} holds something else: choose another --output")
    run_commands(output, args.max_steps)

    splits = load_splits(output / "tiles")
    models = {name: load_teacher(str(output / folder)) for name, folder in MODELS.items()}
    picture = pictures(output, models, splits)
    text = table(output, models, splits.info.tile_size)
    (output / "results.md.tmp").write_text(text + "\n")
    os.replace(output / "results.md.tmp", output / "results.md")
    print(f"\nScores on the test scenes ({splits.info.num_tiles['test']} tiles, each pixel once):\n\n{text}\n")
    print(f"pictures: {picture}\nmodel and card: {output / 'student'}\n{time.monotonic() - start:.0f} s in all")


if __name__ == "__main__":
    run_script(main)
