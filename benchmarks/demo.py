"""The students of the demo with further seeds, under the demo's teacher: is the gain more than chance?

    make demo && python benchmarks/demo.py --demo demo     # writes benchmarks/results/demo.json

Trains what is missing beside the demo's own models; finished runs are not repeated.
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
CONFIGS = "scripts/configs/scenes_upernet-mini"
KEPT = ("mean_iou", "mean_f1", "overall_accuracy")


def commands(demo: str, seed: int) -> dict[str, str]:
    data, suffix = f"--dataset {demo}/tiles --seed {seed}", f"_seed{seed}" if seed else ""
    alone = f"{demo}/student_alone{suffix}"
    return {
        alone: f"python scripts/train_teacher.py --config {CONFIGS}.yaml {data} --output_dir {alone}",
        f"{demo}/student{suffix}": f"python scripts/distill.py --config {CONFIGS}_from_upernet-small.yaml {data} "
        f"--teacher {demo}/teacher --student_alone {alone} --output_dir {demo}/student{suffix}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default="demo", help="output folder of the demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    demo = Path(args.demo, "results.json")
    if not demo.is_file() or json.loads(demo.read_text())["seed"] != 0:
        sys.exit(f"error: {args.demo} holds no finished demo of seed 0, run make demo first")
    teacher = Path(args.demo, "teacher", "run.json").stat().st_mtime

    rows = []
    for seed in args.seeds:
        of_seed = commands(args.demo, seed)
        for folder, command in of_seed.items():
            finished = Path(folder, "run.json")
            if not finished.is_file() or finished.stat().st_mtime < teacher:
                command += " --overwrite true"
                print(f"$ {command}", flush=True)
                words = [
                    str(ROOT / word) if word.startswith("scripts/") else word for word in shlex.split(command)[1:]
                ]
                subprocess.run([sys.executable, *words], check=True)
        results = json.loads(Path(list(of_seed)[1], "run.json").read_text())["results"]
        rows += [
            {"seed": seed, "method": method, **{key: results[name]["test"][key] for key in KEPT}}
            for method, name in (("student alone", "student_alone"), ("distilled student", "model"))
        ]
    means = {
        method: {key: statistics.mean(row[key] for row in rows if row["method"] == method) for key in KEPT}
        for method in ("student alone", "distilled student")
    }
    report = {
        "demo": json.loads(Path(args.demo, "results.json").read_text()),
        "means": means,
        "runs": rows,
        "commands": [command for seed in args.seeds for command in commands("demo", seed).values()],
    }
    path = ROOT / "benchmarks/results/demo.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(path.with_suffix(".tmp"), path)
    print(f"{'seed':>4} {'method':20}" + "".join(f"{key.replace('_', ' '):>18}" for key in KEPT))
    for row in [*rows, *({"seed": "mean", "method": method, **scores} for method, scores in means.items())]:
        print(f"{row['seed']:>4} {row['method']:20}" + "".join(f"{row[key]:18.4f}" for key in KEPT))


if __name__ == "__main__":
    main()
