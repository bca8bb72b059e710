"""From images with labels to a dataset of tiles: parquet files beside a dataset card that says what they are.

The sources are converted in shards that are finished one by one in a folder beside the output, so that a conversion that
was stopped goes on where it was; `output` says how the whole gets to its place.
"""

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from drd_hf.data.facts import DatasetFacts
from drd_hf.data.prepare.card import describe, render_card
from drd_hf.data.prepare.output import Workplace, clean, empty, file_errors, locked, open_shards, put_in_place, recover
from drd_hf.data.prepare.processes import each_result, worker_pool
from drd_hf.data.prepare.shards import Conversion, Shard, ShardCounts, convert_shard, find_counts, plan_shards, reason
from drd_hf.data.source import SourceHeader, SourceReader
from drd_hf.data.splits import SPLITS, SegmentationInfo, read_info
from drd_hf.data.tiles import scaled_size, tile_origins
from drd_hf.errors import UserError, nearest

__all__ = ["prepare_dataset"]

HEADERS_AT_A_TIME = 16


def prepare_dataset(
    sources: Mapping[str, Sequence[Any]],
    reader: SourceReader,
    facts: DatasetFacts,
    output: str | Path,
    tile_size: int = 512,
    stride: int | None = None,
    scale: float = 1.0,
    num_proc: int = 1,
    overwrite: bool = False,
    skip_broken: bool = False,
    notes: Sequence[str] = (),
) -> SegmentationInfo:
    """Cut images with labels into tiles and write them as a dataset that `load_splits` and the Hub can read.

    Args:
        sources: for each of train, validation and test (at least one of them) the records to read, one per image. A
            record has a `name`.
        reader: reads the records. With `num_proc` above 1 it and they are sent to other processes.
        output: folder to write: `README.md` and `data/SPLIT-0000i-of-0000n.parquet` with the columns image and label
            (lossless PNG; the label of a source without labels is None), source (name of the image), row and column
            (of the tile's first pixel); where any source has them extra_bands (one PNG for each band after the third),
            label_eroded, crs and transform (of the tile, see `SourceImage`).
        tile_size: height and width of a tile in pixels.
        stride: pixels from one tile to the next; `tile_size` if not given. Less makes overlapping tiles.
        scale: resample images by this factor before they are cut.
        num_proc: number of processes. The files do not depend on it. Memory grows by a decoded source per process.
        overwrite: replace a dataset that is already there, once the new one is complete.
        skip_broken: leave out sources that cannot be read, and list them in `left_out` of the result and in the card.
        notes: sentences for the card.

    The folder appears when it is complete. If the conversion stops before, whatever the reason, its finished parts are
    kept in `OUTPUT.unfinished` and the same call goes on from there, to the same bytes.

    Raises:
        UserError: wrong options, an output that exists or that another process prepares, an empty split, or whatever
            the reader finds wrong.
    """
    stride = tile_size if stride is None else stride
    _check_options(sources, reader, tile_size, stride, scale, num_proc)
    output = Path(output) if Path(output).name not in ("", "..") else Path(output).resolve()
    with file_errors(output):
        _check_replaceable(output)
    sources = {split: list(sources[split]) for split in SPLITS if split in sources}
    with locked(output) as place:
        with file_errors(place.folder):
            moved = recover(place)  # by a process that was killed right after
        try:
            if not moved:
                _check_output(output, overwrite)
            processes = min(num_proc, sum(map(len, sources.values())))
            with worker_pool(processes) as executor:
                headers, broken = _read_headers(sources, reader, executor, skip_broken)
                conversion = _plan(reader, facts, tile_size, stride, scale, headers)
                shards = []
                for split, found in headers.items():
                    records = [record for record, header in zip(sources[split], found, strict=True) if header]
                    shards += plan_shards(split, records, [header for header in found if header], conversion)
                key = _key(shards, facts, notes, broken, skip_broken)
                if moved == key:
                    clean(place)
                    return read_info(output)
                _check_output(output, overwrite)
                if moved:
                    with file_errors(place.folder):
                        empty(place)
                counts = _convert(shards, conversion, place, executor, skip_broken)
            info = _finish(shards, counts, conversion, place, key, broken, notes)
        except BaseException as error:
            _leave(place, error)
            raise
        clean(place)
    return info


def _check_options(sources, reader, tile_size: int, stride: int, scale: float, num_proc: int) -> None:
    tile_origins(0, tile_size, stride)
    scaled_size(1, 1, scale)
    if num_proc < 1:
        raise UserError(f"num_proc is {num_proc}; give at least 1")
    if len(reader.bands) < 3:
        raise UserError(f"the reader has the bands {', '.join(reader.bands)}; tiles need at least three")
    for split, records in sources.items():
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; nearest: {nearest(split, SPLITS)}")
        if not records:
            raise UserError(f"split {split} has no images; add some or leave the split out")
    if not sources:
        raise UserError(f"no split was given; give at least one of {', '.join(SPLITS)}")


def _check_replaceable(output: Path) -> None:
    """Refuse an output that is something else than a dataset of this tool, which nothing makes replaceable."""
    if os.path.ismount(output):
        raise UserError(f"{output}: is a mount point, which cannot be replaced; give a folder inside it as --output")
    if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
        return
    if not (output.exists() or output.is_symlink()):
        return
    card = output / "README.md"
    if output.is_symlink() or not card.is_file() or b"\nsegmentation:" not in card.read_bytes():
        raise UserError(
            f"{output}: is not a dataset that this tool wrote, so it is not replaced; give another --output"
        )


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise UserError(f"{output}: exists already; give another --output, or --overwrite to replace the dataset")


