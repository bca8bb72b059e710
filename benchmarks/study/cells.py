"""Runs of a study: each in a process of its own, one runner at a time, one line of results when it is finished."""

import contextlib
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import platform
import resource
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path

from filelock import Timeout

from benchmarks.study.data import ensure_data
from benchmarks.study.lines import ROOT, append_line, finished, locked, scores_of
from benchmarks.study.plan import Cell, Study
from drd_hf.errors import UserError

BUSY = 75  # exit status of a run that another runner is at
# What decides what is learnt and how it is scored; the same digest means the same code.
CODE = (
    *("losses", "relations", "metrics", "evaluation", "data/transforms.py", "data/streaming.py", "checkpoints.py"),
    *("features.py", "models.py", "runs.py", "trainer.py"),
)
SAME_TEACHER = ("study", "teacher", "labelled", "fold")  # what students that are compared share
MODULES = ("scripts.train_teacher", "scripts.distill", "scripts.evaluate")


def code_digest() -> str:
    paths = [ROOT / "drd_hf" / name for name in CODE]
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


STARTED_WITH = code_digest()  # processes are forked with the code of this moment, whatever becomes of the files


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
    """Whether a run has its line; the folder of a teacher must be there too, and be that of the line."""
    line = finished(results_of(cell, results)).get(cell.command)
    if line is None or cell.facts["stage"] != "teacher":
        return line is not None
    return line["seconds"] is not None and line["seconds"] == _seconds_of(ROOT / cell.model)


def require_same_teachers(cells: Iterable[Cell], results: Path) -> None:
    """Students that are compared have one teacher: a training repeated on another machine gives another one.

    Raises:
        UserError: earlier students of the same study, fold and share of labels had another teacher than one of `cells`, or
            one that is not there any more.
    """
    used = {}  # {facts of a teacher: the folders that students learned from}
    for name in ("compare.jsonl", "compare_tuning.jsonl"):
        for command, line in finished(results / name).items():
            words = shlex.split(command)
            if "--teacher" in words:
                facts = tuple(line[key] for key in SAME_TEACHER)
                used.setdefault(facts, set()).add(words[words.index("--teacher") + 1])
    for cell in cells:
        others = used.get(tuple(cell.facts[key] for key in SAME_TEACHER))
        if "--teacher" not in cell.words or not others:
            continue
        wanted = cell.words[cell.words.index("--teacher") + 1]
        there = cell.teacher is None or is_finished(cell.teacher, results)
        if there and others == {wanted}:
            continue
        other = min(others - {wanted}, default=wanted)
        raise UserError(
            f"{cell.title}: {results} has students of this pair's teacher in {other}, which "
            f"{'is not the one that is here' if (ROOT / other).exists() else 'is not here'}; put that one back, or give "
            "another folder with --results for a comparison with a teacher of its own"
        )


