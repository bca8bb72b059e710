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
from drd_hf.runs import versions

HERE = Path(__file__).resolve().parent
STEPS = (
    "prepare_dataset.py --dataset scenes --output {out}/tiles --scenes_train 24 --scenes_validation 4 --scenes_test 16 "
    "--scene_size 384 --tile_size 192 --seed 0 --num_proc 2 --overwrite",
    "train_teacher.py --config {configs}/scenes_upernet-small.yaml --dataset {out}/tiles --output_dir {out}/teacher",
    "train_teacher.py --config {configs}/scenes_upernet-mini.yaml --dataset {out}/tiles --output_dir {out}/student_alone",
    "distill.py --config {configs}/scenes_upernet-mini_from_upernet-small.yaml --dataset {out}/tiles "
    "--teacher {out}/teacher --student_alone {out}/student_alone --output_dir {out}/student",
)
SHOWN = ("mean_iou", "mean_f1", "overall_accuracy")
MODELS = {"teacher": "teacher", "student alone": "student_alone", "distilled student": "student"}


@dataclass
class DemoArguments:
    output: str = field(default="demo", metadata={"help": "Folder for everything that the demo makes."})
    seed: int = field(default=0, metadata={"help": "Seed of the three trainings; the scenes stay the same."})
    max_steps: int | None = field(default=None, metadata={"help": "Cut all trainings short, to try the demo itself."})


def run_commands(output: Path, seed: int, max_steps: int | None) -> None:
    for step in STEPS:
        script, *options = shlex.split(step.format(out=output, configs=os.path.relpath(HERE / "configs")))
        if not script.startswith("prepare"):
            options += ["--seed", str(seed), "--overwrite", "true"]
            options += ["--max_steps", str(max_steps)] if max_steps else []
        print(f"\n$ python scripts/{script} {shlex.join(options)}", flush=True)
        done = subprocess.run([sys.executable, str(HERE / script), *options])
        if done.returncode:
            raise UserError(f"scripts/{script} failed with status {done.returncode}, see above")


def measure(output: Path, models: dict, tile_size: int) -> list[dict]:
    """One row per model: its scores on the test scenes, size and speed."""
    scores = json.loads((output / "student" / "run.json").read_text())["results"]
    keys = {"teacher": "teacher", "student alone": "student_alone", "distilled student": "model"}
    milliseconds = milliseconds_per_tile(models.values(), tile_size, "cpu")
    return [
        {
            "model": name,
            "parameters": count_parameters(model),
            **{key: scores[keys[name]]["test"][key] for key in SHOWN},
            "ms_per_tile": ms,
        }
        for (name, model), ms in zip(models.items(), milliseconds, strict=True)
    ]


def table(rows: list[dict]) -> str:
    lines = ["| model | parameters | mIoU | mF1 | overall accuracy | ms per tile |", "|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        shown = " | ".join(f"{row[key]:.4f}" for key in SHOWN)
        lines.append(f"| {row['model']} | {row['parameters']:,} | {shown} | {row['ms_per_tile']:.1f} |")
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
    run_commands(output, args.seed, args.max_steps)

    splits = load_splits(output / "tiles")
    models = {name: load_teacher(str(output / folder)) for name, folder in MODELS.items()}
    picture = pictures(output, models, splits)
    rows = measure(output, models, splits.info.tile_size)
    seconds = time.monotonic() - start
    report = {
        "tiles": f"{splits.info.num_tiles['test']} test tiles of {splits.info.tile_size} px, each pixel once",
        "seed": args.seed,
        "rows": rows,
        "seconds": round(seconds),
        "versions": versions(),
    }
    for name, text in (("results.json", json.dumps(report, indent=1)), ("results.md", table(rows))):
        (output / f"{name}.tmp").write_text(text + "\n")
        os.replace(output / f"{name}.tmp", output / name)
    print(f"\nScores on {report['tiles']}:\n\n{table(rows)}\n")
    print(f"pictures: {picture}\nmodel and card: {output / 'student'}\n{seconds:.0f} s in all")


if __name__ == "__main__":
    run_script(main)
