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
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from drd_hf.data.prepare.shards import write_file
from drd_hf.errors import UserError

SECONDS_FOR_ORPHANS = 5.0  # workers of a killed process hold its lock until they notice


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
def locked(output: Path) -> Iterator[Workplace]:
    """The workplace of an output, for one process at a time."""
    place = Workplace(output)
    lock = FileLock(place.lock)
    while True:
        try:
            place.folder.mkdir(parents=True, exist_ok=True)
            _check_is_ours(place)
            lock.acquire(timeout=SECONDS_FOR_ORPHANS)
        except Timeout:
            raise UserError(
                f"{output}: another process is preparing it; wait until it is done, or give another --output"
            ) from None
        except FileNotFoundError:
            continue  # the process that worked here is done and has removed the folder
        except OSError as error:
            raise UserError(f"{place.folder}: cannot be written ({error.strerror}); give another --output") from None
        if place.lock.exists():
            break
        lock.release()  # of a file that the process before has removed
    try:
        yield place
    finally:
        lock.release()


def _check_is_ours(place: Workplace) -> None:
    known = tuple(path.name for path in (place.shards, place.dataset, place.assembled, place.old, place.lock))
    if strange := sorted(path.name for path in place.folder.iterdir() if not path.name.startswith(known)):
        raise UserError(f"{place.folder}: is where this tool works, but {strange[0]} is not from it; move it away")


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


def clean(place: Workplace) -> None:
    """Remove the workplace, what `recover` reads last."""
    if place.dataset.exists():
        place.assembled.unlink(missing_ok=True)
    for folder in (place.shards, place.dataset, place.old):
        if folder.exists():
            shutil.rmtree(folder)
    shutil.rmtree(place.folder)
