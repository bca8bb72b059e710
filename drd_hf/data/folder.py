"""Folders of images and masks: a YAML layout says which files pair up, what mask values mean and where the splits are."""

import colorsys
import glob
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml
from PIL import Image

from drd_hf.data.facts import IGNORE_INDEX, DatasetFacts, SegmentationClass
from drd_hf.data.rasters import raster_header, read_raster
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.data.splits import SPLITS
from drd_hf.errors import UserError, nearest

UNKNOWN = 254  # marks, inside this file only, a mask value that the layout does not name
IMAGE_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")  # 8 bits a channel
INDEX_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L", "I;16N")
RGB = ("red", "green", "blue")
ROWS_AT_A_TIME = 256
MAX_PIXELS = 2**30  # larger than any single orthophoto tile in use; still stops decompression bombs


@dataclass(frozen=True)
class FolderLayout:
    """What a layout file says. `codes[i]` is what class `i` looks like in a mask: a value, or a packed colour."""

    images: str
    masks: str
    classes: tuple[SegmentationClass, ...]
    codes: tuple[int, ...]
    ignore_codes: tuple[int, ...]
    by_color: bool
    splits: dict[str, tuple[str, ...]]
    name: str | None = None
    license: str | None = None
    citation: str | None = None
    description: str = ""
    may_be_shared: bool = True
    bands: tuple[str, ...] = ()

    def facts(self, name: str) -> DatasetFacts:
        """The dataset's facts; `name` is used where the layout gives none."""
        return DatasetFacts(
            self.name or name,
            self.classes,
            self.description,
            self.license,
            self.citation,
            may_be_shared=self.may_be_shared,
        )


@dataclass(frozen=True)
class FolderRecord:
    """One image with its mask; `name` is the image's path below the source folder."""

    image: Path
    mask: Path
    name: str


