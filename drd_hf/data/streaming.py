"""Tiles that are read from their files as training goes, spread over ranks and loader workers, none lost and none twice."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import load_dataset_builder
from torch.utils.data import IterableDataset, get_worker_info

from drd_hf.checkpoints import seeded
from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.transforms import undecoded
from drd_hf.errors import UserError

# A run of tiles of one file: (file, first tile, number of tiles, whether they count).
Run = tuple[int, int, int, bool]


class StreamedTiles(IterableDataset):
    """Transformed tiles of a streamed split, for `SegmentationTrainer` and `DistillationTrainer`.

    An epoch is cut into spans of equal length, one for each rank, and these into whole batches for each loader worker,
    so that ranks have equally many steps whatever their files hold. The order of the files, and of the tiles in the
    shuffle buffer, depends on the seed, the epoch, the ranks, workers and batch size; the crop of a tile on the seed,
    the epoch and the tile alone. With the same of all these a run that is resumed sees what an uninterrupted one sees.

    Args:
        stream: a split of `load_splits(..., streaming=True)`.
        files: tiles in each of its files, in order, see `tiles_of_files`.
        transform: `TrainTransform` or `EvalTransform(info=...)`.
        shuffle_buffer: number of tiles, still compressed, from which every loader worker draws the next one. 0: files and
            tiles in order, as evaluation wants them.

    `len()` is the number of tiles of all ranks together.
    """

    def __init__(
        self,
        stream,
        files: Sequence[int],
        transform: Callable[[Mapping[str, list]], Mapping[str, list]],
        shuffle_buffer: int = 0,
    ):
        if len(files) != stream.num_shards:
            raise UserError(f"the stream reads {stream.num_shards} files, but tiles are given for {len(files)}")
        if shuffle_buffer < 0:
            raise UserError(f"shuffle_buffer is {shuffle_buffer}; give a number of tiles, or 0 to keep their order")
        self.stream, self.files, self.transform = undecoded(stream), list(files), transform
        self.shuffle_buffer = shuffle_buffer
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch

    def __len__(self) -> int:
        return sum(self.files)

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def share(self, rank: int, ranks: int, batch_size: int, drop_last: bool, seed: int = 0) -> "ShareOfTiles":
        """What one of several processes takes, for its `DataLoader` of that batch size; all take equally many tiles.

        `seed` is that of order and crops.

        With `drop_last` incomplete batches are left out of the epoch, other tiles in each. Otherwise processes that
        would have less take tiles of others once more, with labels that are all ignored.
        """
        return ShareOfTiles(self, rank, ranks, batch_size, drop_last, seed)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.share(0, 1, 1, drop_last=False))


class ShareOfTiles(IterableDataset):
    """The part of `StreamedTiles` that one rank iterates, split further among its loader workers."""

    # accelerate cuts the last batch of an evaluation by the rest of this length; here every tile counts.
    total_dataset_length = 0

    def __init__(self, tiles: StreamedTiles, rank: int, ranks: int, batch_size: int, drop_last: bool, seed: int):
        self.tiles, self.rank, self.batch_size, self.seed = tiles, rank, batch_size, seed
        total = len(tiles)
        self.length = total // (ranks * batch_size) * batch_size if drop_last else math.ceil(total / ranks)

    def __len__(self) -> int:
        return self.length

    def set_epoch(self, epoch: int) -> None:
        self.tiles.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        tiles, epoch, worker = self.tiles, int(self.tiles.epoch), get_worker_info()
        index, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        fsspec.asyn.reset_lock()  # a forked worker has the locks of its parent
        order = list(range(len(tiles.files)))
        if tiles.shuffle_buffer:
            np.random.default_rng([self.seed, epoch]).shuffle(order)
        first, count = span_of_worker(self.length, self.batch_size, index, workers)
        start = self.rank * self.length + first
        rows = self._rows(runs(tiles.files, order, start, count))
        if tiles.shuffle_buffer:
            generator = np.random.default_rng([self.seed, epoch, self.rank, index])
            rows = shuffled(rows, tiles.shuffle_buffer, generator)
        for file, number, row, counts in rows:
            (state,) = np.random.SeedSequence([self.seed, epoch, file, number]).generate_state(1, np.uint64)
            with seeded(int(state)):
                item = {key: values[0] for key, values in tiles.transform({k: [v] for k, v in row.items()}).items()}
            if not counts:
                item["labels"].fill_(IGNORE_INDEX)
            yield item

    def _rows(self, of_worker: Sequence[Run]) -> Iterator[tuple[int, int, dict, bool]]:
        stream = self.tiles.stream
        for file, first, count, counts in of_worker:
            rows = _rows_of(stream.shard(num_shards=stream.num_shards, index=file))
            number = first
            for number, row in enumerate(islice(rows, first, first + count), first + 1):
                yield file, number - 1, row, counts
            if number != first + count:
                raise UserError(
                    f"file {file} of the streamed split ends after {number} of at least {first + count} tiles: "
                    "prepare or download the dataset again"
                )


def _rows_of(stream) -> Iterator[dict[str, Any]]:
    # Not `for row in stream`: in a loader worker that would split the file among the workers once more. And `skip` and
    # `take` of datasets 4.0 fail where the label of one tile is missing and that of another is not.
    for batch in stream.iter(batch_size=8):
        for values in zip(*batch.values(), strict=True):
            yield dict(zip(batch, values, strict=True))


def span_of_worker(length: int, batch_size: int, worker: int, workers: int) -> tuple[int, int]:
    """First tile and number of tiles of one loader worker, among the `length` tiles of its rank.

    A `DataLoader` asks its workers for batches in turn, so that worker w makes batches w, w + workers, ...; only the very
    last batch may be incomplete.
    """
    batches = math.ceil(length / batch_size)
    counts = [len(range(w, batches, workers)) * batch_size for w in range(workers)]
    if batches:
        counts[(batches - 1) % workers] -= batches * batch_size - length
    return sum(counts[:worker]), counts[worker]


def runs(files: Sequence[int], order: Sequence[int], start: int, count: int) -> list[Run]:
    """Where `count` tiles from `start` on lie, counted through the files in `order`; beyond their end from the beginning
    on, where they do not count."""
    total, found, counts = sum(files), [], True
    if start >= total > 0:
        start, counts = start % total, False
    while count:
        for file in order:
            taken = min(max(files[file] - start, 0), count)
            if taken:
                found.append((file, start, taken, counts))
            start, count = max(start - files[file], 0), count - taken
        counts = False
    return found


def shuffled(items: Iterator, size: int, generator: np.random.Generator) -> Iterator:
    """All items, the next one drawn from `size` that are waiting."""
    waiting = []
    for item in items:
        if len(waiting) < size:
            waiting.append(item)
        else:
            chosen = int(generator.integers(size))
            item, waiting[chosen] = waiting[chosen], item
            yield item
    generator.shuffle(waiting)
    yield from waiting


def tiles_of_files(path_or_repo: str | Path, split: str) -> list[int]:
    """Number of tiles in each data file of a split, in the order of its stream; only the ends of the files are read.

    Raises:
        UserError: the files cannot be found or read.
    """
    try:
        paths = load_dataset_builder(str(path_or_repo)).config.data_files[split]
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(_rows_of_file, paths))
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"{path_or_repo}: the files of {split} cannot be read ({error}); prepare it again") from None


def _rows_of_file(path: str) -> int:
    with fsspec.open(path, "rb") as file:
        return pq.read_metadata(file).num_rows
