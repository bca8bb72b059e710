"""What a reader of raw imagery gives to the converter: one image with its labels, and what its headers say beforehand."""

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np


@dataclass(frozen=True)
class SourceHeader:
    """What is known of an image without decoding it.

    Attributes:
        name: of the image; unique in its split.
        height, width: in pixels.
        identity: changes whenever a file behind the image does: sizes and times of files, checksums of archive members.
        labelled: whether it has a label.
        eroded: whether it has a second label with eroded boundaries.
        georeferenced: whether it has a CRS or a transform.
    """

    name: str
    height: int
    width: int
    identity: str
    labelled: bool = True
    eroded: bool = False
    georeferenced: bool = False


@dataclass(frozen=True)
class SourceImage:
    """One decoded image with its labels.

    Attributes:
        name: as in its header.
        image: uint8 (H, W, C), the bands of the reader in their order.
        label: uint8 (H, W), class indices and 255; None without labels. Pixels without data are 255.
        label_eroded: the same with the pixels near object borders at 255, or None.
        crs: coordinate reference system as `EPSG:n` or WKT, or None.
        transform: (a, b, c, d, e, f) of the affine map x = a column + b row + c, y = d column + e row + f from pixel
            corners to coordinates, or None.
        report: number of pixels of each mask value that became 255 because nobody says what it means.
        off_palette: number of label pixels that are not exactly one of the dataset's colours and were decoded to the
            nearest one.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None
    label_eroded: np.ndarray | None = None
    crs: str | None = None
    transform: tuple[float, float, float, float, float, float] | None = None
    report: dict[str, int] = field(default_factory=dict)
    off_palette: int = 0


class SourceReader(Protocol):
    """Reads the images of one dataset. It and the records it takes are sent to other processes, so they must be picklable.

    `bands` names the channels of every image; the first three are what people look at.
    """

    bands: tuple[str, ...]

    def header(self, record: Any) -> SourceHeader:
        """Name, size and identity of an image, from file headers alone.

        Raises:
            UserError: a file is missing, no image, claims an absurd size, or image and label differ in size.
        """

    def read(self, record: Any) -> SourceImage:
        """Decode an image and its labels.

        Raises:
            UserError: a file is damaged; the message names it.
        """
