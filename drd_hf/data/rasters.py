"""8-bit rasters from files and from members of zips: size and georeference of the header, pixels, where there is data."""

import io
import re
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import rasterio
from affine import Affine, loadsw
from PIL import Image, TiffImagePlugin
from rasterio._err import CPLE_BaseError
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from drd_hf.data.archives import SourceFile, local_file
from drd_hf.errors import UserError

MAX_PIXELS = 2**30  # larger than any single orthophoto tile in use; still stops decompression bombs
MAX_RATIO = 2000  # bytes of pixels to bytes of file: deflate, LZW and JPEG stay below even for a constant image
MAX_RATIO_MODERN = 2**16  # the same for zstd, LZMA, WebP and LERC in TIFF
CHUNK_BYTES = 2**20
# What Pillow and GDAL raise for files that are not what they claim to be.
DAMAGE = (
    *(RasterioError, CPLE_BaseError, OSError, EOFError, SyntaxError, UserWarning, struct.error, SystemError),
    *(ValueError, TypeError, LookupError, AttributeError, OverflowError),
)
INTEGERS = {"uint8", "int8", "uint16", "int16", "uint32", "int32"}
TAIL_BYTES = 4096  # PNG and JPEG must have their end mark in so many last bytes; some tools append a little
# GDAL takes a JPEG inside a TIFF that ends early for a whole one unless it is told not to.
GDAL_OPTIONS = {
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,
    "GDAL_PAM_ENABLED": False,
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
}
NO_COMPRESSION, MODERN_COMPRESSIONS = 1, (34887, 34925, 50000, 50001)
WIDTH, HEIGHT, BITS, COMPRESSION, SAMPLES = 256, 257, 258, 259, 277  # TIFF tags
STRIP_OFFSETS, STRIP_COUNTS, TILE_OFFSETS, TILE_COUNTS, NO_DATA = 273, 279, 324, 325, 42113

Transform = tuple[float, float, float, float, float, float]


@dataclass(frozen=True)
class RasterHeader:
    """What a raster says about itself.

    Attributes:
        height, width: in pixels.
        count: bands that `read_raster` gives: alpha is left out, a palette counts as its three colours.
        dtype: numpy name of the values; "uint8" unless other integers are allowed.
        crs: coordinate reference system as `EPSG:n` or WKT, or None.
        transform: (a, b, c, d, e, f) of x = a column + b row + c, y = d column + e row + f from pixel corners to
            coordinates, or None.
        alpha: whether there is one more band, the last one, marked as transparency.
    """

    height: int
    width: int
    count: int
    dtype: str
    crs: str | None = None
    transform: Transform | None = None
    alpha: bool = False


@dataclass(frozen=True, eq=False)
class Raster:
    """Decoded pixels.

    Attributes:
        pixels: uint8 (H, W, C), contiguous; another integer type where that is allowed.
        valid: bool (H, W), False where alpha, a no-data value or a mask says that there is no data; None where all
            pixels are valid.
        crs, transform: as in `RasterHeader`.
    """

    pixels: np.ndarray
    valid: np.ndarray | None
    crs: str | None = None
    transform: Transform | None = None


def raster_header(source: str | Path | SourceFile, integers: bool = False) -> RasterHeader:
    """Size, bands and georeference of a TIFF, PNG or JPEG file, without decoding it.

    A world file beside it (`.tfw` and the like) counts where the file itself has no georeference.

    Args:
        integers: take integers of any width, not only 8-bit values.

    Raises:
        UserError: the file is missing, of another kind, not 8-bit, cut short, or claims more pixels than it can hold.
    """
    source = _source_file(source)
    with _reading(source), source.open() as file:
        kind = _check_file(source, file)
        if kind == "JPEG":
            with _open_jpeg(source, file) as image:
                count = 1 if image.mode == "L" else 3
                return RasterHeader(image.height, image.width, count, "uint8", None, _world_file(source))
        with _open_dataset(source.open, kind) as dataset:
            return _header(source, dataset, integers)


def read_raster(source: str | Path | SourceFile, bands: Sequence[int] | None = None, integers: bool = False) -> Raster:
    """Decode a TIFF, PNG or JPEG file.

    Args:
        bands: numbers of the bands to read, from 1, in the order wanted. A band that is asked for is data even when
            the file marks it as alpha, and palette indices stay indices. If not given: all bands but alpha, and a
            palette becomes its colours.
        integers: take integers of any width, not only 8-bit values; the pixels keep their type.

    Raises:
        UserError: as `raster_header`; the pixels are damaged; or a band is not there.
    """
    source = _source_file(source)
    # A member of a zip is read whole: only then its checksum tells whether it is right.
    with _reading(source):
        opener = source.open if source.local_path else partial(io.BytesIO, source.read_bytes())
        with opener() as file:
            kind = _check_file(source, file)
            if kind == "JPEG":
                return _read_jpeg(source, file, bands)
        with _open_dataset(opener, kind) as dataset:
            return _read_dataset(source, dataset, bands, integers)


