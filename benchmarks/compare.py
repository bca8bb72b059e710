"""Compare distillation methods: a matrix of method x pair x fold x seed, from one study file.

    python benchmarks/compare.py benchmarks/study/dubai.yaml                   # tune, compare, collect; again to go on
    python benchmarks/compare.py benchmarks/study/dubai.yaml --max_hours 3     # a slice of it
    python benchmarks/compare.py benchmarks/study/dubai.yaml --stage tune      # weights, on validation alone
    python benchmarks/compare.py benchmarks/study/dubai.yaml --stage compare --methods none drd kd --folds 0 --seeds 0 1
    python benchmarks/compare.py benchmarks/study/dubai.yaml --stage collect   # tables and plots from the lines
    python benchmarks/compare.py benchmarks/study/potsdam.yaml --dry_run       # the commands

Every finished run is one line of benchmarks/results/compare.jsonl (compare_tuning.jsonl while weights are chosen), with
its command; an interrupted one leaves none and is repeated. Several runners may work at one study at the same time.
Students of earlier lines need their teacher: where it is not, `--results FOLDER` starts anew.
Weights are chosen on the validation split; the test split is scored by the stages compare and ablate.
Each method is tuned and then trained once, so that all can be compared early; further folds and seeds follow, pair by pair.
"""

import argparse
import math
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.study.cells import is_finished, run_cells  # noqa: E402
from benchmarks.study.lines import ROOT, append_line, finished, read_lines  # noqa: E402
from benchmarks.study.plan import (  # noqa: E402
    Cell,
    Method,
    Study,
    best_weight,
    candidates,
    choose,
    read_study,
    student_cell,
    tuned_on,
)
from benchmarks.study.tables import collect  # noqa: E402
from drd_hf.errors import UserError, run_script  # noqa: E402

RESULTS = ROOT / "benchmarks/results"
STAGES = ("tune", "compare", "ablate", "collect")


def chosen_weight(study: Study, pair: str, method: Method, lines: dict[str, dict]) -> float | None:
    """The candidate with the highest mean IoU on validation, the mean over the seeds; None where there is no choice.

    A weight with which a seed diverged is not chosen.

    Args:
        lines: {command: line} of the tuning runs that are finished.

    Raises:
        UserError: not all of its runs are finished, or all of them diverged.
    """
    where = tuned_on(study, pair, method)
    if where is None:
        return method.weight
    if method.like is not None:
        return chosen_weight(study, pair, (study.methods | study.ablations)[method.like], lines)
    cells = candidates(study, pair, method, ROOT)
    if any(cell.command not in lines for cell in cells):
        raise UserError(
            f"the weight of {method.name} for {where} is not chosen yet: run --stage tune, or give `weight`"
        )
    weight, _ = best_weight(scores_of(cells, lines))
    if weight is None:
        raise UserError(f"{method.name} diverged with every one of its weights for {where}: give smaller ones")
    return weight


def scores_of(cells: list[Cell], lines: dict[str, dict]) -> dict[float, list[float | None]]:
    """{weight: mean IoU on validation of each seed, None where it diverged} of tuning runs that are finished."""
    scores = {}
    for cell in cells:
        scores.setdefault(cell.facts["weight"], []).append(lines[cell.command].get("validation_mean_iou"))
    return scores


def record_choices(study: Study, asked: dict[str, tuple[list[str], list[Method]]], results: Path) -> None:
    """Add what was chosen so far to the lines of the tuning runs, unless it stands there already."""
    path = results / "compare_tuning.jsonl"
    known, lines = read_lines(path), finished(path)
    tuned = dict.fromkeys(
        (tuned_on(study, pair, method), method)
        for pairs, methods in asked.values()
        for method in methods
        for pair in pairs
    )
    for pair, method in tuned:
        cells = [] if pair is None else candidates(study, pair, method, ROOT)
        if not cells or any(cell.command not in lines for cell in cells):
            continue
        by_weight = scores_of(cells, lines)
        weight, _ = best_weight(by_weight)
        scores = {f"{w:g}": of_seeds for w, of_seeds in by_weight.items()}
        choice = {"study": study.name, "dataset": study.dataset, "pair": pair, "method": method.name}
        choice |= {
            **study.tuning,
            "steps": cells[0].facts["steps"],
            "chosen_weight": weight,
            "validation_mean_iou_by_weight": scores,
        }
        if choice not in known:
            append_line(path, choice)
        print(f"{pair}: {method.name} weight {weight} of {scores}")


