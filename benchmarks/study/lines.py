"""Results as JSON lines: one line for each finished run."""

import errno
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock

from drd_hf.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
REPORTED = ("mean_iou", "mean_f1", "overall_accuracy", "kappa")


def read_lines(path: str | Path) -> list[dict]:
    """All lines of a file; none if it is not there.

    Raises:
        UserError: a line is not JSON; the message names it.
    """
    path = Path(path)
    lines = []
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else (), 1):
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            raise UserError(f"{path}: line {number} is not whole JSON; remove it, its run will be repeated") from None
    return lines


def append_line(path: str | Path, line: dict) -> None:
    """Add one line. A single write to a file opened for appending, so that lines of several processes do not mix.

    Raises:
        OSError: only a part could be written, as on a full disk; it is taken back, unless another line came after it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(file).st_size
        torn = size > 0 and os.pread(file, 1, size - 1) != b"\n"  # a line by hand, or a write that was cut off
        data = ("\n" * torn + json.dumps(line) + "\n").encode()
        written = os.write(file, data)
        if written < len(data):
            if os.fstat(file).st_size == size + written:
                os.ftruncate(file, size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        os.fsync(file)
    finally:
        os.close(file)


def finished(path: str | Path) -> Mapping[str, dict]:
    """{command: its line} of the runs that a file holds; of runs that were repeated, the last."""
    path = Path(path)
    if not path.is_file():
        return {}
    now = path.stat()
    return _finished(path, now.st_size, now.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _finished(path: Path, size: int, changed: int) -> Mapping[str, dict]:
    # asked for every run of a plan, and a file only ever grows
    return MappingProxyType({line["command"]: line for line in read_lines(path) if "command" in line})


def scores_of(by_split: dict[str, dict]) -> dict[str, float]:
    """{split: {metric: value}} of a run as flat keys such as `test_mean_iou` and `test_iou_road`."""
    return {
        f"{split}_{name}": value
        for split, scores in by_split.items()
        for name, value in scores.items()
        if name in REPORTED or name.startswith("iou_")
    }


def locked(locks: Path, name: str, wait: bool = True) -> FileLock:
    """The right to make `name`. The system frees it when its process ends, however it ends."""
    locks.mkdir(parents=True, exist_ok=True)
    return FileLock(locks / f"{name.replace('/', '_')}.lock", timeout=-1 if wait else 0)