def _read_headers(
    sources: Mapping[str, Sequence[Any]], reader: SourceReader, executor: Executor | None, skip_broken: bool
) -> tuple[dict[str, list[SourceHeader | None]], dict[str, str]]:
    """The header of each record, None for a broken one, and what is wrong with these."""
    records = list(chain.from_iterable(sources.values()))
    chunks = [records[i : i + HEADERS_AT_A_TIME] for i in range(0, len(records), HEADERS_AT_A_TIME)]
    found, broken = [[] for _ in chunks], {}
    with tqdm(total=len(records), desc="headers", unit="image") as progress:
        read = partial(_headers, reader, skip_broken)
        for index, headers in each_result(executor, read, chunks):
            found[index] = headers
            progress.update(len(headers))
    found = iter(chain.from_iterable(found))
    headers = {}
    for split, of_split in sources.items():
        headers[split], reasons = [], []
        for record, header in zip(of_split, found, strict=False):
            if isinstance(header, str):
                reasons.append(header)
                broken[record.name] = header
            headers[split].append(None if isinstance(header, str) else header)
        names = [header.name for header in headers[split] if header]
        if not names:
            raise UserError(_nothing_left(split, reasons))
        if twice := [
            name for name, next_name in zip(sorted(names), sorted(names)[1:], strict=False) if name == next_name
        ]:
            raise UserError(f"split {split} has two images named {twice[0]}; names must differ")
    return headers, broken


def _nothing_left(split: str, reasons: Sequence[str]) -> str:
    more = f", and {len(reasons) - 1} more" if len(reasons) > 1 else ""
    return f"split {split} has nothing left, none of its images can be read: {reasons[0]}{more}"


def _headers(reader: SourceReader, skip_broken: bool, records: Sequence[Any]) -> list[SourceHeader | str]:
    headers = []
    for record in records:
        try:
            headers.append(reader.header(record))
        except UserError as error:
            if not skip_broken:
                raise
            headers.append(reason(error))
    return headers


def _plan(reader, facts, tile_size, stride, scale, headers) -> Conversion:
    known = [header for of_split in headers.values() for header in of_split if header]
    eroded, georeferenced = any(h.eroded for h in known), any(h.georeferenced for h in known)
    return Conversion(reader, facts, tile_size, stride, scale, eroded, georeferenced)


def _key(shards: Sequence[Shard], *rest) -> str:
    """Changes with everything that the bytes of the dataset depend on."""
    return hashlib.sha256(repr(([(shard.split, shard.key) for shard in shards], rest)).encode()).hexdigest()


def _convert(
    shards: Sequence[Shard], conversion: Conversion, place: Workplace, executor: Executor | None, skip_broken: bool
) -> dict[str, ShardCounts]:
    """Convert what is not converted yet; the counts of all shards by their keys."""
    with file_errors(place.folder):
        open_shards(place, {f"{shard.key}.{ending}" for shard in shards for ending in ("parquet", "json")})
    counts, waiting = {}, []
    for shard in shards:
        found = find_counts(shard, place.shards)
        # What was left out before is tried again, to give its error, unless it may be left out.
        if found is None or (found.left_out and not skip_broken):
            waiting.append(shard)
        else:
            counts[shard.key] = found
    done = sum(len(shard.records) for shard in shards if shard.key in counts)
    if counts:
        print(f"going on: {done} images were converted before, in {place.folder}", file=sys.stderr)
    work = partial(convert_shard, conversion=conversion, folder=place.shards, skip_broken=skip_broken)
    total = sum(len(shard.records) for shard in shards)
    with tqdm(total=total, initial=done, desc="tiles", unit="image") as progress:
        for index, result in each_result(executor, work, waiting):
            counts[waiting[index].key] = result
            progress.update(len(waiting[index].records))
    return counts


def _finish(shards, counts, conversion: Conversion, place: Workplace, key: str, broken, notes) -> SegmentationInfo:
    splits = list(dict.fromkeys(shard.split for shard in shards))
    of_split = {split: [shard for shard in shards if shard.split == split] for split in splits}
    split_counts = {split: [counts[shard.key] for shard in of_split[split]] for split in splits}
    for split, parts in split_counts.items():
        if not any(part.names for part in parts):
            raise UserError(_nothing_left(split, [why for part in parts for why in part.left_out.values()]))
        if not any(part.tiles for part in parts):
            raise UserError(f"split {split} has no tile with a labelled pixel; check its labels")
    info = describe(conversion, split_counts, broken, notes)
    files = {
        split: [place.shards / f"{shard.key}.parquet" for shard in of_split[split] if counts[shard.key].tiles]
        for split in splits
    }
    card = render_card(conversion, info, split_counts)
    with file_errors(place.folder):
        put_in_place(place, key, files, card)
    for name, why in info.left_out.items():
        print(f"left out: {name} ({why})", file=sys.stderr)
    return info


def _leave(place: Workplace, error: BaseException) -> None:
    """After a failure: remove the workplace if nothing is finished in it, else say that it goes on from there."""
    finished = len(list(place.shards.glob("*.json")))
    if not finished:
        clean(place)
        return
    kept = f"{finished} finished part(s) are kept in {place.folder}: the same command goes on from there"
    if isinstance(error, UserError):
        raise UserError(f"{error}; {kept}") from None
    print(kept, file=sys.stderr)
