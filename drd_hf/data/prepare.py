"""Writing a prepared dataset: tiles as parquet files beside a dataset card that says what they are."""

import io
import os
import re
import shutil
import signal
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import DatasetInfo, Features, SplitDict, SplitInfo, Value
from datasets import Image as ImageFeature
from huggingface_hub import DatasetCard, DatasetCardData
from PIL import Image
from tqdm.auto import tqdm

from drd_hf.data.facts import DatasetFacts
from drd_hf.data.splits import SPLITS, SegmentationInfo
from drd_hf.data.tiles import cut_tiles, rescale, tile_origins
from drd_hf.errors import UserError, nearest

FEATURES = Features(
    {
        "image": ImageFeature(),
        "label": ImageFeature(),
        "source": Value("string"),
        "row": Value("int32"),
        "column": Value("int32"),
    }
)
TEMPLATE = Path(__file__).parents[1] / "templates" / "dataset_card.md.jinja"
TILES_PER_ROW_GROUP = 100
BYTES_PER_SHARD = 500_000_000

# A reader turns one record into image uint8 (H, W, 3), label uint8 (H, W) of class indices and 255, the source's name,
# and a report: how many pixels of which mask value it set to 255 because nobody says what they mean.
Reader = Callable[[Any], tuple[np.ndarray, np.ndarray, str, dict[str, int]]]