def read_layout(path: str | Path) -> FolderLayout:
    """Read a YAML layout file.

    Keys: `images` and `masks` (glob patterns below the source folder), `classes` (a list of `name` with either
    `color: [r, g, b]` for colour masks or `value: v` for index masks; a `value` may have a `color` to be drawn with),
    `splits` (train / validation / test, each a list of glob patterns on the image path), and optionally `ignore`
    (colours or values that become 255), `bands` (names of all bands of TIFF images, for example red, green, blue,
    near_infrared, height; without it a last band that is marked as alpha is transparency), `name`, `license`,
    `citation`, `description`, `may_be_shared` (false keeps the pixels out of cards and off the Hub).

    Raises:
        UserError: the file cannot be read, or a key is missing, unknown or wrong; the message names it.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a layout YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    texts = ("name", "license", "citation", "description")
    _check_keys(
        content,
        f"{path}",
        required=("images", "masks", "classes", "splits"),
        optional=("ignore", "bands", "may_be_shared", *texts),
    )
    for key in ("images", "masks", *texts):
        if key in content and not (isinstance(content[key], str) and content[key].strip()):
            raise UserError(f"{path}: {key} is {content[key]!r}; write it as text in quotes")
    if not isinstance(may_be_shared := content.get("may_be_shared", True), bool):
        raise UserError(f"{path}: may_be_shared is {may_be_shared!r}; write true or false")
    for key in ("images", "masks"):
        _check_pattern(content[key], f"{path}: {key}")

    classes, codes, by_color = _read_classes(content["classes"], path)
    ignore = content.get("ignore") or []
    if not isinstance(ignore, list):
        raise UserError(f"{path}: ignore is {ignore!r}; give a list of {'colours' if by_color else 'values'}")
    ignore_codes = tuple(_read_code(code, by_color, f"{path}: ignore") for code in ignore)
    if both := set(ignore_codes) & set(codes):
        raise UserError(f"{path}: {_show_code(min(both), by_color)} is both a class and in ignore; keep one")
    bands = content.get("bands") or []
    if (
        not isinstance(bands, list)
        or not all(isinstance(b, str) and b for b in bands)
        or 0 < len(bands) < 3
        or len(set(bands)) < len(bands)
    ):
        raise UserError(f"{path}: bands is {bands!r}; give a list of at least three different names")
    return FolderLayout(
        images=content["images"],
        masks=content["masks"],
        classes=classes,
        codes=codes,
        ignore_codes=ignore_codes,
        by_color=by_color,
        splits=_read_splits(content["splits"], path),
        may_be_shared=may_be_shared,
        bands=tuple(bands),
        **{key: content[key].strip() for key in texts if key in content},
    )


def find_pairs(layout: FolderLayout, source: str | Path) -> dict[str, list[FolderRecord]]:
    """The images of each split with their masks, sorted by name.

    An image and a mask belong together when the parts of their paths that the wildcards of the two patterns match
    are equal; file endings do not count. Hidden files are left out. A pattern of a split may match across folders:
    `"Tile 1/*"` takes everything below `Tile 1`.

    Raises:
        UserError: no images, an image without a mask or with two, in no split or in two, an empty split, a file
            outside `source`, or a name that is no Unicode.
    """
    source = Path(source)
    if not source.is_dir():
        raise UserError(f"{source}: is not a folder; give the folder with the images as --source")
    wildcards = [_pattern_regex(pattern).groups for pattern in (layout.images, layout.masks)]
    if wildcards[0] != wildcards[1]:
        raise UserError(
            f"the patterns images {layout.images!r} and masks {layout.masks!r} have {wildcards[0]} and {wildcards[1]} "
            "wildcards (*, ?, **) before the file ending; give both the same number, they are compared one by one"
        )
    masks = _files_by_key(source, layout.masks, "mask")
    mask_files = set(masks.values())
    images = _files_by_key(source, layout.images, "image", leave_out=mask_files)
    if not images:
        raise UserError(f"{source}: no image matches {layout.images!r}; correct images in the layout or --source")
    if lost := sorted(images[key] for key in images.keys() - masks.keys()):
        raise UserError(f"{source}: no mask {layout.masks!r} for {_first(lost)}; add the masks or remove the images")
    if spare := sorted(masks[key] for key in masks.keys() - images.keys()):
        text = f"{source}: no image {layout.images!r} for the masks of {_first(spare)}; not used"
        print(text, file=sys.stderr)

    for image in images.values():
        try:
            image.encode()
        except UnicodeEncodeError:
            shown = image.encode(errors="backslashreplace").decode()
            raise UserError(f"{source}: the name of {shown} is not UTF-8; rename the file or its folder") from None

    records = {split: [] for split in layout.splits}
    in_none, in_two = [], []
    for key, image in sorted(images.items(), key=lambda item: item[1]):
        splits = [split for split, globs in layout.splits.items() if any(fnmatchcase(image, g) for g in globs)]
        if len(splits) == 1:
            records[splits[0]].append(FolderRecord(source / image, source / masks[key], image))
        else:
            (in_two if splits else in_none).append(image)
    if in_none:
        raise UserError(f"no split takes {_first(in_none)}; name them in splits of the layout or narrow images")
    if in_two:
        raise UserError(f"more than one split takes {_first(in_two)}; keep one of them in splits of the layout")
    if empty := [split for split, found in records.items() if not found]:
        patterns = ", ".join(layout.splits[empty[0]])
        raise UserError(f"split {empty[0]} ({patterns}) has none of the {len(images)} images; correct its patterns")
    return records


@dataclass(frozen=True)
class FolderReader:
    """Reads the pairs of a folder. It can be sent to other processes.

    Attributes:
        layout: what mask values mean.
        bands: names of the bands that every image must have.
        unknown: what to do with mask pixels that the layout does not name: `"error"`, or `"ignore"` to label them 255.

    Pixels without data (fully transparent, masked, or of the no-data value) become 0 in the image and 255 in the label.
    TIFF images keep their georeference and all their bands; other images are read as RGB.
    """

    layout: FolderLayout
    bands: tuple[str, ...] = RGB
    unknown: str = "error"

    def __post_init__(self):
        if self.unknown not in ("error", "ignore"):
            raise UserError(f"unknown is {self.unknown!r}; give error or ignore")

    def header(self, record: FolderRecord) -> SourceHeader:
        """Size and identity of a pair.

        Raises:
            UserError: a file that is no image, sizes that differ, a mask of the wrong kind, or a wrong number of bands.
        """
        place = None, None
        if _is_tiff(record.image):
            raster = raster_header(record.image)
            # A fourth band is often marked as alpha by default; it is data if the layout has a name for it.
            size, count = (raster.height, raster.width), raster.count + (raster.alpha and bool(self.layout.bands))
            place = raster.crs, raster.transform
        else:
            with _open(record.image, decode=False) as image:
                _check_image_mode(image, record.image)
                size, count = (image.height, image.width), 3
        if (3 if count == 1 else count) != len(self.bands):  # grey is read as RGB
            raise UserError(
                f"{record.image}: has {count} bands, but the dataset has {len(self.bands)} ({', '.join(self.bands)}); "
                "give all images the same bands"
            )
        with _open(record.mask, decode=False) as mask:
            _check_mask_mode(mask, self.layout.by_color, record.mask)
            if (mask.height, mask.width) != size:
                raise UserError(
                    f"{record.mask}: is {mask.width}x{mask.height} but its image is {size[1]}x{size[0]} pixels; "
                    "make them the same size"
                )
        stats = [path.stat() for path in (record.image, record.mask)]
        # The place may be that of a world file, which changes without its image.
        identity = " ".join([*(f"{stat.st_size}-{stat.st_mtime_ns}" for stat in stats), str(place)])
        return SourceHeader(record.name, *size, identity, georeferenced=place != (None, None))

    def read(self, record: FolderRecord) -> SourceImage:
        """Decode a pair.

        Raises:
            UserError: what `header` refuses, damaged files, or unknown mask values.
        """
        self.header(record)
        image, valid, crs, transform = _read_image(record.image, self.layout.bands)
        with _open(record.mask) as mask:
            label, report = _read_label(mask, self.layout, self.unknown, record.mask)
        if valid is not None:
            image[~valid] = 0
            label[~valid] = IGNORE_INDEX
        return SourceImage(record.name, image, label, None, crs, transform, report)


def folder_reader(
    layout: FolderLayout, sources: Mapping[str, Sequence[FolderRecord]], unknown: str = "error"
) -> FolderReader:
    """The reader of a folder's pairs. Its bands are those of the layout, or by the number that the first image has."""
    if layout.bands:
        return FolderReader(layout, layout.bands, unknown)
    first = next(record for records in sources.values() for record in records)
    count = raster_header(first.image).count if _is_tiff(first.image) else 3
    more = ("near_infrared", *(f"band_{i}" for i in range(5, count + 1)))
    return FolderReader(layout, RGB + more[: max(count - 3, 0)], unknown)


