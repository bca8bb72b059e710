"""Compare distillation methods: a matrix of method x pair x fold x seed, from one study file.

    python benchmarks/compare.py benchmarks/study/dubai.yaml                   # tune, compare, collect; again to go on
    python benchmarks/compare.py benchmarks/study/dubai.yaml --stage tune      # weights, on validation alone
    python benchmarks/compare.py benchmarks/study/dubai.yaml --stage compare --methods none drd kd --folds 0 --seeds 0 1
    python benchmarks/compare.py benchmarks/study/dubai.yaml --stage collect   # tables and plots from the lines
    python benchmarks/compare.py benchmarks/study/potsdam.yaml --dry_run       # the commands

Every finished run is one line of benchmarks/results/compare.jsonl (compare_tuning.jsonl while weights are chosen), with
its command; an interrupted one leaves none and is repeated. Several runners may work at one study at the same time.
Weights are chosen on the validation split with one seed; the test split is scored by the stages compare and ablate.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.study.cells import is_finished, run_cells  # noqa: E402
from benchmarks.study.lines import ROOT, append_line, finished, read_lines  # noqa: E402
from benchmarks.study.plan import Cell, Method, Study, candidates, choose, read_study, student_cell  # noqa: E402
from benchmarks.study.tables import collect  # noqa: E402
from drd_hf.errors import UserError, run_script  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
STAGES = ("tune", "compare", "ablate", "collect")


def chosen_weight(study: Study, pair: str, method: Method, results: Path) -> float | None:
    """The candidate with the highest mean IoU on validation; None where a method has nothing to choose.

    Raises:
        UserError: not all of its runs are finished, or all of them diverged.
    """
    if method.weight is not None or "{weight}" not in method.options:
        return method.weight
    if method.like is not None:
        return chosen_weight(study, pair, (study.methods | study.ablations)[method.like], results)
    lines = finished(results / "compare_tuning.jsonl")
    cells = candidates(study, pair, method, ROOT)
    if any(cell.command not in lines for cell in cells):
        raise UserError(
            f"the weight of {method.name} for {pair} is not chosen yet: run --stage tune, or give `weight`"
        )
    scores = {cell.facts["weight"]: lines[cell.command].get("validation_mean_iou") for cell in cells}
    scores = {weight: score for weight, score in scores.items() if score is not None}
    if not scores:
        raise UserError(f"{method.name} diverged with every one of its weights for {pair}: give smaller ones")
    return max(scores, key=scores.get)


def record_choices(study: Study, pairs: list[str], methods: list[Method], results: Path) -> None:
    """Add what was chosen to the lines of the tuning runs, unless it stands there already."""
    path = results / "compare_tuning.jsonl"
    known = read_lines(path)
    for pair in pairs:
        for method in methods:
            if not candidates(study, pair, method, ROOT):
                continue
            weight = chosen_weight(study, pair, method, results)
            lines, scores = finished(path), {}
            for cell in candidates(study, pair, method, ROOT):
                scores[f"{cell.facts['weight']:g}"] = lines[cell.command].get("validation_mean_iou")
            choice = {
                "study": study.name,
                "dataset": study.dataset,
                "pair": pair,
                "method": method.name,
                **study.tuning,
            }
            choice |= {"chosen_weight": weight, "validation_mean_iou_by_weight": scores}
            if choice not in known:
                append_line(path, choice)
            print(f"{pair}: {method.name} weight {weight:g} of {scores}")


def students(study: Study, args, results: Path, stage: str) -> list[Cell]:
    """The runs of a stage, seed by seed and fold by fold, so that what is finished early can be compared."""
    if stage == "compare":
        known, limits = study.methods, {}
    else:
        known, limits = study.ablations, study.ablation_of
    methods = [known[name] for name in known if args.methods is None or name in args.methods]
    pairs = choose(study.pairs, args.pairs or limits.get("pairs"), "pairs")
    folds = choose(range(len(study.folds)), args.folds or limits.get("folds"), "folds")
    seeds = args.seeds or limits.get("seeds") or study.seeds
    return [
        student_cell(study, pair, method, chosen_weight(study, pair, method, results), fold, seed, ROOT, stage)
        for seed in seeds
        for fold in folds
        for pair in pairs
        for method in methods
    ]


def show(cells: list[Cell], results: Path) -> None:
    for cell in dict.fromkeys(c for one in cells for c in (one.teacher, one) if c is not None):
        print(f"# {cell.title}{' (finished)' if is_finished(cell, results) else ''}\n{cell.command}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("study", type=Path, help="study file, see benchmarks/study/*.yaml")
    add("--stage", choices=STAGES, nargs="+", default=["tune", "compare", "collect"], help="default: all but ablate")
    add("--pairs", nargs="+", help="pairs of the study (default: all)")
    add("--methods", nargs="+", help="methods of the study or its ablations (default: all)")
    add("--folds", nargs="+", type=int, help="folds, from 0 (default: all)")
    add("--seeds", nargs="+", type=int, help="seeds of the students (default: the study's)")
    add("--steps", type=int, help="steps of the students, instead of the study's")
    add("--results", type=Path, default=RESULTS, help="folder of the lines, tables and plots")
    add("--discard_models", action="store_true", help="keep of a finished student only its run.json")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    study, results = read_study(args.study, args.steps), args.results.resolve()
    choose(study.methods | study.ablations, args.methods, "--methods")
    choose(range(len(study.folds)), args.folds, "--folds")
    choose(study.pairs, args.pairs, "--pairs")
    failed = []
    for stage in (stage for stage in STAGES if stage in args.stage):
        if stage == "collect":
            collect(results)
            continue
        known = study.ablations if stage == "ablate" else study.methods
        methods = [known[name] for name in known if args.methods is None or name in args.methods]
        if stage != "compare":  # ablations choose weights too, where they have candidates of their own
            over = choose(
                study.pairs, args.pairs or (stage == "ablate" and study.ablation_of.get("pairs")) or None, "pairs"
            )
            cells = [cell for pair in over for method in methods for cell in candidates(study, pair, method, ROOT)]
            if args.dry_run:
                show(cells, results)
            else:
                print(f"{study.name}, weights: ", end="", flush=True)
                if failed := run_cells(study, cells, results, args.discard_models):
                    break
                record_choices(study, over, methods, results)
        if stage != "tune":
            cells = students(study, args, results, stage)
            if args.dry_run:
                show(cells, results)
            else:
                print(f"{study.name}, {stage}: ", end="", flush=True)
                failed += run_cells(study, cells, results, args.discard_models)
    if failed:
        raise UserError(f"{len(failed)} runs failed; first {failed[0]}; the same command repeats them")


if __name__ == "__main__":
    run_script(main)
