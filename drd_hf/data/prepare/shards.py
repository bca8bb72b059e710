"""One part of a prepared dataset: the tiles of a few sources as a parquet file, and what was counted in them."""

import hashlib
import io
import json
import os
import pickle
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import datasets
import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from drd_hf import __version__
from drd_hf.data.facts import IGNORE_INDEX, DatasetFacts
from drd_hf.data.source import SourceHeader, SourceImage, SourceReader
from drd_hf.data.tiles import cut_tiles, rescale, scaled_size, tile_at, tile_origins
from drd_hf.errors import UserError

FORMAT = 1  # raise it when the same sources give other files or other counts
PIXELS_PER_SHARD = 32_000_000  # of tiles; a Potsdam image is one shard
TILES_PER_ROW_GROUP = 50  # also what is held in memory beside the source
Z_RLE = 3  # zlib strategy: aerial pixels are noise, for which searching longer matches than runs does not pay


@dataclass(frozen=True)
class Conversion:
    """What is the same for all shards. `eroded` and `georeferenced` say whether any source is, so which columns there are."""

    reader: SourceReader
    facts: DatasetFacts
    tile_size: int
    stride: int
    scale: float
    eroded: bool
    georeferenced: bool

    @property
    def features(self) -> Features:
        extra = {"extra_bands": List(ImageFeature())} if len(self.reader.bands) > 3 else {}
        eroded = {"label_eroded": ImageFeature()} if self.eroded else {}
        place = {"crs": Value("string"), "transform": List(Value("float64"))} if self.georeferenced else {}
        image = {"image": ImageFeature(), **extra, "label": ImageFeature(), **eroded}
        return Features(image | {"source": Value("string"), "row": Value("int32"), "column": Value("int32")} | place)


@dataclass(frozen=True)
class Shard:
    """A unit of work. `key` names its files and changes with everything that their bytes depend on."""

    split: str
    records: tuple[Any, ...]
    headers: tuple[SourceHeader, ...]
    key: str


@dataclass
class ShardCounts:
    """What a finished shard holds. Pixels are those of the sources at the scale of the tiles, each counted once.

    `labels[value]` counts pixels of labelled sources, `bands[i][value]` those of a band that hold data.
    """

    labels: list[int]
    bands: list[list[int]]
    file_bytes: int = 0
    image_bytes: int = 0
    tiles: int = 0
    names: list[str] = field(default_factory=list)
    unknown: dict[str, int] = field(default_factory=dict)
    off_palette: dict[str, int] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def plan_shards(
    split: str, records: Sequence[Any], headers: Sequence[SourceHeader], conversion: Conversion
) -> list[Shard]:
    """Consecutive sources of a split in groups of about `PIXELS_PER_SHARD` pixels of tiles."""
    groups, pixels = [[]], 0
    for record, header in zip(records, headers, strict=True):
        if pixels >= PIXELS_PER_SHARD:
            groups.append([])
            pixels = 0
        groups[-1].append((record, header))
        height, width = scaled_size(header.height, header.width, conversion.scale)
        rows, columns = (tile_origins(n, conversion.tile_size, conversion.stride) for n in (height, width))
        pixels += len(rows) * len(columns) * conversion.tile_size**2
    shards = []
    for group in groups:
        group_records, group_headers = (tuple(x) for x in zip(*group, strict=True))
        shards.append(Shard(split, group_records, group_headers, _key(group_records, group_headers, conversion)))
    return shards


def _key(records, headers, conversion: Conversion) -> str:
    codecs = PIL.__version__, pa.__version__, datasets.__version__, np.__version__
    options = conversion.tile_size, conversion.stride, conversion.scale, conversion.eroded, conversion.georeferenced
    classes = len(conversion.facts.classes), conversion.facts.ignore_index
    groups = PIXELS_PER_SHARD, TILES_PER_ROW_GROUP
    facts = repr((FORMAT, __version__, codecs, options, classes, groups, [asdict(header) for header in headers]))
    # Pickles hold every field of reader and records, and the same command makes the same ones again.
    return hashlib.sha256(facts.encode() + pickle.dumps((conversion.reader, records), protocol=4)).hexdigest()[:32]