def asked_of(study: Study, args) -> dict[str, tuple[list[str], list[Method]]]:
    """{stage: (pairs, methods)} of the stages that train something."""
    asked = {}
    for stage in (stage for stage in STAGES if stage in args.stage and stage != "collect"):
        known, limits = (study.ablations, study.ablation_of) if stage == "ablate" else (study.methods, {})
        pairs = choose(study.pairs, args.pairs or limits.get("pairs"), "pairs")
        asked[stage] = pairs, [known[name] for name in known if args.methods is None or name in args.methods]
    return asked


def plan(study: Study, args, lines: dict[str, dict]) -> tuple[list[Cell], list[str]]:
    """The runs that are asked for, as far as the tuning runs in `lines` let them be known, and what is missing yet.

    First each method's candidates and one student, method by method, then the rest of a seed, pair by pair.
    """
    asked, missing = asked_of(study, args), {}

    def students(stage: str, pair: str, method: Method, fold: int, seed: int) -> list[Cell]:
        try:
            weight = chosen_weight(study, pair, method, lines)
        except UserError as error:
            missing[str(error)] = None
            return []
        return [student_cell(study, pair, method, weight, fold, seed, ROOT, stage)]

    cells = []
    for stage, tuning in (("compare", "tune"), ("ablate", "ablate")):  # ablations may have candidates of their own
        pairs, methods = asked.get(stage, ((), ()))
        pairs_to_tune, methods_to_tune = asked.get(tuning, ((), ()))
        limits = study.ablation_of if stage == "ablate" else {}
        folds = choose(study.compared_folds, args.folds or limits.get("folds"), "folds")
        seeds = args.seeds or limits.get("seeds") or study.seeds
        for pair in dict.fromkeys(study.tuned_on or pair for pair in pairs_to_tune):
            for method in methods_to_tune:
                cells += candidates(study, pair, method, ROOT)
                if pair in pairs and method in methods:
                    cells += students(stage, pair, method, folds[0], seeds[0])
        for seed in seeds:
            for pair in pairs:
                for fold in folds:
                    for method in methods:
                        cells += students(stage, pair, method, fold, seed)
    return list(dict.fromkeys(cells)), list(missing)


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
    add("--max_hours", type=float, default=math.inf, help="start no run later than that; the same command goes on")
    add("--discard_models", action="store_true", help="keep of a finished student only its run.json")
    add("--dry_run", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args()
    study, results = read_study(args.study, args.steps), args.results.resolve()
    choose(study.methods | study.ablations, args.methods, "--methods")
    choose(study.compared_folds, args.folds, "--folds")
    choose(study.pairs, args.pairs, "--pairs")

    def plan_now() -> tuple[list[Cell], list[str]]:
        return plan(study, args, finished(results / "compare_tuning.jsonl"))

    asked, failed = asked_of(study, args), []
    cells, missing = plan_now()
    if missing and not cells:
        raise UserError(missing[0])
    if args.dry_run:
        show(cells, results)
    elif asked:
        failed = run_cells(study, lambda: plan_now()[0], results, args.discard_models, args.max_hours)
        record_choices(study, asked, results)
    for reason in plan_now()[1]:
        print(f"left out: {reason}")
    if "collect" in args.stage and not args.dry_run:
        collect(results)
    if failed:
        raise UserError(f"{len(failed)} runs failed; first {failed[0]}; the same command repeats them")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # as by Ctrl-C, with the training
    run_script(main)
