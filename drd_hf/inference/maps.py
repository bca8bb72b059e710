"""Class maps as files: parts written row by row, and the GeoTIFF or PNG that is made of them."""

import colorsys
import json
import xml.etree.ElementTree as ET
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.io import DatasetReader, DatasetWriter
from rasterio.windows import Window

from drd_hf.data.facts import CITYSCAPES, IGNORE_INDEX, ISPRS_CLASSES

RUN_TAG = "DRD_HF_RUN"
PROBABILITY_SCALE = 0.004  # 250 is 1; 255 has to stay free
ROWS = 512  # that are copied or checked at a time
# Unfinished files are in strips: they are written once, from top to bottom. Windows begin at multiples of 32 rows.
UNFINISHED = {"driver": "GTiff", "dtype": "uint8", "nodata": IGNORE_INDEX, "blockysize": 16, "interleave": "pixel"}
UNFINISHED |= {"compress": "deflate", "zlevel": 1, "bigtiff": "IF_SAFER"}
# Level 5 instead of 6: maps are 7 % larger and made in three quarters of the time. Threads change no byte.
COG = {"driver": "COG", "compress": "deflate", "level": 5, "num_threads": "ALL_CPUS"}
COG |= {"blocksize": 512, "bigtiff": "IF_SAFER"}
OVERVIEWS = {"map": "MODE", "probabilities": "AVERAGE"}


@dataclass(frozen=True)
class WrittenMap:
    """An unfinished file, with the checksum (CRC-32) of all rows of each band: closing one on a full disk is no error."""

    height: int
    checksums: tuple[int, ...]
    has_data: bool


class MapWriter:
    """Writes uint8 (bands, rows, width) from the first row to the last; `written` afterwards says what was written."""

    def __init__(self, path: Path, height: int, width: int, bands: int):
        self.path, self.height, self.row = path, height, 0
        self.checksums, self.has_data = [0] * bands, False
        self.dataset = rasterio.open(path, "w", height=height, width=width, count=bands, **UNFINISHED)

    def write(self, rows: np.ndarray) -> None:
        window = Window(0, self.row, rows.shape[2], rows.shape[1])
        self.dataset.write(rows, window=window)
        self.row += rows.shape[1]
        self.checksums = [zlib.crc32(np.ascontiguousarray(b), c) for b, c in zip(rows, self.checksums, strict=True)]
        self.has_data = self.has_data or bool((rows[0] != IGNORE_INDEX).any())

    def close(self) -> WrittenMap:
        self.dataset.close()
        return WrittenMap(self.height, tuple(self.checksums), self.has_data)


def part_path(folder: Path, kind: str, index: int) -> Path:
    return folder / f"{kind}-{index}.tif"


def close_part(writer: MapWriter) -> None:
    """Say beside a part that it is whole, and what it holds."""
    writer.path.with_suffix(".json").write_text(json.dumps(asdict(writer.close())))


def describe(
    dataset: DatasetWriter,
    kind: str,
    source: DatasetReader | None,
    names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    tags: Mapping[str, str],
) -> None:
    """Write the georeference of `source` (None: none), names, colours and tags, before any pixels."""
    if source is not None:
        _copy_georeference(source, dataset)
    dataset.update_tags(**tags, CLASSES=json.dumps(list(names)))
    if kind == "map":
        dataset.set_band_description(1, "class")
        dataset.write_colormap(1, {i: (*color, 255) for i, color in enumerate(colors)} | {IGNORE_INDEX: (0, 0, 0, 0)})
    else:
        dataset.scales = [PROBABILITY_SCALE] * dataset.count
        for band, name in enumerate(names, 1):
            dataset.set_band_description(band, name)


def join_parts(
    folder: Path, kind: str, count: int, describe_whole: Callable[[MapWriter], None]
) -> tuple[Path, WrittenMap]:
    """One file of all parts; a single one was described when it was opened, and is the whole."""
    paths = [part_path(folder, kind, index) for index in range(count)]
    parts = [WrittenMap(**json.loads(path.with_suffix(".json").read_text())) for path in paths]
    whole = folder / f"{kind}.tif"
    if count == 1:
        return paths[0].replace(whole), parts[0]
    with rasterio.open(paths[0]) as first:
        width, bands = first.width, first.count
    writer = MapWriter(whole, sum(part.height for part in parts), width, bands)
    with writer.dataset:
        describe_whole(writer)
        for path, part in zip(paths, parts, strict=True):
            _check(path, part, writer.write)
            path.unlink()
        return whole, writer.close()


def finish_map(path: Path, written: WrittenMap, final: Path, names: Sequence[str]) -> None:
    """Make the GeoTIFF or PNG, and read it back: a full disk can go unnoticed while files are closed.

    Raises:
        OSError: what was read is not what was written.
    """
    if final.suffix == ".png":
        rasterio.shutil.copy(path, final, driver="PNG", strict=True, WRITE_METADATA_AS_TEXT="YES")
    else:
        kind = path.stem
        rasterio.shutil.copy(path, final, strict=True, overview_resampling=OVERVIEWS[kind], **COG)
        if kind == "map":
            _write_category_names(final, names)
    path.unlink()
    _check(final, written)


def run_of(path: Path) -> str | None:
    """The tag that says from what, by which model and with which options a file was made."""
    try:
        with rasterio.open(path) as dataset:
            return dataset.tags().get(RUN_TAG)
    except rasterio.errors.RasterioError:
        return None


def class_colors(names: Sequence[str]) -> tuple[tuple[int, int, int], ...]:
    """Those of ISPRS or Cityscapes where the classes are theirs, else hues a golden section apart."""
    for classes in (ISPRS_CLASSES, CITYSCAPES.dataset.classes):
        known = {c.name: c.color for c in classes}
        if set(names) <= set(known):
            return tuple(known[name] for name in names)
    hues = (colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65, 0.95 - 0.25 * (i % 2)) for i in range(len(names)))
    return tuple(tuple(round(255 * value) for value in color) for color in hues)


def _check(path: Path, written: WrittenMap, use=lambda rows: None) -> None:
    """Read a file from top to bottom and compare it with what was written; `use` gets the rows."""
    checksums = [0] * len(written.checksums)
    with rasterio.open(path) as dataset:
        for row in range(0, dataset.height, ROWS):
            rows = dataset.read(window=Window(0, row, dataset.width, min(ROWS, dataset.height - row)))
            checksums = [zlib.crc32(band, checksum) for band, checksum in zip(rows, checksums, strict=True)]
            use(rows)
    if checksums != list(written.checksums):
        raise OSError("what was written cannot be read back")


def _copy_georeference(source: DatasetReader, target) -> None:
    if not source.transform.is_identity:
        target.transform = source.transform
    if source.crs:
        target.crs = source.crs
    gcps, crs = source.gcps
    if gcps:
        target.gcps = (gcps, crs)
    if source.rpcs:
        target.rpcs = source.rpcs


def _write_category_names(raster: Path, names: Sequence[str]) -> None:
    """Class names where GIS programs look for those of a palette: a TIFF has no place for them, rasterio no call."""
    root = ET.Element("PAMDataset")
    categories = ET.SubElement(ET.SubElement(root, "PAMRasterBand", band="1"), "CategoryNames")
    for name in names:
        ET.SubElement(categories, "Category").text = name
    ET.ElementTree(root).write(raster.with_name(f"{raster.name}.aux.xml"), encoding="utf-8")