def _is_tiff(path: Path) -> bool:
    return path.suffix.lower() in (".tif", ".tiff")


def _read_image(path: Path, bands: Sequence[str]) -> tuple[np.ndarray, np.ndarray | None, str | None, tuple | None]:
    """uint8 (H, W, C); bool (H, W), False without data, or None; CRS; transform."""
    if _is_tiff(path):
        raster = read_raster(path, range(1, len(bands) + 1) if len(bands) > 3 else None)
        grey = raster.pixels.shape[2] == 1
        pixels = np.repeat(raster.pixels, 3, axis=2) if grey else raster.pixels
        return pixels, raster.valid, raster.crs, raster.transform
    with _open(path) as image:
        if not image.has_transparency_data:
            return np.array(image.convert("RGB")), None, None, None
        pixels = np.asarray(image.convert("RGBA"))
    valid = pixels[..., 3] > 0
    return np.array(pixels[..., :3], order="C"), None if valid.all() else valid, None, None


def _read_label(
    mask: Image.Image, layout: FolderLayout, unknown: str, path: Path
) -> tuple[np.ndarray, dict[str, int]]:
    """uint8 (H, W) of class indices and 255, and the pixels of each unknown colour or value that became 255."""
    values = np.asarray(mask.convert("RGB") if layout.by_color else mask)
    if not layout.by_color and (values.min() < 0 or values.max() > 65535):
        raise UserError(
            f"{path}: mask values go from {values.min()} to {values.max()}; only 0 to 65535 can be class values"
        )
    table, report = _code_table(layout), Counter()
    label = np.empty(values.shape[:2], np.uint8)
    for start in range(0, len(label), ROWS_AT_A_TIME):  # packed colours take many times the memory of a label
        rows = np.s_[start : start + ROWS_AT_A_TIME]
        codes = _pack(values[rows]) if layout.by_color else values[rows].astype(np.int32)
        label[rows] = table[codes]
        strange = label[rows] == UNKNOWN
        if strange.any():
            found, counts = np.unique(codes[strange], return_counts=True)
            report.update({_show_code(int(v), layout.by_color): int(n) for v, n in zip(found, counts, strict=True)})
            label[rows][strange] = IGNORE_INDEX
    if report and unknown == "error":
        kind = "colours" if layout.by_color else "values"
        shown = ", ".join(f"{code}: {count}" for code, count in report.most_common(10))
        more = f" and {len(report) - 10} more" if len(report) > 10 else ""
        raise UserError(
            f"{path}: {len(report)} {kind} that the layout does not name, with their pixels: {shown}{more}; "
            "add them to classes or ignore in the layout, or use --unknown ignore"
        )
    return label, dict(report)


