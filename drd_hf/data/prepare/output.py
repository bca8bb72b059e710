"""Where a dataset grows before it is whole, and how it gets to its place in one step.

All work happens in the folder OUTPUT.unfinished. Whatever moment a process is killed at, OUTPUT is the old dataset, or
absent, or the new one; `recover` knows from what is left which of its steps were done:

    shards/         finished parts; a later start uses those that are still right
    dataset/        being put together from hard links to the shards
    assembled.json  written when dataset/ is complete; if it is there and dataset/ is not, the latter has become OUTPUT
    old/            the dataset that was at OUTPUT, from just before dataset/ moves there
    lock            held by the process that works here
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from drd_hf.data.prepare.shards import write_file
from drd_hf.errors import UserError

SECONDS_FOR_ORPHANS = 5.0  # workers of a killed process hold its lock until they notice
BUSY = "another process is preparing it; wait until it is done, or give another --output"
TEMPORARY = r"assembled\.json\.\d+\.tmp"  # what `write_file` leaves where it is killed
ATTEMPTS = 100  # to enter a folder that processes before may be removing; two are hardly ever needed


@dataclass(frozen=True)
class Workplace:
    """The paths of one conversion."""

    output: Path

    @property
    def folder(self) -> Path:
        return self.output.with_name(f"{self.output.name}.unfinished")

    @property
    def shards(self) -> Path:
        return self.folder / "shards"

    @property
    def dataset(self) -> Path:
        return self.folder / "dataset"

    @property
    def assembled(self) -> Path:
        return self.folder / "assembled.json"

    @property
    def old(self) -> Path:
        return self.folder / "old"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """A full disk, a lack of rights and the like become a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{error.filename or path}: cannot be written ({error.strerror or error}); make room or repair it"
        ) from None


@contextmanager
def locked(output: Path) -> Iterator[Workplace]:
    """The workplace of an output, for one process at a time."""
    place = Workplace(output)
    lock = FileLock(place.lock)
    for attempt in range(ATTEMPTS):
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            _check_is_ours(place)
            lock.acquire(timeout=SECONDS_FOR_ORPHANS)
            if place.lock.exists():
                break
            lock.release()  # of a file that the process before has removed
        except Timeout:
            raise UserError(f"{output}: {BUSY}") from None
        except OSError as error:
            # The process that worked here may be done and have removed the folder between these steps.
            if isinstance(error, (FileNotFoundError, FileExistsError)) and attempt < ATTEMPTS - 1:
                continue
            raise UserError(f"{place.folder}: cannot be written ({error.strerror}); give another --output") from None
    else:
        raise UserError(f"{output}: {BUSY}")
    try:
        yield place
    finally:
        lock.release()


def _check_is_ours(place: Workplace) -> None:
    known = {path.name for path in (place.shards, place.dataset, place.assembled, place.old, place.lock)}
    names = {path.name for path in place.folder.iterdir()} - known
    if strange := sorted(name for name in names if not re.fullmatch(TEMPORARY, name)):
        raise UserError(f"{place.folder}: is where this tool works, but {strange[0]} is not from it; move it away")


def open_shards(place: Workplace, wanted: Set[str]) -> None:
    """Make the folder of the shards; files in it that are not wanted, of other options or cut off, are removed."""
    place.shards.mkdir(parents=True, exist_ok=True)
    for path in list(place.shards.iterdir()):
        if path.name not in wanted:
            path.unlink()


def recover(place: Workplace) -> str | None:
    """Undo or see what a killed process left. The key of a dataset that was moved to its place, or None."""
    moved = place.assembled.is_file() and not place.dataset.exists() and place.output.is_dir()
    if moved:
        return json.loads(place.assembled.read_text(encoding="utf-8"))["key"]
    if place.old.exists():
        if place.output.exists() and any(place.output.iterdir()):
            raise UserError(f"{place.output}: exists, and so does {place.old}, which was there before; move one away")
        os.replace(place.old, place.output)
    return None


def put_in_place(place: Workplace, key: str, files: Mapping[str, Sequence[Path]], card: str) -> None:
    """Put a dataset together from the files of its splits and its card, and move it to the output."""
    place.assembled.unlink(missing_ok=True)  # first, or it would say that the folder removed next was moved
    if place.dataset.exists():
        shutil.rmtree(place.dataset)
    (place.dataset / "data").mkdir(parents=True)
    for split, paths in files.items():
        for i, path in enumerate(paths):
            _link(path, place.dataset / "data" / f"{split}-{i:05d}-of-{len(paths):05d}.parquet")
    write_file(place.dataset / "README.md", card)
    write_file(place.assembled, json.dumps({"key": key}))
    if not place.output.exists() or not any(place.output.iterdir()):
        os.replace(place.dataset, place.output)
        return
    os.replace(place.output, place.old)
    try:
        os.replace(place.dataset, place.output)
    except BaseException:
        if not place.output.exists():
            os.replace(place.old, place.output)
        raise


def _link(path: Path, link: Path) -> None:
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links
        shutil.copyfile(path, link)


def empty(place: Workplace) -> None:
    """Remove what is in the workplace but its lock, and last what `recover` reads."""
    if place.dataset.exists():
        place.assembled.unlink(missing_ok=True)
    for folder in (place.shards, place.dataset, place.old):
        if folder.exists():
            shutil.rmtree(folder)
    place.assembled.unlink(missing_ok=True)
    for path in list(place.folder.iterdir()):
        if re.fullmatch(TEMPORARY, path.name):
            path.unlink()


def clean(place: Workplace) -> None:
    """Remove the workplace. What stays because it cannot be removed is told; the dataset is not the worse for it."""
    try:
        if place.folder.exists():
            empty(place)
    except OSError as error:
        print(f"{place.folder}: cannot be removed ({error.strerror or error}); remove it by hand", file=sys.stderr)
        return
    # From here on another process may be in the folder: it makes the lock again, and removes it later.
    with suppress(OSError):
        place.lock.unlink(missing_ok=True)
        place.folder.rmdir()