def _source_file(source: str | Path | SourceFile) -> SourceFile:
    return source if isinstance(source, SourceFile) else local_file(source)


def _open_dataset(opener: Callable[[], BinaryIO], driver: str) -> DatasetReader:
    """GDAL reads through `opener` and sees nothing but that one file: no sidecar, no path that the file names."""
    return rasterio.open(Path("raster"), driver=driver, sharing=False, opener=lambda path, mode="rb": opener())


def _check_file(source: SourceFile, file: BinaryIO) -> str:
    """The kind of a file (its driver in GDAL) by its first bytes; an error if its end is missing."""
    start = file.read(16)
    if start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        _check_tiff(source, file, start)
        kind = "GTiff"
    elif start.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")):
        kind, end = ("PNG", b"IEND\xaeB`\x82") if start[0] == 0x89 else ("JPEG", b"\xff\xd9")
        if source.local_path or isinstance(file, io.BytesIO):  # elsewhere the end costs as much as all of it
            file.seek(max(source.size - TAIL_BYTES, 0))
            if end not in file.read():
                raise UserError(f"{source}: is cut short; get it again")
    else:
        raise UserError(f"{source}: is no TIFF, PNG or JPEG file; convert it to one of them")
    file.seek(0)
    return kind


def _check_tiff(source: SourceFile, file: BinaryIO, start: bytes) -> None:
    """An error if a strip or tile lies behind the end of the file or was never written: GDAL would give zeros."""
    if start[:4] == b"MM\0+":
        return  # a big-endian BigTIFF, which Pillow does not parse; GDAL judges it alone
    directory = TiffImagePlugin.ImageFileDirectory_v2(start if start[2] == 43 else start[:8])
    file.seek(directory.next)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow only warns of a directory that is cut short
        directory.load(file)
    offsets = directory.get(TILE_OFFSETS, directory.get(STRIP_OFFSETS))
    counts = directory.get(TILE_COUNTS, directory.get(STRIP_COUNTS))
    if offsets is None or counts is None or len(offsets) != len(counts):
        raise UserError(f"{source}: is damaged, its strips or tiles are not listed; get it again")
    offsets, counts = (np.array(values, np.uint64).astype(np.float64) for values in (offsets, counts))
    if (offsets + counts).max() > source.size:
        raise UserError(f"{source}: is cut short, strips or tiles lie behind its end; get it again")
    if not counts.all() and NO_DATA not in directory:
        raise UserError(
            f"{source}: {int((counts == 0).sum())} of its strips or tiles were never written; get it again"
        )
    if counts.all():  # else sparse, and no-data where nothing is stored
        compression = directory.get(COMPRESSION, NO_COMPRESSION)
        ratio = MAX_RATIO_MODERN if compression in MODERN_COMPRESSIONS else MAX_RATIO
        pixel_bytes = directory.get(SAMPLES, 1) * min(directory.get(BITS, (1,))) / 8
        ratio = 1 if compression == NO_COMPRESSION else ratio
        _check_size(source, directory.get(HEIGHT, 0), directory.get(WIDTH, 0), pixel_bytes, counts.sum(), ratio)


def _check_size(source: SourceFile, height: int, width: int, pixel_bytes: float, stored: float, ratio: int) -> None:
    if height * width > MAX_PIXELS:
        raise UserError(f"{source}: claims {width}x{height} pixels, more than {MAX_PIXELS}; cut it into smaller files")
    if height * width * pixel_bytes > ratio * stored:
        raise UserError(
            f"{source}: claims {width}x{height} pixels, which {source.size} bytes cannot hold; get it again"
        )