def _pack(colors: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 3) -> int32 (H, W)"""
    red, green, blue = np.moveaxis(colors, -1, 0)
    return red.astype(np.int32) << 16 | green.astype(np.int32) << 8 | blue


def _check_keys(content: Any, where: str, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> None:
    known = required + optional
    if not isinstance(content, dict):
        raise UserError(f"{where}: expected the keys {', '.join(known)}")
    for key in content:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}; nearest: {nearest(str(key), known)}")
    if missing := [key for key in required if content.get(key) is None]:
        given = f"; given: {', '.join(content)}" if content else ""
        raise UserError(f"{where}: the key {missing[0]} is missing{given}")


def _check_pattern(pattern: Any, where: str) -> None:
    if not isinstance(pattern, str) or not pattern.strip():
        raise UserError(f"{where}: {pattern!r} is not a pattern; write it as text in quotes")
    if pattern.startswith(("/", "~")) or "\\" in pattern or ":" in pattern.split("/")[0]:
        raise UserError(f"{where}: {pattern!r} must be relative to the source folder, with / between folders")
    if ".." in pattern.split("/"):
        raise UserError(f"{where}: {pattern!r} leaves the source folder; remove '..'")


def _read_splits(content: Any, path: Path) -> dict[str, tuple[str, ...]]:
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: splits is {content!r}; give patterns under {', '.join(SPLITS)}")
    splits = {}
    for split, patterns in content.items():
        if split not in SPLITS:
            raise UserError(f"{path}: unknown split {split!r}; nearest: {nearest(str(split), SPLITS)}")
        patterns = [patterns] if isinstance(patterns, str) else patterns
        if not isinstance(patterns, list) or not patterns:
            raise UserError(f"{path}: split {split} is {patterns!r}; give a list of patterns")
        for pattern in patterns:
            _check_pattern(pattern, f"{path}: split {split}")
        splits[split] = tuple(patterns)
    return {split: splits[split] for split in SPLITS if split in splits}


def _read_classes(content: Any, path: Path) -> tuple[tuple[SegmentationClass, ...], tuple[int, ...], bool]:
    if not isinstance(content, list) or not 1 <= len(content) < UNKNOWN:
        raise UserError(f"{path}: classes must be a list of 1 to {UNKNOWN - 1} classes")
    for entry in content:
        _check_keys(entry, f"{path}: classes", required=("name",), optional=("color", "value"))
        if not isinstance(entry["name"], str):
            raise UserError(f"{path}: class name {entry['name']!r} is not text; put it in quotes")
        if "color" not in entry and "value" not in entry:
            raise UserError(f"{path}: class {entry['name']} has neither color nor value; give one of them")
    by_color = all("value" not in entry for entry in content)
    if not by_color and (without := [entry["name"] for entry in content if "value" not in entry]):
        raise UserError(f"{path}: class {without[0]} has no value but others have; give all of them a value or none")
    classes, codes = [], []
    for i, entry in enumerate(content):
        where = f"{path}: class {entry['name']}"
        # Golden-ratio steps of hue keep default drawing colours apart.
        drawn = tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.65, 0.95))
        if "color" in entry:
            packed = _read_code(entry["color"], True, where)
            drawn = _unpack(packed)
        codes.append(packed if by_color else _read_code(entry["value"], False, where))
        classes.append(SegmentationClass(entry["name"], drawn))
    for what, values in (("name", [c.name for c in classes]), ("color" if by_color else "value", codes)):
        repeated = [value for value, count in Counter(values).items() if count > 1]
        if repeated:
            shown = repeated[0] if what == "name" else _show_code(repeated[0], by_color)
            raise UserError(f"{path}: two classes have the {what} {shown}; give each class its own")
    return tuple(classes), tuple(codes), by_color


def _read_code(value: Any, by_color: bool, where: str) -> int:
    def is_int(v, top):
        return isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= top

    if by_color:
        if not (isinstance(value, list) and len(value) == 3 and all(is_int(v, 255) for v in value)):
            raise UserError(f"{where}: {value!r} is not a colour; write [r, g, b] with numbers from 0 to 255")
        return value[0] << 16 | value[1] << 8 | value[2]
    if not is_int(value, 65535):
        raise UserError(f"{where}: {value!r} is not a mask value; write a whole number from 0 to 65535")
    return value


def _unpack(code: int) -> tuple[int, int, int]:
    return code >> 16, code >> 8 & 255, code & 255


def _show_code(code: int, by_color: bool) -> str:
    return ",".join(map(str, _unpack(code))) if by_color else str(code)


def _first(names: list[str], n: int = 3) -> str:
    return f"{len(names)} image(s): {', '.join(names[:n])}{', ...' if len(names) > n else ''}"


def _pattern_regex(pattern: str) -> re.Pattern:
    """A glob pattern as a regular expression; its groups are what `*`, `?` and `**` match, file ending left out."""
    *folders, name = pattern.split("/")
    regex = "".join(r"((?:[^/]+/)*)" if part == "**" else _part_regex(part, r"(%s)") + "/" for part in folders)
    stem, dot, ending = name.rpartition(".")
    if dot and stem:
        return re.compile(regex + _part_regex(stem, r"(%s)") + r"\." + _part_regex(ending, r"(?:%s)"))
    return re.compile(regex + _part_regex(name, r"(%s)"))


def _part_regex(part: str, group: str) -> str:
    regex = ""
    for piece in re.split(r"(\*+|\?|\[!?[^\]]+\])", part):
        if piece.startswith("*"):
            regex += group % "[^/]*"
        elif piece == "?":
            regex += group % "[^/]"
        elif piece.startswith("[") and piece.endswith("]"):
            regex += piece.replace("[!", "[^", 1)
        else:
            regex += re.escape(piece)
    return regex


def _files_by_key(source: Path, pattern: str, what: str, leave_out: set[str] = frozenset()) -> dict[tuple, str]:
    """Relative paths of the files that match `pattern`, by what its wildcards match (file endings removed)."""
    regex, root = _pattern_regex(pattern), source.resolve()
    ending_is_open = "." not in pattern.rpartition("/")[2]
    files = {}
    for found in sorted(glob.glob(pattern, root_dir=source, recursive=True)):
        path = source / found
        found = PurePosixPath(Path(found)).as_posix()
        if path.is_dir() or found in leave_out or not (match := regex.fullmatch(found)):
            continue
        if not path.resolve().is_relative_to(root):
            raise UserError(f"{path}: is a link that leaves {source}; copy the file into the source folder")
        key = match.groups()
        if ending_is_open and key:
            key = (*key[:-1], PurePosixPath(key[-1]).stem)
        if key in files:
            raise UserError(f"{source}: {files[key]} and {found} are both the {what} of one pair; remove one of them")
        files[key] = found
    return files


@contextmanager
def _open(path: Path, decode: bool = True) -> Iterator[Image.Image]:
    """Open (and decode) an image; whatever is wrong with the file becomes a `UserError` that names it."""
    limit = Image.MAX_IMAGE_PIXELS
    try:
        Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # checked in open() only
        with Image.open(path) as image:
            Image.MAX_IMAGE_PIXELS = limit
            if decode:
                image.load()
            yield image
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error}); replace the file") from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _check_image_mode(image: Image.Image, path: Path) -> None:
    if image.mode not in IMAGE_MODES:
        raise UserError(f"{path}: has mode {image.mode}; convert the image to 8-bit RGB")


def _check_mask_mode(mask: Image.Image, by_color: bool, path: Path) -> None:
    if by_color and mask.mode not in IMAGE_MODES:
        raise UserError(f"{path}: has mode {mask.mode}, but the layout gives colours; give values for index masks")
    if not by_color and mask.mode not in INDEX_MODES:
        raise UserError(f"{path}: has mode {mask.mode}, but the layout gives values; give colours for colour masks")


def _code_table(layout: FolderLayout) -> np.ndarray:
    """uint8 label of every possible mask code: one look-up per pixel is many times faster than one pass per class."""
    table = np.full(2**24 if layout.by_color else 2**16, UNKNOWN, np.uint8)
    table[list(layout.ignore_codes)] = IGNORE_INDEX
    table[list(layout.codes)] = np.arange(len(layout.codes))
    return table
