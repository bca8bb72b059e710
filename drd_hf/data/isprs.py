"""ISPRS Potsdam and Vaihingen from the files that people have: zips as downloaded, or folders as they unpack them."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from drd_hf.data.archives import SourceFile, list_readable
from drd_hf.data.facts import IGNORE_INDEX, DatasetFacts, Imagery, IsprsFacts
from drd_hf.data.rasters import Raster, RasterHeader, raster_header, read_raster
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.errors import UserError, nearest

REFERENCES = ("full", "eroded", "both")
BLOCK_PIXELS = 2**18  # temporaries of this size stay in the cache


@dataclass(frozen=True)
class IsprsRecord:
    """The files of one tile; `name` is the tile, such as `2_10`."""

    name: str
    image: SourceFile
    label: SourceFile
    label_eroded: SourceFile | None = None
    height: SourceFile | None = None

    @property
    def files(self) -> tuple[SourceFile, ...]:
        return tuple(file for file in (self.image, self.label, self.label_eroded, self.height) if file is not None)


@dataclass(frozen=True)
class IsprsReader:
    """Reads tiles, see `SourceReader`.

    Attributes:
        bands: names of the bands of an image, the height last.
        numbers: of the bands in the image files.
        colors: of the classes.
        eroded_only: whether `label` of a record is the reference without boundaries, where black is no error.
    """

    bands: tuple[str, ...]
    numbers: tuple[int, ...]
    colors: tuple[tuple[int, int, int], ...]
    eroded_only: bool = False

    def header(self, record: IsprsRecord) -> SourceHeader:
        image = raster_header(record.image)
        if image.count + image.alpha < max(self.numbers):
            raise UserError(f"{record.image}: has {image.count} bands, not {max(self.numbers)}; get it again")
        for file in (record.label, record.label_eroded):
            if file is not None:
                label = raster_header(file)
                _check_label(file, label.count, (label.height, label.width), (image.height, image.width))
        if record.height is not None:
            height = raster_header(record.height)
            _check_height(record.height, height.count, (height.height, height.width), (image.height, image.width))
        return SourceHeader(
            name=record.name,
            height=image.height,
            width=image.width,
            identity=" ".join((*(file.identity() for file in record.files), _georeference(image))),
            eroded=record.label_eroded is not None,
            georeferenced=image.crs is not None or image.transform is not None,
        )

    def read(self, record: IsprsRecord) -> SourceImage:
        image = read_raster(record.image, self.numbers)
        pixels, size = image.pixels, image.pixels.shape[:2]
        if _is_drawn(pixels):
            raise UserError(
                f"{record.image}: is no image, it holds only colours of labels; put images and labels into folders that "
                "say so, such as top and gts"
            )
        if record.height is not None:
            height = read_raster(record.height).pixels
            _check_height(record.height, height.shape[2], height.shape[:2], size)
            if height.shape[1] < size[1]:
                height = np.pad(height, ((0, 0), (0, 1), (0, 0)), mode="edge")
            pixels = np.concatenate((pixels, height), axis=2)
        if image.valid is not None:
            pixels[~image.valid] = 0
        label, report, off_palette = self._read_label(record.label, image, report_black=not self.eroded_only)
        eroded = None
        if record.label_eroded is not None:
            eroded, eroded_report, _ = self._read_label(record.label_eroded, image, report_black=False)
            report |= {f"{color} in label_eroded": count for color, count in eroded_report.items()}
        return SourceImage(
            name=record.name,
            image=pixels,
            label=label,
            label_eroded=eroded,
            crs=image.crs,
            transform=image.transform,
            report=report,
            off_palette=off_palette,
        )

    def _read_label(self, file: SourceFile, image: Raster, report_black: bool):
        raster = read_raster(file)
        _check_label(file, raster.pixels.shape[2], raster.pixels.shape[:2], image.pixels.shape[:2])
        label, report, off_palette = decode_colors(raster.pixels, self.colors)
        if not report_black:
            report.pop("0,0,0", None)
        for valid in (image.valid, raster.valid):
            if valid is not None:
                label[~valid] = IGNORE_INDEX
        return label, report, off_palette


def find_isprs(
    facts: IsprsFacts,
    source: str | Path,
    bands: str | None = None,
    height: bool = False,
    reference: str | None = None,
    validation: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    skip_broken: bool = False,
) -> tuple[dict[str, list[IsprsRecord]], IsprsReader, DatasetFacts, list[str]]:
    """The tiles of each split, what reads them, and what there is to tell about them.

    A file's part is found from its whole path below `source`, names of zips and folders included. Where images and
    labels share their file names, the nearest folder or zip whose name says so tells them apart, and files in folders
    that say nothing are images unless others are there. Where a file is there more than once, complete references win
    over those for participants, then folders over zips.

    Args:
        source: a folder, a zip, or a folder with zips in it (see `drd_hf.data.archives.list_files`).
        bands: name of one of `facts.imagery`; the first one if not given.
        height: add the normalised height as last band.
        reference: "full", "eroded" (boundaries are 255), or "both": `label` is full and `label_eroded` stands beside
            it. If not given: full, with eroded beside it for the tiles that have it.
        validation: train tiles that become the validation split; `facts.validation` if not given. Empty: no such split.
        leave_out: tiles not to use, or "train" or "test" for a whole split.
        skip_broken: go on without zips that cannot be read; stderr and the notes name them.

    Returns:
        Records of each split, their reader, the dataset's facts, and notes: what is missing, left out and used.

    Raises:
        UserError: wrong options, an unknown tile, no train tile left beside those for validation, nothing recognised,
            imagery that is not there or not to be told from labels, or a split with no complete tile.
    """
    name = facts.dataset.name
    imagery = _choose_imagery(facts, bands)
    if reference is not None and reference not in REFERENCES:
        raise UserError(f"reference is {reference!r}; give one of {', '.join(REFERENCES)}")
    if height and facts.height is None:
        raise UserError(f"{name} has no normalised height in 8 bits; leave height out")
    splits, notes = _choose_tiles(facts, validation, leave_out)

    files, left_out = list_readable(source, skip_broken)
    notes += left_out
    shows = {file: _shows(facts, file) for file in files} if facts.label_words else {}
    pictures = [file for file in files if shows.get(file) != "label"]
    images = {kind.name: _images(pictures, kind.pattern, shows) for kind in facts.imagery}
    full = _by_tile([file for file in files if shows.get(file, "label") == "label"], facts.label)
    eroded = _by_tile(files, facts.label_eroded)
    if not any((*images.values(), full, eroded)):
        raise UserError(
            f"{source}: no file of {name} among {len(files)} files; expected {facts.example}, in zips or not"
        )
    if not images[imagery.name]:
        found = ", ".join(f"{kind} ({len(tiles)} tiles)" for kind, tiles in images.items() if tiles) or "none"
        raise UserError(f"{source}: no {imagery.name} imagery of {name}; imagery found: {found}; choose it with bands")

    # What a tile must have.
    needed = {f"{imagery.name} image": images[imagery.name]}
    if reference != "eroded":
        needed["full reference"] = full
    if reference in ("eroded", "both"):
        needed["eroded reference"] = eroded
    heights = _by_tile(files, facts.height) if height else {}
    if height:
        needed["normalised height"] = heights
    beside = {} if reference in ("full", "eroded") else eroded
    first = eroded if reference == "eroded" else full

    records = {split: [] for split in splits}
    missing = {split: {} for split in splits}  # what tiles lack -> the tiles
    for split, tiles in splits.items():
        for tile in tiles:
            if lacking := " and ".join(what for what, found in needed.items() if tile not in found):
                missing[split].setdefault(lacking, []).append(tile)
            else:
                record = IsprsRecord(
                    tile, images[imagery.name][tile], first[tile], beside.get(tile), heights.get(tile)
                )
                records[split].append(record)
    if empty := [split for split, found in records.items() if not found]:
        lacks = "; ".join(f"{len(tiles)} without {what}" for what, tiles in missing[empty[0]].items())
        raise UserError(
            f"{source}: split {empty[0]} has no complete tile of {name} ({lacks}); add the files, choose another "
            f"reference, or leave the split's tiles out with leave_out"
        )
    if any(missing.values()):
        lacking = {}
        for what, tiles in (item for of_split in missing.values() for item in of_split.items()):
            lacking.setdefault(what, []).extend(tiles)
        lacks = "; ".join(f"{len(tiles)} without {what}: {' '.join(tiles)}" for what, tiles in lacking.items())
        complete, official = sum(map(len, records.values())), sum(map(len, splits.values()))
        notes.append(f"Not all files are there: {complete} of {official} tiles have all files; {lacks}.")
        print(f"{source}: {notes[-1]}", file=sys.stderr)
    notes += _reference_notes(reference, records)
    found = {record.name for of_split in records.values() for record in of_split}
    if used := [tile for tile in facts.error_tiles if tile in found]:
        notes.append(
            f"Papers often leave {' '.join(used)} out because its reference has errors; here that was not asked for."
        )
    reader = IsprsReader(
        bands=(*imagery.bands, "height") if height else imagery.bands,
        numbers=imagery.numbers,
        colors=tuple(c.color for c in facts.dataset.classes),
        eroded_only=reference == "eroded",
    )
    return records, reader, facts.dataset, notes


def decode_colors(
    pixels: np.ndarray, colors: Sequence[tuple[int, int, int]]
) -> tuple[np.ndarray, dict[str, int], int]:
    """Colour labels to class indices, every channel cut at 127: lossy files decode to the nearest colour.

    Args:
        pixels: uint8 (H, W, 3).
        colors: of the classes, each channel 0 or 255.

    Returns:
        label: uint8 (H, W); 255 where the colour is none of the classes.
        report: number of pixels of each such colour, written as "255,0,255".
        off_palette: number of pixels with a channel that is neither 0 nor 255.
    """
    corners = {(r, g, b): (r & 4) | (g & 2) | (b & 1) for r in (0, 255) for g in (0, 255) for b in (0, 255)}
    table = bytearray([IGNORE_INDEX]) * 256
    for index, color in enumerate(colors):
        table[corners[color]] = index
    others = {code: corner for corner, code in corners.items() if corner not in colors}

    height, width = pixels.shape[:2]
    label = np.empty((height, width), np.uint8)
    counts = dict.fromkeys(others, 0)
    off_palette = 0
    rows = max(BLOCK_PIXELS // max(width, 1), 1)
    for row in range(0, height, rows):
        block = pixels[row : row + rows]
        red, green, blue = (block[..., channel] >> 7 for channel in range(3))
        code = red << 2 | green << 1 | blue
        label[row : row + rows] = np.frombuffer(code.tobytes().translate(table), np.uint8).reshape(code.shape)
        for other in others:
            counts[other] += np.count_nonzero(code == other)
        between = block + np.uint8(1) > 1  # 255 wraps around to 0
        if between.any():
            off_palette += int(np.count_nonzero(between[..., 0] | between[..., 1] | between[..., 2]))
    report = {",".join(map(str, others[code])): int(count) for code, count in counts.items() if count}
    return label, report, off_palette


def _choose_imagery(facts: IsprsFacts, bands: str | None) -> Imagery:
    kinds = {kind.name: kind for kind in facts.imagery}
    if bands is None:
        return facts.imagery[0]
    if bands.upper() not in kinds:
        raise UserError(f"bands is {bands!r}; {facts.dataset.name} has {', '.join(kinds)}")
    return kinds[bands.upper()]


def _choose_tiles(
    facts: IsprsFacts, validation: Sequence[str] | None, leave_out: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """Tiles of each split, and notes on what differs from the official split."""
    out = set()
    for name in leave_out:
        out |= set({"train": facts.train, "test": facts.test}.get(name) or (_tile(name, facts.train + facts.test),))
    chosen = [_tile(name, facts.train) for name in (facts.validation if validation is None else validation)]
    if validation is not None and (both := out.intersection(chosen)):
        raise UserError(f"tile {min(both)} is in both validation and leave_out; keep it in one")
    splits = {
        "train": [tile for tile in facts.train if tile not in chosen],
        "validation": [tile for tile in facts.train if tile in chosen],
        "test": list(facts.test),
    }
    splits = {split: [tile for tile in tiles if tile not in out] for split, tiles in splits.items()}
    if splits["validation"] and not splits["train"]:
        raise UserError(
            f"no train tile is left, only {' '.join(splits['validation'])} for validation; choose fewer validation tiles"
        )
    notes = []
    if splits["validation"]:
        notes.append(f"Validation tiles, taken out of the official train split: {' '.join(splits['validation'])}.")
    if out:
        names = [tile for tile in facts.train + facts.test if tile in out]
        notes.append(f"Left out on request: {' '.join(names)}.")
    return {split: tiles for split, tiles in splits.items() if tiles}, notes


def _tile(name: str, known: Sequence[str]) -> str:
    """A tile as users may write it (02_10, area30) -> as the facts write it."""
    tile = "_".join(number.lstrip("0") for number in re.findall(r"\d+", str(name)))
    if tile not in known:
        raise UserError(f"tile {name!r} is none of {len(known)} tiles; nearest: {nearest(tile, known)}")
    return tile


def _shows(facts: IsprsFacts, file: SourceFile) -> str | None:
    """What the nearest folder or zip whose name says so holds: "image" or "label"; None where no name says it."""
    for folder in PurePosixPath(file.path.lower()).parents:
        words = set(re.split(r"[\W_]+", folder.name))
        if bool(words & facts.image_words) != bool(words & facts.label_words):
            return "image" if words & facts.image_words else "label"
    return None


def _candidates(files: Sequence[SourceFile], pattern: str) -> dict[str, list[SourceFile]]:
    """The files of each tile among those whose path matches, the best one first."""
    found = {}
    for file in sorted(files, key=_rank):
        if match := re.search(pattern, file.path, re.IGNORECASE):
            found.setdefault("_".join(match.groups()), []).append(file)
    return found


def _by_tile(files: Sequence[SourceFile], pattern: str) -> dict[str, SourceFile]:
    return {tile: candidates[0] for tile, candidates in _candidates(files, pattern).items()}


def _images(
    files: Sequence[SourceFile], pattern: str, shows: Mapping[SourceFile, str | None]
) -> dict[str, SourceFile]:
    """As `_by_tile`; folders that say that they hold images win, and two files in others must be the same."""
    images = {}
    for tile, candidates in _candidates(files, pattern).items():
        named = [file for file in candidates if not shows or shows[file] == "image"]
        images[tile] = first = (named or candidates)[0]
        for other in [] if named else candidates[1:]:
            if first.size != other.size or first.checksum() != other.checksum():
                raise UserError(
                    f"{first} and {other}: differ, and nothing says which is the image and which the label of "
                    f"{tile}; put them into folders that say so, such as top and gts"
                )
    return images


def _rank(file: SourceFile) -> tuple:
    return "for_participants" in file.path.lower(), bool(file.members), file.path.count("/"), file.path


def _reference_notes(reference: str | None, records: dict[str, list[IsprsRecord]]) -> list[str]:
    if reference == "eroded":
        return ["Labels are the reference with eroded boundaries: pixels near object borders are 255."]
    tiles = [record for split in records.values() for record in split]
    eroded = sum(record.label_eroded is not None for record in tiles)
    if not eroded:
        return ["Labels are the full reference."]
    some = "" if eroded == len(tiles) else f", whose files are there for {eroded} of {len(tiles)} tiles"
    return [f"Labels are the full reference; label_eroded is the one with eroded boundaries{some}."]


def _is_drawn(pixels: np.ndarray) -> bool:
    """Whether every value is 0 or 255, and not all 0: no photograph is."""
    rows = max(BLOCK_PIXELS // max(pixels.shape[1], 1), 1)
    blocks = (pixels[row : row + rows] for row in range(0, len(pixels), rows))
    return not any((block + np.uint8(1) > 1).any() for block in blocks) and bool(pixels.any())


def _check_label(file: SourceFile, count: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if count != 3:
        raise UserError(f"{file}: has {count} bands; a label is an RGB image in the contest's colours")
    if size != expected:
        raise UserError(
            f"{file}: is {size[1]}x{size[0]} but its image is {expected[1]}x{expected[0]} pixels; get it again"
        )


def _check_height(file: SourceFile, count: int, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if count != 1:
        raise UserError(f"{file}: has {count} bands; a height image has one")
    # Tile 3_13 of Potsdam lacks its last column.
    if size not in (expected, (expected[0], expected[1] - 1)):
        raise UserError(
            f"{file}: is {size[1]}x{size[0]} but its image is {expected[1]}x{expected[0]} pixels; get it again"
        )


def _georeference(image: RasterHeader) -> str:
    return f"{image.crs} {image.transform}"
