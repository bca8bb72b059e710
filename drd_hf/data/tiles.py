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
    image: np.ndarray, label: np.ndarray | None, tile_size: int, stride: int
) -> Iterator[tuple[int, int, np.ndarray, np.ndarray | None]]:
    """Yield `(row, column, image tile, label tile)` from top left to bottom right.

    Args:
        image: uint8 (H, W, C).
        label: uint8 (H, W), 255 where ignored; None if there is none.

    Tiles are (tile_size, tile_size, C) and (tile_size, tile_size), see `tile_at`. Tiles whose pixels are all ignored
    are left out; without a label there are none to leave out.
    """
    if image.ndim != 3 or label is not None and image.shape[:2] != label.shape:
        shape = None if label is None else label.shape
        raise UserError(f"image of shape {image.shape} and label of shape {shape} do not fit together")
    for row in tile_origins(image.shape[0], tile_size, stride):
        for column in tile_origins(image.shape[1], tile_size, stride):
            label_tile = None if label is None else tile_at(label, row, column, tile_size)
            if label_tile is None or (label_tile != IGNORE_INDEX).any():
                yield row, column, tile_at(image, row, column, tile_size), label_tile


def tile_at(array: np.ndarray, row: int, column: int, tile_size: int) -> np.ndarray:
    """The tile whose first pixel is (row, column) of an image (H, W, C) or a label (H, W); a view where it can be.

    What lies right of or below a small image is its reflection in the tile of an image and 255 in that of a label.
    """
    tile = array[row : row + tile_size, column : column + tile_size]
    bottom, right = tile_size - tile.shape[0], tile_size - tile.shape[1]
    if not (bottom or right):
        return tile
    if array.ndim == 2:
        return np.pad(tile, ((0, bottom), (0, right)), constant_values=IGNORE_INDEX)
    return np.pad(tile, ((0, bottom), (0, right), (0, 0)), mode="reflect")


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


def scaled_size(height: int, width: int, scale: float) -> tuple[int, int]:
    """Height and width after `rescale`; at least one pixel each."""
    if not 0 < scale <= 16:
        raise UserError(f"scale is {scale}; give a factor above 0 and at most 16, such as 0.5")
    return max(round(height * scale), 1), max(round(width * scale), 1)


def rescale(array: np.ndarray, scale: float) -> np.ndarray:
    """Resample an image (H, W, C) or a label (H, W) of uint8 by `scale`: 0.5 turns 5 cm ground sampling into 10 cm.

    An image is averaged over areas when it shrinks and interpolated bicubically when it grows; a label takes the
    nearest pixel.
    """
    height, width = scaled_size(*array.shape[:2], scale)
    if scale == 1:
        return array
    if array.ndim == 2:
        return np.asarray(Image.fromarray(array).resize((width, height), Image.Resampling.NEAREST))
    image_filter = Image.Resampling.BOX if scale < 1 else Image.Resampling.BICUBIC
    # Band by band: Pillow takes a fourth band for alpha and weighs the others with it.
    scaled = np.empty((height, width, array.shape[2]), np.uint8)
    for band in range(array.shape[2]):
        one = Image.fromarray(np.ascontiguousarray(array[..., band]))
        scaled[..., band] = np.asarray(one.resize((width, height), image_filter))
    return scaled
