"""Runs of a study: each in a process of its own, one runner at a time, one line of results when it is finished."""

import contextlib
import importlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from filelock import Timeout

from benchmarks.study.data import ensure_data
from benchmarks.study.lines import ROOT, append_line, finished, locked, scores_of
from benchmarks.study.plan import Cell, Study
from drd_hf.errors import UserError

BUSY = 75  # exit status of a run that another runner is at
MODULES = ("scripts.train_teacher", "scripts.distill", "scripts.evaluate")


def start_method():
    """Fresh processes that need not import torch and transformers again, where the system can fork."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *MODULES])
    return context


def results_of(cell: Cell, results: Path) -> Path:
    """The file that a run's line goes to. Those that choose weights never mix with those that are compared."""
    return results / ("compare_tuning.jsonl" if cell.facts["stage"] == "tune" else "compare.jsonl")


def is_finished(cell: Cell, results: Path) -> bool:
    """Whether a run has its line; a teacher's folder must be there too, for its students to learn from."""
    there = cell.facts["stage"] != "teacher" or (ROOT / cell.model / "run.json").is_file()
    return there and cell.command in finished(results_of(cell, results))


def run_cells(study: Study, cells: list[Cell], results: Path, discard_models: bool = False) -> list[str]:
    """Run what is not finished yet, every teacher before its first student.

    Runs that another runner is at, and those that need its teacher, are left to the end and waited for there.

    Returns:
        The titles of the runs that failed, with the reason.
    """
    context, locks, failed = start_method(), ROOT / study.runs / "locks", []
    with_teachers = dict.fromkeys(c for cell in cells for c in (cell.teacher, cell) if c is not None)
    todo = [cell for cell in with_teachers if not is_finished(cell, results)]
    waiting, number = [], 0
    print(f"{len(with_teachers)} runs, {len(with_teachers) - len(todo)} of them finished before", flush=True)
    for wait, queue in ((False, todo), (True, waiting)):
        for cell in queue:
            if is_finished(cell, results):  # by another runner meanwhile
                number += 1
                continue
            if not wait and cell.teacher in waiting:
                waiting.append(cell)
                continue
            ensure_data(study, cell.data, locks)
            started, log = time.monotonic(), ROOT / f"{cell.folder}.log"
            process = context.Process(target=_run, args=(cell, results, locks, log, wait, discard_models))
            process.start()
            process.join()
            if process.exitcode == BUSY:
                waiting.append(cell)
                continue
            number += 1
            shown, seconds = f"[{number}/{len(todo)}] {cell.title}", f"{time.monotonic() - started:.0f} s"
            if process.exitcode:
                failed.append(f"{cell.title}: {_last_line(log)} (see {cell.folder}.log)")
                print(f"{shown}: FAILED after {seconds}: {_last_line(log)}", flush=True)
                continue
            line = finished(results_of(cell, results))[cell.command]
            scores = {split: line.get(f"{split}_mean_iou") for split in ("validation", "test")}
            words = [f"{split} {score:.4f}" for split, score in scores.items() if score is not None]
            print(f"{shown}: {', '.join(words) or line['error']}, {seconds}", flush=True)
    return failed


def _run(cell: Cell, results: Path, locks: Path, log: Path, wait: bool, discard_models: bool) -> None:
    """In a process of its own: the command, its figures, the line."""
    os.chdir(ROOT)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(locked(locks, cell.folder, wait))
        except Timeout:
            sys.exit(BUSY)
        if is_finished(cell, results):
            return
        (ROOT / cell.folder).mkdir(parents=True, exist_ok=True)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        print(f"$ {cell.command}", flush=True)
        started, error = time.monotonic(), None
        sys.argv = list(cell.words)
        script = cell.words[0].removesuffix(".py").replace("/", ".")
        try:
            importlib.import_module(script).main()
        except UserError as refused:
            if "not finite" not in str(refused):
                print(f"error: {refused}", flush=True)
                sys.exit(2)
            error = str(refused)  # a finding about the method, not a mistake in the study
        line = line_of(cell, time.monotonic() - started, error)
        append_line(results_of(cell, results), line)
        if discard_models and cell.facts["stage"] != "teacher":
            _keep_record(ROOT / cell.folder)


def line_of(cell: Cell, wall_seconds: float, error: str | None = None) -> dict:
    """What is reported of a finished run."""
    import torch

    from drd_hf.runs import device_name, versions

    run = json.loads((ROOT / cell.model / "run.json").read_text()) if error is None else {}
    by_split = dict(run.get("results", {}).get("model", {}))
    if cell.model != cell.folder:  # trained before, scored now
        report = json.loads((ROOT / cell.folder / "test.json").read_text())
        by_split["test"] = {name.rpartition("/")[2]: value for name, value in report["scores"].items()}
    steps, seconds = run.get("steps"), run.get("seconds")
    gpu = torch.cuda.is_available()
    device = device_name("cuda" if gpu else "cpu")
    return {
        **cell.facts,
        "steps": steps,
        "error": error,
        **scores_of(by_split),
        "seconds": seconds,
        "milliseconds_per_step": seconds and steps and round(1000 * seconds / steps, 1),
        "wall_seconds": round(wall_seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_megabytes": _peak_megabytes(),
        "peak_gpu_megabytes": round(torch.cuda.max_memory_allocated() / 2**20) if gpu else None,
        "device": run.get("milliseconds_per_tile", {}).get("device", device),
        "processor": platform.processor() or platform.machine(),
        "num_parameters": run.get("num_parameters"),
        "versions": versions(),
        "command": cell.command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _peak_megabytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20)


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _keep_record(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "run.json":
            path.unlink()
