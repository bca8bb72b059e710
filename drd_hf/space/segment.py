"""From an uploaded image to its class map, and the small pictures of both that a page shows."""

import base64
import io
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp, Resampling
from rasterio.io import DatasetReader

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.rasters import DAMAGE
from drd_hf.errors import UserError
from drd_hf.features import input_channels
from drd_hf.inference.maps import class_colors
from drd_hf.inference.raster import model_fingerprint, predict_raster
from drd_hf.models import bands_of, colors_of, load_image_processor, load_teacher
from drd_hf.space.images import copy_upright, opened, preview, reading, reduced

MAX_PIXELS = 40_000_000  # a tile of ISPRS Potsdam has 36 million


@dataclass(frozen=True, eq=False)
class Segmentation:
    """A finished class map and what a page shows of it.

    Attributes:
        file: the map, as `predict_raster` writes it: a GeoTIFF of a TIFF, a palette PNG of a PNG or JPEG.
        height, width: of the image in pixels.
        crs: its reference system in words, None without one.
        shares: of the pixels with data, one for each class; they add up to 1.
        no_data: share of all pixels that have no data.
        image, classes: JPEG of the image and PNG of the map, transparent where there is no data; both of the same size,
            1600 pixels at most.
    """

    file: Path
    height: int
    width: int
    crs: str | None
    shares: tuple[float, ...]
    no_data: float
    image: bytes
    classes: bytes


class Segmenter:
    """A model of a Space, loaded once.

    Attributes:
        names, colors: of the classes, in label order.
        bands: names of the bands that the model reads, or None where they have none; `num_bands` says how many.
        num_parameters: of the model.
    """

    def __init__(self, model: str):
        self.model = load_teacher(model)
        if not type(self.model).__name__.endswith("ForSemanticSegmentation"):
            raise UserError(f"{model}: a Space needs a semantic segmentation model, not a {type(self.model).__name__}")
        self.processor, config = load_image_processor(model), self.model.config
        self.names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        self.colors = tuple(colors_of(config) or class_colors(self.names))
        self.bands, self.num_bands = bands_of(config), input_channels(self.model)
        self.num_parameters = self.model.num_parameters()
        self._fingerprint = model_fingerprint(self.model, self.processor)

    @property
    def reads(self) -> str:
        """The bands in words: `3 bands (red, green, blue)`."""
        bands = self.bands or (["red", "green", "blue"] if self.num_bands == 3 else [])
        return f"{self.num_bands} band{'s' * (self.num_bands != 1)}" + (f" ({', '.join(bands)})" if bands else "")

    def __call__(self, upload: str | Path, folder: Path) -> Segmentation:
        """Segment an image.

        Args:
            upload: a TIFF, PNG or JPEG file.
            folder: for the map, which gets the name of the upload.

        Raises:
            UserError: no such image, too many pixels, other bands than the model reads, or a damaged file. The message
                speaks to who uploaded it, and names no path.
        """
        upload = Path(upload)
        with tempfile.TemporaryDirectory() as temporary, reading():
            # What is read from here on is a TIFF that was written here, whatever was sent.
            source = Path(temporary) / f"{upload.stem}.tif"
            with opened(upload) as dataset:
                self._check(dataset)
                ending = ".tif" if dataset.driver == "GTiff" else ".png"
                try:
                    copy_upright(dataset, source)
                except DAMAGE:
                    raise UserError("The file is damaged or cut short.") from None
            file = folder / f"{upload.stem}-classes{ending}"
            try:
                predict_raster(
                    *(self.model, self.processor, source, file),
                    colors=self.colors,
                    fingerprint=self._fingerprint,
                )
            except UserError as error:
                message = str(error).replace(str(source), "The image").replace(str(file), "The class map")
                raise UserError(message) from None
            with rasterio.open(source) as image, rasterio.open(file) as classes:
                counts = _counts(classes)
                known = counts[: len(self.names)]
                return Segmentation(
                    file=file,
                    height=image.height,
                    width=image.width,
                    crs=_crs(image),
                    shares=tuple(float(share) for share in known / max(known.sum(), 1)),
                    no_data=float(counts[IGNORE_INDEX] / counts.sum()),
                    image=_jpeg(preview(image)),
                    classes=_png(reduced(classes, [1], Resampling.mode)[0], self.colors),
                )

    def _check(self, dataset: DatasetReader) -> None:
        pixels = dataset.height * dataset.width
        if pixels > MAX_PIXELS:
            raise UserError(
                f"The image has {dataset.width:,} × {dataset.height:,} pixels: {pixels / 1e6:,.0f} million, and "
                f"{MAX_PIXELS / 1e6:.0f} million are the limit here. Upload a part of it."
            )
        palette = dataset.count == 1 and dataset.colorinterp[0] == ColorInterp.palette
        alpha = dataset.count > 1 and dataset.colorinterp[-1] == ColorInterp.alpha
        count = 3 if palette and self.num_bands == 3 else dataset.count - alpha
        if self.num_bands not in (count, dataset.count):
            raise UserError(
                f"The image has {count} band{'s' * (count != 1)}, the model reads {self.reads}. "
                "Upload one that has these bands, in this order."
            )
        if others := sorted(set(dataset.dtypes) - {"uint8"}):
            raise UserError(
                f"The image has {', '.join(others)} values, the model reads 8 bits a band. Convert it first."
            )


def data_uri(content: bytes) -> str:
    """A JPEG or PNG as the address of an <img>: it is in the page, and nobody else can fetch it."""
    kind = "png" if content.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _crs(dataset: DatasetReader) -> str | None:
    if not dataset.crs:
        return None
    code = dataset.crs.to_epsg()
    return f"EPSG:{code}" if code else "a local reference system"


def _counts(classes: DatasetReader) -> np.ndarray:
    """How many pixels have each of the values 0..255."""
    counts = np.zeros(256, np.int64)
    for row in range(0, classes.height, 512):
        window = rasterio.windows.Window(0, row, classes.width, min(512, classes.height - row))
        counts += np.bincount(classes.read(1, window=window).ravel(), minlength=256)
    return counts


def _jpeg(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "JPEG", quality=88)
    return content.getvalue()


def _png(classes: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> bytes:
    picture = Image.fromarray(classes).convert("P")
    palette = [value for color in colors for value in color]
    picture.putpalette(palette + [0] * (3 * 256 - len(palette)))  # a short one would cut off the bits of IGNORE_INDEX
    content = io.BytesIO()
    picture.save(content, "PNG", transparency=IGNORE_INDEX, optimize=False)
    return content.getvalue()