def _header(source: SourceFile, dataset: DatasetReader, integers: bool) -> RasterHeader:
    _check_size(source, dataset.height, dataset.width, 1 / 8, source.size, MAX_RATIO_MODERN)
    bits = {dataset.tags(band, ns="IMAGE_STRUCTURE").get("NBITS", "8") for band in dataset.indexes}
    dtypes = set(dataset.dtypes)
    if len(dtypes) > 1 or not dtypes <= (INTEGERS if integers else {"uint8"}):
        raise UserError(f"{source}: has {', '.join(sorted(dtypes))} values; convert it to 8 bits a band")
    if dtypes == {"uint8"} and bits != {"8"} and not _has_palette(dataset):
        raise UserError(f"{source}: has {min(bits)} bits a band; convert it to 8 bits a band")
    alpha = dataset.count > 1 and dataset.colorinterp[-1] == ColorInterp.alpha
    count = 3 if _has_palette(dataset) else dataset.count - alpha
    crs = dataset.crs
    if crs is not None:
        epsg = crs.to_epsg(confidence_threshold=100)
        crs = f"EPSG:{epsg}" if epsg else crs.to_wkt()
    known = dataset.transform != Affine.identity()
    transform = tuple(float(value) for value in dataset.transform[:6]) if known else _world_file(source)
    return RasterHeader(dataset.height, dataset.width, count, dataset.dtypes[0], crs or None, transform, alpha)


def _has_palette(dataset: DatasetReader) -> bool:
    return dataset.count == 1 and dataset.colorinterp[0] == ColorInterp.palette


def _read_dataset(source: SourceFile, dataset: DatasetReader, bands: Sequence[int] | None, integers: bool) -> Raster:
    header = _header(source, dataset, integers)
    palette = _has_palette(dataset) and bands is None
    chosen = tuple(bands or range(1, dataset.count - header.alpha + 1))
    _check_bands(source, chosen, dataset.count)
    if dataset.driver == "PNG":  # GDAL has a fast way for whole PNG files only
        pixels = np.ascontiguousarray(dataset.read(chosen).transpose(1, 2, 0))
    else:
        pixels = np.empty((dataset.height, dataset.width, len(chosen)), header.dtype)
        # Strips of rows: band after band goes into the interleaved pixels while the rows are in the cache.
        block = dataset.block_shapes[0][0]
        rows = block * max(CHUNK_BYTES // (block * dataset.width * len(chosen)), 1)
        for row in range(0, dataset.height, rows):
            height = min(rows, dataset.height - row)
            chunk = dataset.read(chosen, window=Window(0, row, dataset.width, height))
            for band, values in enumerate(chunk):
                pixels[row : row + height, :, band] = values
    valid = None
    flags = {flag for band in dataset.mask_flag_enums for flag in band}
    if palette:
        colors = np.zeros((256, 4), np.uint8)
        for index, color in dataset.colormap(1).items():
            colors[index] = color
        valid = (colors[:, 3] > 0)[pixels[..., 0]]
        pixels = colors[:, :3][pixels[..., 0]]
    elif flags != {MaskFlags.all_valid} and not (header.alpha and dataset.count in chosen):
        valid = dataset.dataset_mask() > 0
    if valid is not None and valid.all():
        valid = None
    return Raster(pixels, valid, header.crs, header.transform)


@contextmanager
def _open_jpeg(source: SourceFile, file: BinaryIO) -> Iterator[Image.Image]:
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = None  # checked in open() only
        image = Image.open(file, formats=["JPEG"])
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    with image:
        _check_size(source, image.height, image.width, 1, source.size, MAX_RATIO)
        yield image


def _read_jpeg(source: SourceFile, file: BinaryIO, bands: Sequence[int] | None) -> Raster:
    with _open_jpeg(source, file) as image:
        pixels = np.asarray(image if image.mode == "L" else image.convert("RGB"))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if bands is not None:
        _check_bands(source, bands, pixels.shape[2])
        pixels = pixels[..., [band - 1 for band in bands]]
    return Raster(np.ascontiguousarray(pixels), None, None, _world_file(source))


def _check_bands(source: SourceFile, bands: Sequence[int], count: int) -> None:
    if wrong := [band for band in bands if not 1 <= band <= count]:
        raise UserError(f"{source}: has no band {wrong[0]}, it has {count}")


def _world_file(source: SourceFile) -> Transform | None:
    ending = Path(source.name).suffix.lower()
    for world in (f".{ending[1:2]}{ending[-1:]}w", f"{ending}w", ".wld"):
        if found := source.beside(world):
            try:
                return tuple(float(value) for value in loadsw(found.read_bytes().decode("ascii"))[:6])
            except (ValueError, TypeError):
                raise UserError(f"{found}: is no world file of six numbers; correct or remove it") from None
    return None


@contextmanager
def _reading(source: SourceFile) -> Iterator[None]:
    """Failures of the decoders as one line that names the file."""
    try:
        with rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except UserError:
        raise
    except DAMAGE as error:
        while error.__cause__ is not None:
            error = error.__cause__
        reason = " ".join(re.sub(r"'?/vsi\S+", "", str(error)).split())
        raise UserError(f"{source}: is damaged or cut short ({reason}); get it again") from None
