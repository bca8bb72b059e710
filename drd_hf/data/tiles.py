"""Cutting images and labels into tiles, and which of its pixels a tile is the first to cover."""

from collections.abc import Iterable, Iterator

import numpy as np
from PIL import Image

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError


def tile_origins(length: int, tile_size: int, stride: int) -> list[int]:
    """First pixels of the tiles that cover `length` pixels, ascending.

    Tiles start every `stride` pixels; the last one is shifted inward to end at the border, so that no pixel is lost.
    A `length` of at most `tile_size` gives `[0]`.

    >>> tile_origins(1000, 512, 256)
    [0, 256, 488]
    """
    if tile_size < 1:
        raise UserError(f"tile_size is {tile_size}; give a positive number of pixels")
    if not 1 <= stride <= tile_size:
        raise UserError(f"stride is {stride}; give 1 to tile_size ({tile_size}), or pixels between tiles are lost")
    last = max(length - tile_size, 0)
    return [*range(0, last, stride), last]


def cut_tiles(
    image: np.ndarray, label: np.ndarray, tile_size: int, stride: int
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
    """Yield `(row, column, image tile, label tile)` from top left to bottom right.

    Args:
        image: uint8 (H, W, 3).
        label: uint8 (H, W), 255 where ignored.

    Tiles are (tile_size, tile_size, 3) and (tile_size, tile_size). What lies right of or below a small image is
    its reflection in the image tile and 255 in the label tile. Tiles whose pixels are all ignored are left out.
    """
    height, width = label.shape
    if image.shape != (height, width, 3):
        raise UserError(f"image of shape {image.shape} and label of shape {label.shape} do not fit together")
    bottom, right = max(tile_size - height, 0), max(tile_size - width, 0)
    if bottom or right:
        image = np.pad(image, ((0, bottom), (0, right), (0, 0)), mode="reflect")
        label = np.pad(label, ((0, bottom), (0, right)), constant_values=IGNORE_INDEX)
    for row in tile_origins(height, tile_size, stride):
        for column in tile_origins(width, tile_size, stride):
            window = np.s_[row : row + tile_size, column : column + tile_size]
            if (label[window] != IGNORE_INDEX).any():
                yield row, column, image[window], label[window]


def covered_before(origins: Iterable[int], tile_size: int) -> dict[int, int]:
    """For each tile origin along one axis: how many of its first pixels the tile before it already covers.

    Give it the rows (or the columns) of all tiles of one source. A pixel belongs to the first tile that covers it,
    smallest row, then smallest column; so the tile at (row, column) owns
    `tile[covered_before(rows, size)[row]:, covered_before(columns, size)[column]:]`, and the owned parts of a full
    grid cover every pixel once. A tile that is absent because all its pixels are ignored takes only ignored pixels away.

    >>> covered_before([0, 256, 488], 512)
    {0: 0, 256: 256, 488: 280}
    """
    origins = sorted(set(origins))
    covered = dict.fromkeys(origins[:1], 0)
    for previous, origin in zip(origins, origins[1:], strict=False):
        covered[origin] = max(previous + tile_size - origin, 0)
    return covered


def rescale(image: np.ndarray, label: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Resample an image and its label by `scale`: 0.5 turns 5 cm ground sampling into 10 cm.

    The image is averaged over areas when it shrinks and interpolated bicubically when it grows; the label takes the
    nearest pixel. Shapes and dtypes as in `cut_tiles`.
    """
    if not 0 < scale <= 16:
        raise UserError(f"scale is {scale}; give a factor above 0 and at most 16, such as 0.5")
    if scale == 1:
        return image, label
    height, width = label.shape
    size = max(round(width * scale), 1), max(round(height * scale), 1)
    image_filter = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    return (
        np.asarray(Image.fromarray(image).resize(size, image_filter)),
        np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST)),
    )
