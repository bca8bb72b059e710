"""Student alone, with the default, with the plain form of relations, with logit distillation, and with both, on aerial_dubai.

    python benchmarks/dubai.py choose     # candidates on the validation tile -> benchmarks/results/dubai_choice.json
    python benchmarks/dubai.py            # the comparison on the test tiles  -> benchmarks/results/dubai.json
    python benchmarks/dubai.py --collect_only

Trains what is missing, with the commands that the results name; finished runs are not repeated. Weights and layers are
chosen with one seed on the validation tile alone; the test tiles are scored only for the comparison.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "../shared/data/aerial_dubai"
PREPARE = (
    f"python scripts/prepare_dataset.py --dataset folder --source {SOURCE} --layout {SOURCE}.yaml "
    "--output data/dubai --tile_size 256 --scale 0.5"
)
TEACHER = "python scripts/train_teacher.py --config scripts/configs/dubai_upernet-lite2.yaml"
TEACHER_FOLDER = "runs/dubai/upernet-lite2"
ALONE = "scripts/configs/dubai_segformer-b0-half.yaml"
DISTILL = "scripts/configs/dubai_segformer-b0-half_from_upernet-lite2.yaml"


def weights(spatial: float, channel: float, logit: float = 0) -> str:
    return f"--spatial_relation_weight {spatial} --channel_relation_weight {channel} --logit_weight {logit}"


AFTER_RELU = "--feature_layers decode_head.activation=decode_head.fpn_bottleneck"
CANDIDATES = {
    "none": None,
    "drd_3_3": weights(3, 3),
    "drd_10_10": weights(10, 10),
    "drd_10_0": weights(10, 0),
    "drd_10_10_after_relu": f"{weights(10, 10)} {AFTER_RELU}",
}
METHODS = {
    "none": None,
    "default": "--method drd_channels drd_classes",  # of distill.py
    "logit": weights(0, 0, 1),
    "drd_3_3": weights(3, 3),
    "drd_3_3_logit": weights(3, 3, 1),
}
REPORTED = ("mean_iou", "mean_f1", "overall_accuracy", "kappa")


def folder_of(method: str, seed: int, steps: int) -> str:
    return f"runs/dubai/{method}_steps{steps}_seed{seed}"


def command_of(method: str, seed: int, steps: int) -> str:
    options = {**CANDIDATES, **METHODS}[method]
    script, config = ("train_teacher", ALONE) if options is None else ("distill", DISTILL)
    words = f"python scripts/{script}.py --config {config} {options or ''} --seed {seed} --max_steps {steps}"
    return " ".join(f"{words} --output_dir {folder_of(method, seed, steps)}".split())


def run(command: str) -> None:
    print(f"$ {command}", flush=True)
    subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, check=True)


def train_missing(methods, seeds, steps) -> None:
    if not (ROOT / "data/dubai/README.md").is_file():
        run(PREPARE)
    if not (ROOT / TEACHER_FOLDER / "run.json").is_file():
        run(TEACHER)
    for seed in seeds:
        for method in methods:
            if not (ROOT / folder_of(method, seed, steps) / "run.json").is_file():
                run(f"{command_of(method, seed, steps)} --overwrite true --disable_tqdm true")


def score_on_test(folder: str) -> None:
    scores, finished = ROOT / folder / "test.json", ROOT / folder / "run.json"
    if not scores.is_file() or scores.stat().st_mtime < finished.stat().st_mtime:
        run(
            f"python scripts/evaluate.py --model {folder} --dataset data/dubai --split test --windows tiles "
            f"--output {folder}/test.json"
        )


def entry(folder: str, with_test: bool) -> dict | None:
    """What a finished run measured, with the command that it was."""
    if not (ROOT / folder / "run.json").is_file():
        return None
    run = json.loads((ROOT / folder / "run.json").read_text())
    by_split = {"validation": run["results"]["model"]["validation"]}
    if with_test:
        scores = json.loads((ROOT / folder / "test.json").read_text())["scores"]
        by_split["test"] = {name.rpartition("/")[2]: value for name, value in scores.items()}  # without the protocol
    scores = {
        f"{split}_{name}": value
        for split, values in by_split.items()
        for name, value in values.items()
        if name in REPORTED or name.startswith("iou_")
    }
    kept = ("seed", "steps", "seconds", "num_parameters", "milliseconds_per_tile", "settings", "versions", "command")
    return {**scores, **{name: run.get(name) for name in kept}}


def print_table(rows: list[dict], columns: tuple[str, ...]) -> None:
    print("\n" + f"{'method':22}{'seed':>5}" + "".join(f"{c.replace('_', ' '):>30}" for c in columns))
    for row in rows:
        print(f"{row['method']:22}{row['seed']:5}" + "".join(f"{row[c]:30.4f}" for c in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=("choose", "compare"), default="compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--collect_only", action="store_true", help="train nothing, write what is finished")
    args = parser.parse_args()
    choosing = args.stage == "choose"
    methods, seeds = (CANDIDATES, [0]) if choosing else (METHODS, args.seeds)
    if not args.collect_only:
        train_missing(methods, seeds, args.steps)

    rows = []
    for method in methods:
        for seed in seeds:
            folder = folder_of(method, seed, args.steps)
            if not choosing and (ROOT / folder / "run.json").is_file():
                score_on_test(folder)
            found = entry(folder, with_test=not choosing)
            if found:
                rows.append({"method": method, **found})
    report = {
        "dataset": "aerial_dubai, half resolution, tiles of 256, train 1 2 3 5 7, validation 4, test 6 8",
        "pair": "UperNet EfficientNet-Lite2 (ImageNet) -> SegFormer of half B0 width (random values)",
        "prepare": PREPARE,
        "teacher_command": TEACHER,
    }
    columns = ("validation_mean_iou", "validation_overall_accuracy")
    if not choosing:
        score_on_test(TEACHER_FOLDER)
        report["teacher"] = entry(TEACHER_FOLDER, with_test=True)
        columns = ("validation_mean_iou", "test_mean_iou", "test_mean_f1", "test_overall_accuracy")
        report["test_mean_iou_over_seeds"] = {
            method: statistics.mean(r["test_mean_iou"] for r in rows if r["method"] == method)
            for method in dict.fromkeys(r["method"] for r in rows)
        }
    report["runs"] = rows
    path = ROOT / "benchmarks/results" / ("dubai_choice.json" if choosing else "dubai.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)
    teacher = [] if choosing else [{"method": "teacher", **report["teacher"]}]
    print_table(teacher + rows, columns)


if __name__ == "__main__":
    main()
