"""Tiles of a prepared dataset put together again to the images that they were cut from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
from datasets import IterableDataset

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.transforms import decode, undecoded
from drd_hf.errors import UserError


@dataclass(frozen=True)
class JoinedSource:
    """One image that is whole again.

    Attributes:
        number: its place among the images of the split, from 0.
        name: of the image.
        image: uint8 (H, W, C), all bands of the dataset.
        references: by column, uint8 (H, W): class ids, and 255 where ignored; None where the image has no such label.
        row, column: where its first pixel lies in the image that was cut: not (0, 0) where the tiles above or left of
            it had no label and were left out.
        filled_pixels: pixels that lie in no tile; they have the mean colour of the others and are ignored.
        tiles: number of tiles it was made of.
    """

    number: int
    name: str
    image: np.ndarray
    references: dict[str, np.ndarray | None]
    row: int
    column: int
    filled_pixels: int
    tiles: int


def joined_sources(
    dataset, columns: Sequence[str] = ("label",), rank: int = 0, world_size: int = 1
) -> Iterator[JoinedSource]:
    """The images of a split one after the other; one is in memory at a time, with its compressed tiles.

    Args:
        dataset: a split of `load_splits`, streamed or not.
        columns: of the references, `label` and `label_eroded`.
        rank, world_size: only every `world_size`-th image, beginning with image `rank`.

    Raises:
        UserError: no such column, or tiles of an image that do not stand together.
    """
    features = list(dataset.features or ())
    for name in columns:
        if name not in features:
            raise UserError(
                f"the dataset has no column {name}: prepare it with that reference, or evaluate on another"
            )
    bands = ["image", "extra_bands"] if "extra_bands" in features else ["image"]
    dataset = dataset.with_format(None).select_columns([*bands, *columns, "source", "row", "column"])
    dataset = undecoded(dataset)
    own_only = not isinstance(dataset, IterableDataset) and world_size > 1
    if own_only:  # a stream is read by all ranks
        of_tiles = dataset["source"][:]
        numbers = {name: i for i, name in enumerate(dict.fromkeys(of_tiles))}
        dataset = dataset.select([i for i, name in enumerate(of_tiles) if numbers[name] % world_size == rank])
    seen = set()
    for i, (name, tiles) in enumerate(groupby(dataset, key=itemgetter("source"))):
        if name in seen:
            raise UserError(f"the tiles of {name} do not stand together: pass a split as load_splits gives it")
        seen.add(name)
        number = i * world_size + rank if own_only else i
        if number % world_size != rank:
            continue
        try:
            source = join_tiles(list(tiles), columns, number)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        yield source
        del source  # before the next one is read


def join_tiles(tiles: Sequence[Mapping], columns: Sequence[str] = ("label",), number: int = 0) -> JoinedSource:
    """The image that `cut_tiles` cut into these tiles, and its labels.

    What lay in no tile, because the tiles there had no labelled pixel, is ignored; inside the rectangle around the
    tiles it is filled with their mean colour, beyond it is cut off. The reflection that completed a small image to a
    tile is cut off as well.

    Args:
        tiles: rows of one source, with the columns `image`, `row`, `column`, `columns` and perhaps `extra_bands`;
            images as `decode` takes them.
    """
    rows, lefts = ([tile[name] for tile in tiles] for name in ("row", "column"))
    top, left = min(rows), min(lefts)
    first = _bands_of(tiles[0])
    size = first.shape[0]
    height, width = max(rows) - top + size, max(lefts) - left + size
    image = np.zeros((height, width, first.shape[2]), np.uint8)
    references = {
        name: None
        if all(tile[name] is None for tile in tiles)
        else np.full((height, width), IGNORE_INDEX, dtype=np.uint8)
        for name in columns
    }
    covered = np.zeros((height, width), bool)
    for tile, row, column in zip(tiles, rows, lefts, strict=True):
        place = np.s_[row - top : row - top + size, column - left : column - left + size]
        image[place] = _bands_of(tile)
        covered[place] = True
        for name, reference in references.items():
            if reference is not None and tile[name] is not None:
                reference[place] = decode(tile[name])[0].numpy()

    known = np.zeros((height, width), bool)
    for reference in references.values():
        if reference is not None:
            known |= reference != IGNORE_INDEX
    own_height = _length_before_reflection(image, known) if top == 0 and height == size else height
    own_width = width
    if left == 0 and width == size:
        own_width = _length_before_reflection(image.swapaxes(0, 1), known.T)
    own = np.s_[:own_height, :own_width]
    image, covered = image[own], covered[own]
    filled = int(covered.size - np.count_nonzero(covered))
    if filled:
        image[~covered] = np.rint(image[covered].mean(axis=0)).astype(np.uint8)
    return JoinedSource(
        number=number,
        name=tiles[0]["source"],
        image=np.ascontiguousarray(image),
        references={k: None if v is None else np.ascontiguousarray(v[own]) for k, v in references.items()},
        row=top,
        column=left,
        filled_pixels=filled,
        tiles=len(tiles),
    )


def _bands_of(tile: Mapping) -> np.ndarray:
    """uint8 (h, w, C) of a tile with all its bands."""
    planes = [decode(tile["image"]), *(decode(band) for band in tile.get("extra_bands") or ())]
    return np.concatenate([plane.numpy() for plane in planes]).transpose(1, 2, 0)


def _length_before_reflection(image: np.ndarray, known: np.ndarray) -> int:
    """Rows of the image that `cut_tiles` reflected to get this one; all rows if it did not.

    Only unlabelled rows can be a reflection. The shortest image that fits is taken.
    """
    length = len(image)
    labelled = np.flatnonzero(known.any(axis=1))
    for own in range(labelled[-1] + 1 if len(labelled) else 1, length):
        if not np.array_equal(image[own], image[max(own - 2, 0)]):
            continue
        padding = ((0, length - own), (0, 0), (0, 0))
        if np.array_equal(np.pad(image[:own], padding, mode="reflect"), image):
            return int(own)
    return length