def run_cells(
    study: Study,
    plan: Callable[[], list[Cell]],
    results: Path,
    discard_models: bool = False,
    max_hours: float = math.inf,
) -> list[str]:
    """Run what is not finished yet, in the order of the plan, every teacher before its first student.

    Runs that another runner is at, and those that need its teacher, are left to the end and waited for there.

    Args:
        plan: the runs that are known by now; asked again after each, for what one tells the next may depend on.
        max_hours: no run is started later than that.

    Returns:
        The titles of the runs that failed, with the reason.

    Raises:
        UserError: results with students of another teacher, see `require_same_teachers`.
    """
    context, locks, failed, busy = start_method(), ROOT / study.runs / "locks", {}, []
    started, done, told = time.monotonic(), 0, False
    while True:
        cells = dict.fromkeys(c for cell in plan() for c in (cell.teacher, cell) if c is not None)
        todo = [cell for cell in cells if not is_finished(cell, results)]
        require_same_teachers(todo, results)
        learning = {cell.teacher for cell in todo}  # a teacher that is gone is missed by these alone
        todo = [cell for cell in todo if cell in learning or cell.command not in finished(results_of(cell, results))]
        if not told:
            print(f"{study.name}: {len(cells)} runs, {len(cells) - len(todo)} of them finished before", flush=True)
            told = True
        todo = [cell for cell in todo if cell not in failed and cell.teacher not in failed]
        if not todo:
            break
        if time.monotonic() - started >= 3600 * max_hours:
            print(f"stopped after {max_hours:g} hours, {len(todo)} runs are left", flush=True)
            break
        cell = next((cell for cell in todo if cell not in busy and cell.teacher not in busy), None)
        wait, cell = cell is None, cell or todo[0]
        ensure_data(study, cell.data, locks)
        begun, log = time.monotonic(), ROOT / f"{cell.folder}.log"
        process = context.Process(target=_run, args=(cell, results, locks, log, wait, discard_models))
        process.start()
        try:
            process.join()
        finally:  # what ends this process ends the training
            process.kill()
        if process.exitcode == BUSY:
            busy.append(cell)
            continue
        if wait:
            busy.clear()  # the other runner is elsewhere by now
        done += 1
        shown, seconds = f"[{done}/{done + len(todo) - 1}] {cell.title}", f"{time.monotonic() - begun:.0f} s"
        if process.exitcode or not is_finished(cell, results):
            failed[cell] = f"{cell.title}: {_last_line(log)} (see {cell.folder}.log)"
            print(f"{shown}: FAILED after {seconds}: {_last_line(log)}", flush=True)
            continue
        line = finished(results_of(cell, results))[cell.command]
        scores = {split: line.get(f"{split}_mean_iou") for split in ("validation", "test")}
        words = [f"{split} {score:.4f}" for split, score in scores.items() if score is not None]
        print(f"{shown}: {', '.join(words) or line['error']}, {seconds}", flush=True)
    return list(failed.values())


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
        if cell.facts["stage"] == "teacher" and _command_of(ROOT / cell.folder) == cell.command:
            append_line(results_of(cell, results), line_of(cell))  # made for other results, its students may be at it
            return
        shutil.rmtree(ROOT / cell.folder, ignore_errors=True)  # what an interrupted run left
        (ROOT / cell.folder).mkdir(parents=True)
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
        line = line_of(cell, error) | _costs(time.monotonic() - started)
        append_line(results_of(cell, results), line)
        if discard_models and cell.facts["stage"] != "teacher":
            _keep_record(ROOT / cell.folder)


def _command_of(folder: Path) -> str | None:
    return _run_of(folder).get("command")


def _seconds_of(folder: Path) -> float | None:
    """How long the training in a folder took, by which one is told from another with the same command; None without one."""
    return _run_of(folder).get("seconds")


def _run_of(folder: Path) -> dict:
    run = folder / "run.json"
    return json.loads(run.read_text()) if run.is_file() else {}


def line_of(cell: Cell, error: str | None = None) -> dict:
    """What is reported of a finished run, but for what its process cost."""
    import torch

    from drd_hf.runs import device_name, versions

    run = json.loads((ROOT / cell.model / "run.json").read_text()) if error is None else {}
    by_split, facts = dict(run.get("results", {}).get("model", {})), cell.facts
    if cell.model != cell.folder:  # trained before, perhaps in another way than the study would, and scored now
        facts = {**facts, "seed": run["seed"], "settings": {"command": run["command"]}}
        report = json.loads((ROOT / cell.folder / "test.json").read_text())
        by_split["test"] = {name.rpartition("/")[2]: value for name, value in report["scores"].items()}
    steps, seconds = run.get("steps", cell.facts["steps"]), run.get("seconds")
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    return {
        **facts,
        "steps": steps,
        "error": error,
        **scores_of(by_split),
        "seconds": seconds,
        "milliseconds_per_step": seconds and steps and round(1000 * seconds / steps, 1),
        "device": run.get("milliseconds_per_tile", {}).get("device", device),
        "processor": platform.processor() or platform.machine(),
        "num_parameters": run.get("num_parameters"),
        "versions": versions(),
        "code": STARTED_WITH,
        "command": cell.command,
        "finished": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _costs(wall_seconds: float) -> dict:
    """Of this whole process, with the scoring at its end."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    gpu = torch.cuda.is_available()
    return {
        "wall_seconds": round(wall_seconds, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "peak_megabytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20),
        "peak_gpu_megabytes": round(torch.cuda.max_memory_allocated() / 2**20) if gpu else None,
    }


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines() if log.is_file() else []
    return next((line for line in reversed(lines) if line.strip()), "no output")


def _keep_record(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "run.json":
            path.unlink()
