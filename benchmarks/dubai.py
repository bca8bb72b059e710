"""Student alone, with logit distillation, with Dual Relation Distillation, and with both, on aerial_dubai.

    python benchmarks/dubai.py                       # prepares, trains what is missing, writes benchmarks/results/dubai.json
    python benchmarks/dubai.py --collect_only        # only reads finished runs

Runs that are finished are not repeated. Every run is one of the commands that the result names; the teacher is trained
once. Weights were chosen on the validation tile, see benchmarks/results/dubai_choice.json.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "../shared/data/aerial_dubai"
TEACHER = "runs/dubai/upernet-lite2"
ALONE = "scripts/configs/dubai_segformer-b0-half.yaml"
DISTILL = "scripts/configs/dubai_segformer-b0-half_from_upernet-lite2.yaml"
# Options that differ from the recipe; the relation weights of the recipe are those of `drd`.
METHODS = {
    "none": None,
    "logit": "--spatial_relation_weight 0 --channel_relation_weight 0 --logit_weight 1",
    "drd": "",
    "drd_logit": "--logit_weight 1",
}
REPORTED = ("mean_iou", "mean_f1", "overall_accuracy", "kappa")


def command_of(method: str, seed: int, steps: int) -> str:
    options = METHODS[method]
    script, config = ("train_teacher", ALONE) if options is None else ("distill", DISTILL)
    words = f"scripts/{script}.py --config {config} {options or ''} --seed {seed} --max_steps {steps}"
    return " ".join(f"python {words} --output_dir runs/dubai/{method}_steps{steps}_seed{seed}".split())


def run(command: str) -> None:
    print(f"$ {command}", flush=True)
    words = shlex.split(command)
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, check=True)


def entry(folder: str) -> dict | None:
    path = ROOT / folder / "run.json"
    if not path.is_file():
        return None
    run = json.loads(path.read_text())
    scores = {
        f"{split}_{name}": value
        for split, values in run["results"]["model"].items()
        for name, value in values.items()
        if name in REPORTED or name.startswith("iou_")
    }
    kept = ("seed", "steps", "seconds", "num_parameters", "milliseconds_per_tile", "settings", "versions")
    return {**scores, **{name: run[name] for name in kept}, "command": run["command"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--collect_only", action="store_true")
    parser.add_argument("--output", default="benchmarks/results/dubai.json")
    args = parser.parse_args()

    prepare = (
        f"python scripts/prepare_dataset.py --dataset folder --source {SOURCE} --layout {SOURCE}.yaml "
        "--output data/dubai --tile_size 256 --scale 0.5"
    )
    teacher = "python scripts/train_teacher.py --config scripts/configs/dubai_upernet-lite2.yaml"
    if not args.collect_only:
        if not (ROOT / "data/dubai/README.md").is_file():
            run(prepare)
        if not (ROOT / TEACHER / "run.json").is_file():
            run(teacher)
    results = []
    for seed in args.seeds:
        for method in METHODS:
            command = command_of(method, seed, args.steps)
            folder = f"runs/dubai/{method}_steps{args.steps}_seed{seed}"
            if not args.collect_only and not (ROOT / folder / "run.json").is_file():
                run(f"{command} --overwrite true --disable_tqdm true")
            found = entry(folder)
            if found:
                results.append({"method": method, **found})
    report = {
        "dataset": "aerial_dubai, half resolution, tiles of 256, train 1 2 3 5 7, validation 4, test 6 8",
        "pair": "UperNet EfficientNet-Lite2 (ImageNet) -> SegFormer of half B0 width (random values)",
        "prepare": prepare,
        "teacher": entry(TEACHER),
        "runs": results,
    }
    path = ROOT / args.output
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, path)

    print(f"\n{'method':10} {'seed':>4} {'val mIoU':>9} {'test mIoU':>10} {'test mF1':>9} {'test OA':>8}")
    rows = [("teacher", report["teacher"])] if report["teacher"] else []
    for method, row in rows + [(r["method"], r) for r in results]:
        columns = (
            row.get(key, float("nan"))
            for key in ("validation_mean_iou", "test_mean_iou", "test_mean_f1", "test_overall_accuracy")
        )
        print(f"{method:10} {row['seed']:4} " + " ".join(f"{v:9.4f}" for v in columns))


if __name__ == "__main__":
    main()