def prepare_dataset(
    sources: Mapping[str, Sequence[Any]],
    reader: Reader,
    facts: DatasetFacts,
    output: str | Path,
    tile_size: int = 512,
    stride: int | None = None,
    scale: float = 1.0,
    num_proc: int = 1,
    overwrite: bool = False,
) -> SegmentationInfo:
    """Cut images with labels into tiles and write them as a dataset that `load_splits` and the Hub can read.

    Args:
        sources: for each of train, validation and test (at least one of them) the records to read, one per image.
        reader: function from a record to `(image, label, name, report)`, see `Reader`. With `num_proc` above 1 it
            and the records are sent to other processes, so they must be picklable.
        output: folder to write: `README.md` and `data/SPLIT-0000i-of-0000n.parquet` with the columns image and label
            (lossless PNG), source (name of the image), row and column (of the tile's first pixel).
        tile_size: height and width of a tile in pixels.
        stride: pixels from one tile to the next; `tile_size` if not given. Less makes overlapping tiles.
        scale: resample images by this factor before they are cut.
        num_proc: number of processes. The files do not depend on it. Memory grows by about one image with its tiles
            per process.
        overwrite: replace a dataset that is already there, once the new one is complete.

    The folder appears when it is complete; if anything fails nothing of it is left.

    Raises:
        UserError: wrong options, an output that exists, an empty split, or whatever the reader finds wrong.
    """
    stride = tile_size if stride is None else stride
    tile_origins(0, tile_size, stride)  # refuse wrong sizes before any work
    rescale(np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8), scale)
    if num_proc < 1:
        raise UserError(f"num_proc is {num_proc}; give at least 1")
    for split, records in sources.items():
        if split not in SPLITS:
            raise UserError(f"unknown split {split!r}; nearest: {nearest(split, SPLITS)}")
        if not records:
            raise UserError(f"split {split} has no images; add some or leave the split out")
    if not sources:
        raise UserError(f"no split was given; give at least one of {', '.join(SPLITS)}")
    output = Path(output)
    _check_output(output, overwrite)

    output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = output.with_name(f"{output.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        (unfinished / "data").mkdir(parents=True)
        read = partial(_read_tiles, reader=reader, facts=facts, tile_size=tile_size, stride=stride, scale=scale)
        splits = [split for split in SPLITS if split in sources]
        written = {split: _write_split(split, sources[split], read, num_proc, unfinished / "data") for split in splits}
        info = _describe(facts, written, tile_size, stride, scale)
        (unfinished / "README.md").write_text(_render_card(facts, info, written), encoding="utf-8")
        _move_into_place(unfinished, output)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return info


def _check_output(output: Path, overwrite: bool) -> None:
    if not (output.exists() or output.is_symlink()):
        return
    if output.is_dir() and not output.is_symlink() and not any(output.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{output}: exists already; give another --output, or --overwrite to replace the dataset")
    card = output / "README.md"
    if output.is_symlink() or not card.is_file() or "\nsegmentation:" not in card.read_text(encoding="utf-8"):
        raise UserError(
            f"{output}: is not a dataset that this tool wrote, so it is not replaced; give another --output"
        )


def _move_into_place(unfinished: Path, output: Path) -> None:
    if not output.exists():
        os.replace(unfinished, output)
        return
    old = output.with_name(f"{output.name}.old-{uuid.uuid4().hex[:8]}")
    os.replace(output, old)
    try:
        os.replace(unfinished, output)
    except BaseException:
        os.replace(old, output)
        raise
    shutil.rmtree(old)


def _read_tiles(record: Any, reader: Reader, facts: DatasetFacts, tile_size: int, stride: int, scale: float):
    """One record -> its name, the rows of its tiles, its pixels per label (256 counts), the reader's report."""
    image, label, name, report = reader(record)
    image, label = rescale(image, label, scale)
    counts = np.bincount(label.ravel(), minlength=256)
    wrong = [value for value in np.flatnonzero(counts) if value >= len(facts.classes) and value != facts.ignore_index]
    if wrong:
        raise UserError(f"{name}: label {wrong[0]} is none of the {len(facts.classes)} classes of {facts.name}")
    rows = [
        {
            "image": {"bytes": _png(image_tile), "path": None},
            "label": {"bytes": _png(label_tile), "path": None},
            "source": name,
            "row": row,
            "column": column,
        }
        for row, column, image_tile, label_tile in cut_tiles(image, label, tile_size, stride)
    ]
    return name, rows, counts, report


def _png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    # On aerial images level 3 takes half the time of the default 6, and the files are no larger.
    Image.fromarray(array).save(file, format="PNG", compress_level=3)
    return file.getvalue()


def _ordered_map(function: Callable[[Any], Any], items: Sequence[Any], num_proc: int) -> Iterator[Any]:
    """`map` over processes, in order, with at most one finished result waiting per process."""
    if num_proc == 1:
        yield from map(function, items)
        return
    # Ctrl-C is for the parent, which then stops the workers.
    ignore_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)
    executor = ProcessPoolExecutor(min(num_proc, len(items)), initializer=ignore_interrupt)
    try:
        waiting = deque()
        for item in items:
            waiting.append(executor.submit(function, item))
            if len(waiting) > num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(f"a process died, most likely out of memory; use fewer than num_proc {num_proc}") from None
    finally:
        executor.shutdown(cancel_futures=True)


def _write_split(split: str, records: Sequence[Any], read: Callable, num_proc: int, folder: Path) -> dict[str, Any]:
    """Write the parquet files of one split; what was written."""
    names, counts, report = set(), np.zeros(256, np.int64), Counter()

    def rows(results):
        for name, tiles, source_counts, source_report in results:
            if name in names:
                raise UserError(f"split {split} has two images named {name}; names must differ")
            names.add(name)
            np.add(counts, source_counts, out=counts)
            report.update(source_report)
            yield from tiles

    with (
        closing(_ordered_map(read, records, num_proc)) as results,
        tqdm(results, total=len(records), desc=split, unit="image") as shown,
    ):
        num_tiles, num_bytes = _write_shards(rows(shown), folder, split)
    if not num_tiles:
        raise UserError(f"split {split} has no tile with a labelled pixel; check its labels")
    return {"tiles": num_tiles, "bytes": num_bytes, "sources": len(names), "counts": counts, "report": report}


def _write_shards(rows: Iterable[dict], folder: Path, split: str) -> tuple[int, int]:
    """Write rows to `folder/SPLIT-0000i-of-0000n.parquet`; number of rows and of image bytes."""
    num_rows = num_bytes = shard_bytes = 0
    paths, writer, rows = [], None, iter(rows)
    try:
        while group := list(islice(rows, TILES_PER_ROW_GROUP)):
            if writer is None:
                paths.append(folder / f"{split}-{len(paths):05d}.parquet")
                writer, shard_bytes = pq.ParquetWriter(paths[-1], FEATURES.arrow_schema), 0
            writer.write_table(pa.Table.from_pylist(group, schema=FEATURES.arrow_schema))
            group_bytes = sum(len(row[column]["bytes"]) for row in group for column in ("image", "label"))
            num_rows, num_bytes, shard_bytes = (
                num_rows + len(group),
                num_bytes + group_bytes,
                shard_bytes + group_bytes,
            )
            if shard_bytes >= BYTES_PER_SHARD:
                writer.close()
                writer = None
    finally:
        if writer is not None:
            writer.close()
    for i, path in enumerate(paths):
        path.rename(folder / f"{split}-{i:05d}-of-{len(paths):05d}.parquet")
    return num_rows, num_bytes


def _describe(facts: DatasetFacts, written: dict, tile_size: int, stride: int, scale: float) -> SegmentationInfo:
    shares = {split: (result["counts"] / result["counts"].sum()).round(6) for split, result in written.items()}
    return SegmentationInfo(
        name=facts.name,
        id2label=facts.id2label,
        colors=tuple(c.color for c in facts.classes),
        ignore_index=facts.ignore_index,
        tile_size=tile_size,
        stride=stride,
        scale=float(scale),
        num_tiles={split: result["tiles"] for split, result in written.items()},
        num_sources={split: result["sources"] for split, result in written.items()},
        pixel_shares={
            split: {name: float(share[i]) for i, name in facts.id2label.items()} for split, share in shares.items()
        },
        ignored_shares={split: float(share[facts.ignore_index]) for split, share in shares.items()},
        license=facts.license,
        unknown_pixels=dict(sum((result["report"] for result in written.values()), Counter()).most_common(20)),
    )


def _render_card(facts: DatasetFacts, info: SegmentationInfo, written: dict) -> str:
    splits = SplitDict()
    for split, result in written.items():
        splits.add(SplitInfo(split, num_bytes=result["bytes"], num_examples=result["tiles"]))
    num_bytes = sum(result["bytes"] for result in written.values())
    features = DatasetInfo(features=FEATURES, splits=splits, download_size=num_bytes, dataset_size=num_bytes)
    # The Hub takes identifiers such as cc0-1.0; any other terms are "other" there and stand in the text.
    license_id = info.license if re.fullmatch(r"[a-z0-9.-]+", info.license or "") else "other"
    data = DatasetCardData(
        **({"license": license_id} if info.license else {}),
        task_categories=["image-segmentation"],
        pretty_name=info.name,
        tags=["semantic-segmentation", "aerial-imagery", "drd_hf"],
        configs=[
            {
                "config_name": "default",
                "data_files": [{"split": split, "path": f"data/{split}-*.parquet"} for split in written],
            }
        ],
        dataset_info=features._to_yaml_dict(),
        segmentation=info.to_card(),
    )
    card = DatasetCard.from_template(data, template_path=str(TEMPLATE), facts=facts, info=info)
    return f"{str(card).rstrip()}\n"
