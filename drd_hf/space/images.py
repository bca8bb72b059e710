"""Images that somebody uploads, opened with care, and small pictures of them."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import DatasetReader

from drd_hf.data.rasters import DAMAGE
from drd_hf.errors import UserError

PREVIEW = 1600  # longest side in pixels of what the page shows
# No other: GDAL has formats that name further files and addresses, which it then reads for whoever uploads them.
DRIVERS = ("GTiff", "PNG", "JPEG")
# Nothing but the file itself counts, and a JPEG that is cut short is no grey area.
GDAL_OPTIONS = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_ERROR_ON_LIBJPEG_WARNING": True,
    "GDAL_PAM_ENABLED": False,
}


@contextlib.contextmanager
def reading() -> Iterator[None]:
    """The settings of GDAL in which uploads are read."""
    with rasterio.Env(**GDAL_OPTIONS), warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def opened(path: Path) -> DatasetReader:
    """A TIFF, PNG or JPEG file for reading.

    Raises:
        UserError: it is none. The message speaks to who uploaded it, and names no path.
    """
    for driver in DRIVERS:
        try:
            dataset = rasterio.open(path, driver=driver)
        except DAMAGE:
            continue
        if dataset.count:
            return dataset
        dataset.close()
    raise UserError("This is no PNG, JPEG or TIFF image, or it is damaged.")


def upright(pixels: np.ndarray, dataset: DatasetReader) -> np.ndarray:
    """Pixels (h, w, ...) of a raster as viewers show them: photographs say in EXIF how the camera was held."""
    orientation = dataset.tags().get("EXIF_Orientation", "1")
    if orientation in ("5", "6", "7", "8"):  # lies on its side
        pixels = pixels.swapaxes(0, 1)
    if orientation in ("3", "4", "7", "8"):
        pixels = pixels[::-1]
    if orientation in ("2", "3", "6", "7"):
        pixels = pixels[:, ::-1]
    return pixels


def copy_upright(dataset: DatasetReader, destination: Path) -> None:
    """Write a raster as a TIFF that any reader shows as it is meant."""
    if dataset.tags().get("EXIF_Orientation", "1") == "1":
        rasterio.shutil.copy(dataset, destination, driver="GTiff", tiled=True, strict=False)
        return
    pixels = upright(dataset.read().transpose(1, 2, 0), dataset)
    height, width, count = pixels.shape
    profile = {"driver": "GTiff", "dtype": pixels.dtype, "count": count, "height": height, "width": width}
    with rasterio.open(destination, "w", tiled=True, **profile) as turned:
        turned.write(pixels.transpose(2, 0, 1))


def preview(dataset: DatasetReader) -> np.ndarray:
    """uint8 (h, w, 3) of a raster, 1600 pixels at most: its first three bands, or the first one in grey."""
    if dataset.colorinterp[0] == ColorInterp.palette:
        palette = np.zeros((256, 3), np.uint8)
        for index, color in dataset.colormap(1).items():
            palette[index] = color[:3]
        return palette[reduced(dataset, [1], Resampling.nearest)[0]]
    bands = [1, 2, 3] if dataset.count >= 3 else [1, 1, 1]
    return reduced(dataset, bands, Resampling.average).transpose(1, 2, 0)


def thumbnail(path: Path) -> Image.Image:
    """A small picture of an example.

    Raises:
        UserError: it is no image.
    """
    try:
        with reading(), opened(path) as dataset:
            picture = Image.fromarray(np.ascontiguousarray(upright(preview(dataset), dataset)))
    except (UserError, *DAMAGE):
        raise UserError(f"{path}: is no PNG, JPEG or TIFF image of 8 bits, leave it out of the examples") from None
    picture.thumbnail((320, 320))
    return picture


def reduced(dataset: DatasetReader, bands: Sequence[int], resampling: Resampling) -> np.ndarray:
    """Pixels (bands, h, w) of a raster, 1600 at most on the longest side."""
    scale = min(1, PREVIEW / max(dataset.height, dataset.width))
    shape = [max(1, round(side * scale)) for side in (dataset.height, dataset.width)]
    return dataset.read(bands, out_shape=(len(bands), *shape), resampling=resampling)