def find_counts(shard: Shard, folder: Path) -> ShardCounts | None:
    """The counts of a shard that is finished in `folder`, or None."""
    try:
        counts = ShardCounts(**json.loads((folder / f"{shard.key}.json").read_text(encoding="utf-8")))
        return counts if (folder / f"{shard.key}.parquet").stat().st_size == counts.file_bytes else None
    except (OSError, ValueError, TypeError):
        return None


def convert_shard(shard: Shard, conversion: Conversion, folder: Path, skip_broken: bool) -> ShardCounts:
    """Write `folder/KEY.parquet`, then `folder/KEY.json` with its counts, each of which appears when it is complete."""
    counts = ShardCounts([0] * 256, [[0] * 256 for _ in conversion.reader.bands])
    temporary = folder / f"{shard.key}.{os.getpid()}.tmp"
    try:
        _write_parquet(temporary, _shard_rows(shard, conversion, skip_broken, counts), conversion.features)
        counts.file_bytes = temporary.stat().st_size
        os.replace(temporary, folder / f"{shard.key}.parquet")
        write_file(folder / f"{shard.key}.json", json.dumps(asdict(counts)))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error}); make room or repair it") from None
    finally:
        temporary.unlink(missing_ok=True)
    return counts


def write_file(path: Path, text: str) -> None:
    """Write a text file that is there whole or not at all, also after a power failure."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _write_parquet(path: Path, rows: Iterator[dict], features: Features) -> None:
    schema = features.arrow_schema
    # PNGs are compressed already; dictionaries and statistics of them would only cost time and space.
    plain = [name for name in ("source", "crs") if name in features]
    options = {"compression": "none", "use_dictionary": plain, "write_statistics": ["source", "row", "column"]}
    with open(path, "wb") as file:
        with pq.ParquetWriter(file, schema, **options) as writer:
            while group := list(islice(rows, TILES_PER_ROW_GROUP)):
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
        file.flush()
        os.fsync(file.fileno())


def _shard_rows(shard: Shard, conversion: Conversion, skip_broken: bool, counts: ShardCounts) -> Iterator[dict]:
    for record, header in zip(shard.records, shard.headers, strict=True):
        try:
            source = _read_source(record, header, conversion)
        except UserError as error:
            if not skip_broken:
                raise
            counts.left_out[header.name] = reason(error)
            continue
        _check_labels(source, conversion.facts)
        for row in _source_rows(source, conversion):
            counts.tiles += 1
            counts.image_bytes += sum(len(image["bytes"]) for image in _images(row))
            yield row
        _count(source, counts)
        del source  # before the next one is read


def reason(error: Exception) -> str:
    """The message of an error without the folders of this machine, for a card."""
    text = str(error)
    folder = str(PurePath(text.partition(": ")[0]).parent)
    return text if folder == "." else text.replace(folder.rstrip("/\\") + os.sep, "")


def _read_source(record: Any, header: SourceHeader, conversion: Conversion) -> SourceImage:
    """Read a source, see that it is what its header said, and bring it to the scale of the tiles."""
    source = conversion.reader.read(record)
    if conversion.reader.header(record) != header or source.name != header.name:
        raise UserError(f"{header.name}: has changed since the conversion began; start again")
    expected = header.height, header.width, len(conversion.reader.bands)
    if source.image.dtype != np.uint8 or source.image.shape != expected:
        raise UserError(
            f"{source.name}: is {source.image.dtype} of shape {source.image.shape}, but should be uint8 of {expected}"
        )
    for label in (source.label, source.label_eroded):
        if label is not None and (label.dtype != np.uint8 or label.shape != expected[:2]):
            raise UserError(
                f"{source.name}: its label is {label.dtype} of shape {label.shape}, but should be uint8 of {expected[:2]}"
            )
    image, label, eroded = (
        None if array is None else rescale(array, conversion.scale)
        for array in (source.image, source.label, source.label_eroded)
    )
    transform = source.transform
    if transform is not None and conversion.scale != 1:
        a, b, c, d, e, f = transform
        y, x = header.height / image.shape[0], header.width / image.shape[1]
        transform = (a * x, b * y, c, d * x, e * y, f)
    return SourceImage(source.name, image, label, eroded, source.crs, transform, source.report, source.off_palette)


def _check_labels(source: SourceImage, facts: DatasetFacts) -> None:
    for label in (source.label, source.label_eroded):
        if label is None:
            continue
        for value, pixels in enumerate(histogram(label)):
            if pixels and value >= len(facts.classes) and value != facts.ignore_index:
                raise UserError(
                    f"{source.name}: label {value} is none of the {len(facts.classes)} classes of {facts.name}"
                )


def _source_rows(source: SourceImage, conversion: Conversion) -> Iterator[dict]:
    size = conversion.tile_size
    for row, column, image, label in cut_tiles(source.image, source.label, size, conversion.stride):
        content = {"image": _png(image[..., :3])}
        if image.shape[2] > 3:
            content["extra_bands"] = [_png(image[..., band]) for band in range(3, image.shape[2])]
        content["label"] = None if label is None else _png(label)
        if conversion.eroded:
            eroded = source.label_eroded
            content["label_eroded"] = None if eroded is None else _png(tile_at(eroded, row, column, size))
        content |= {"source": source.name, "row": row, "column": column}
        if conversion.georeferenced:
            content |= {"crs": source.crs, "transform": tile_transform(source.transform, row, column)}
        yield content


def tile_transform(transform: Sequence[float] | None, row: int, column: int) -> list[float] | None:
    """The affine map (a, b, c, d, e, f) of a source, moved to the tile whose first pixel is (row, column)."""
    if transform is None:
        return None
    a, b, c, d, e, f = map(float, transform)
    return [a, b, c + a * column + b * row, d, e, f + d * column + e * row]


def _png(array: np.ndarray) -> dict[str, Any]:
    file = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(array))
    image.save(file, format="PNG", compress_level=1, compress_type=Z_RLE)
    return {"bytes": file.getvalue(), "path": None}


def _images(row: dict) -> list[dict]:
    images = [row["image"], *row.get("extra_bands", ()), row["label"], row.get("label_eroded")]
    return [image for image in images if image is not None]


def _count(source: SourceImage, counts: ShardCounts) -> None:
    counts.names.append(source.name)
    counts.unknown = dict(Counter(counts.unknown) + Counter(source.report))
    if source.off_palette:
        counts.off_palette[source.name] = int(source.off_palette)
    labels = [0] * 256 if source.label is None else histogram(source.label)
    counts.labels = [a + b for a, b in zip(counts.labels, labels, strict=True)]
    bands = [histogram(source.image[..., band]) for band in range(source.image.shape[2])]
    if min(band[0] for band in bands) and (source.label is None or labels[IGNORE_INDEX]):
        empty = _pixels_without_data(source)
        for band in bands:
            band[0] -= empty
    counts.bands = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(counts.bands, bands, strict=True)]


def histogram(array: np.ndarray) -> list[int]:
    """How many pixels of a uint8 (H, W) array have each of the values 0 to 255, without a copy of the whole array."""
    counts = np.zeros(256, np.int64)
    for start in range(0, array.shape[0], 512):
        counts += Image.fromarray(np.ascontiguousarray(array[start : start + 512])).histogram()
    return counts.tolist()


def _pixels_without_data(source: SourceImage) -> int:
    """Number of pixels that have no label and are 0 in all bands: readers give these where an image has no data."""
    pixels = 0
    for start in range(0, source.image.shape[0], 512):
        rows = np.s_[start : start + 512]
        empty = source.image[rows][..., 0] == 0
        for band in range(1, source.image.shape[2]):
            empty &= source.image[rows][..., band] == 0
        if source.label is not None:
            empty &= source.label[rows] == IGNORE_INDEX
        pixels += int(np.count_nonzero(empty))
    return pixels
