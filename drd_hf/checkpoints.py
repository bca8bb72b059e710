"""What makes an interrupted training equal to an uninterrupted one: checkpoints that are whole or absent, and training
items whose random crops and flips do not depend on what was drawn before them."""

import contextlib
import json
import logging
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import Dataset, Sampler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from drd_hf.errors import UserError

STAGING_PREFIX = ".saving-"

logger = logging.getLogger(__name__)


# Folders


def checkpoint_folders(run_dir: str | Path) -> list[Path]:
    """The `checkpoint-N` folders of a run, lowest step first, complete or not."""
    found = [path for path in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir()]
    return sorted((path for path in found if _step(path).isdecimal()), key=lambda path: int(_step(path)))


def newest_complete_checkpoint(run_dir: str | Path, quiet: bool = False) -> Path | None:
    """The `checkpoint-N` of the highest step from which training can go on; None if there is none.

    Broken ones that are passed over are named in a warning of one line each, unless `quiet`.
    """
    for folder in reversed(checkpoint_folders(run_dir)):
        problem = checkpoint_problem(folder)
        if problem is None:
            return folder
        if not quiet:
            logger.warning(f"{folder} is left out, it is not a complete checkpoint: {problem}")
    return None


def checkpoint_problem(folder: str | Path) -> str | None:
    """What keeps training from going on from a checkpoint folder, in a few words; None if nothing does.

    Every file is read, nothing is unpickled: JSON is parsed, safetensors must be as long as their headers say, and
    the archives that `torch.save` writes (optimizer, scheduler, random state) must match their checksums.
    """
    folder = Path(folder)
    for name in (CONFIG_NAME, TRAINER_STATE_NAME, OPTIMIZER_NAME, SCHEDULER_NAME):
        if not (folder / name).is_file():
            return f"{name} is missing"
    if not any(folder.glob("rng_state*.pth")):
        return "rng_state.pth is missing"
    for file in sorted(folder.iterdir()):
        try:
            _read_through(file)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{file.name} is damaged ({_first_line(error)})"
    weights = {SAFE_WEIGHTS_NAME}
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        weights = set(json.loads((folder / SAFE_WEIGHTS_INDEX_NAME).read_text())["weight_map"].values())
    missing = sorted(name for name in weights if not (folder / name).is_file())
    return f"{missing[0]} is missing" if missing else None


def _read_through(file: Path) -> None:
    if file.suffix == ".json":
        content = json.loads(file.read_text())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        if file.name == TRAINER_STATE_NAME and not isinstance(content.get("global_step"), int):
            raise ValueError("it has no global_step")
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt") as tensors:  # refuses a file that is shorter or longer than its header says
            tensors.keys()
    elif file.suffix in (".pt", ".pth"):
        with zipfile.ZipFile(file) as archive:
            if (name := archive.testzip()) is not None:
                raise ValueError(f"wrong checksum of {name}")


def checkpoint_to_resume(run_dir: str | Path, quiet: bool = False) -> Path | None:
    """The newest complete checkpoint; None, and a line that says so, where a run has saved none yet.

    Raises:
        UserError: there are checkpoints, but none is complete; to start anew over them is the user's decision.
    """
    newest = newest_complete_checkpoint(run_dir, quiet)
    if newest is None:
        if folders := checkpoint_folders(run_dir):
            raise UserError(
                f"{run_dir} has {len(folders)} checkpoints and none is complete, the last: "
                f"{checkpoint_problem(folders[-1])}; remove them to start at the beginning"
            )
        if not quiet:
            logger.warning(f"{run_dir} has no checkpoint yet: training starts at the beginning")
    return newest


def staging_folder(run_dir: str | Path, name: str) -> Path:
    """Where a checkpoint is written before `publish` gives it its name; the same for all processes of a run."""
    return Path(run_dir) / f"{STAGING_PREFIX}{name}"


def publish(written: Path, place: Path) -> None:
    """Move a folder to its place in one step; what is there already is replaced."""
    if place.exists():
        remove(place)
    os.replace(written, place)


def remove(folder: Path) -> None:
    """Delete a folder that at no moment stands under its own name with only a part of its files."""
    aside = staging_folder(folder.parent, f"removed-{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(run_dir: str | Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for leftover in Path(run_dir).glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def remove_newer(run_dir: str | Path, checkpoint: str | Path) -> None:
    """Delete the checkpoints of a run that come after the one it goes on from; each is named in a line."""
    checkpoint = Path(checkpoint)
    if checkpoint.resolve().parent != Path(run_dir).resolve() or not _step(checkpoint).isdecimal():
        return
    for folder in checkpoint_folders(run_dir):
        if int(_step(folder)) > int(_step(checkpoint)):
            logger.warning(f"{folder} is removed: training goes on from {checkpoint.name} before it")
            remove(folder)


def rotate(run_dir: str | Path, limit: int | None, keep: Iterable[str | Path]) -> None:
    """Delete the checkpoints of the lowest steps until `limit` are left; those in `keep` stay."""
    if limit is None or limit <= 0:
        return
    folders = checkpoint_folders(run_dir)
    kept = {Path(path).name for path in keep}
    excess = len(folders) - max(limit, len(kept))
    for folder in [folder for folder in folders if folder.name not in kept][: max(excess, 0)]:
        remove(folder)


def _step(folder: Path) -> str:
    return folder.name.rpartition("-")[2]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# Draws
#
# A loader fetches ahead of the step that is trained, and a resumed one skips batches: random states saved with a
# checkpoint do not tell which crops come next. Here every item is drawn from a seed of its own.


class SeededDraws(Dataset):
    """A dataset whose items, asked for by the (index, seed) of a `SeededSampler`, depend on nothing else.

    The generators of `random`, NumPy and torch (CPU) are seeded while an item is made and restored after it, so the
    randomness of transforms is the same in any process, with any number of loader workers, batch size and ranks.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: tuple[int, int]):
        index, seed = draw
        with seeded(seed):
            return self.dataset[index]


class SeededSampler(Sampler):
    """Gives (index, seed of the draw) in an order that depends only on the seed and the epoch.

    Args:
        sampler: gives the indices; what it draws from the global random state is seeded here.
        seed: of the run.
        epoch: asked at the start of each pass.
    """

    def __init__(self, sampler, seed: int, epoch: Callable[[], int]):
        self.sampler, self.seed, self.epoch = sampler, seed, epoch

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # Not seed + epoch: runs with seeds 0 and 1 would see the same draws, an epoch apart.
        (state,) = np.random.SeedSequence([self.seed, self.epoch()]).generate_state(1, np.uint64)
        with seeded(int(state)):
            indices = list(self.sampler)
            seeds = torch.randint(2**63 - 1, (len(indices),)).tolist()
        return iter(list(zip(indices, seeds, strict=True)))


@contextlib.contextmanager
def seeded(seed: int):
    """Seed the global generators of the CPU, and leave them as they were found."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs as well, and with them dropout
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
