"""Cityscapes from its zips or folders: the fine annotations, as the 19 classes that the benchmark scores."""

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from drd_hf.data.archives import SourceFile, list_readable
from drd_hf.data.facts import CITYSCAPES, IGNORE_INDEX, DatasetFacts
from drd_hf.data.rasters import raster_header, read_raster
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.errors import UserError


@dataclass(frozen=True)
class CityscapesRecord:
    """One image and its `labelIds` file, which is None in the unlabelled test split."""

    name: str
    image: SourceFile
    label: SourceFile | None


@dataclass(frozen=True)
class CityscapesReader:
    """Reads images, see `SourceReader`."""

    bands: tuple[str, ...] = ("red", "green", "blue")

    def header(self, record: CityscapesRecord) -> SourceHeader:
        image = raster_header(record.image)
        if image.count != 3:
            raise UserError(f"{record.image}: has {image.count} bands; expected an RGB image")
        identity = record.image.identity()
        if record.label is not None:
            label = raster_header(record.label, integers=True)
            _check_label(record.label, (label.height, label.width), (image.height, image.width))
            identity += f" {record.label.identity()}"
        return SourceHeader(record.name, image.height, image.width, identity, labelled=record.label is not None)

    def read(self, record: CityscapesRecord) -> SourceImage:
        image = read_raster(record.image, (1, 2, 3))
        if image.valid is not None:
            image.pixels[~image.valid] = 0
        if record.label is None:
            return SourceImage(record.name, image.pixels, None)
        ids = read_raster(record.label, (1,), integers=True)
        _check_label(record.label, ids.pixels.shape[:2], image.pixels.shape[:2])
        label, report = train_ids(ids.pixels[..., 0])
        for valid in (image.valid, ids.valid):
            if valid is not None:
                label[~valid] = IGNORE_INDEX
        return SourceImage(record.name, image.pixels, label, report=report)


def find_cityscapes(
    source: str | Path, with_test: bool = False, skip_broken: bool = False
) -> tuple[dict[str, list[CityscapesRecord]], CityscapesReader, DatasetFacts, list[str]]:
    """The images of each split, what reads them, and what there is to tell about them.

    `labelIds` files are used; `labelTrainIds`, coarse annotations and the extra images are not. The official val
    split becomes validation. The labels of the official test split are not public (the files that stand for them are
    empty), so it is there only `with_test`, without labels.

    Args:
        source: a folder, a zip, or a folder with zips in it (see `drd_hf.data.archives.list_files`).
        skip_broken: go on without zips that cannot be read; stderr and the notes name them.

    Returns:
        Records of each split, their reader, the dataset's facts, and notes.

    Raises:
        UserError: nothing recognised, or a split without a labelled image.
    """
    files, notes = list_readable(source, skip_broken)
    images, labels = _by_name(files, CITYSCAPES.image), _by_name(files, CITYSCAPES.label)
    if not images:
        raise UserError(
            f"{source}: no image of Cityscapes among {len(files)} files; expected leftImg8bit_trainvaltest.zip and "
            "gtFine_trainvaltest.zip, or leftImg8bit/train/CITY/*_leftImg8bit.png and gtFine/train/CITY/*_labelIds.png"
        )
    records, lacks = {}, []
    for split, folder in CITYSCAPES.splits.items():
        if split == "test" and not with_test:
            continue
        of_images, of_labels = images.get(folder, {}), labels.get(folder, {})
        if split == "test":
            records[split] = [CityscapesRecord(name, file, None) for name, file in of_images.items()]
        else:
            records[split] = [
                CityscapesRecord(name, file, of_labels[name]) for name, file in of_images.items() if name in of_labels
            ]
            for what, first, second in (("labels", of_images, of_labels), ("images", of_labels, of_images)):
                if without := [name for name in first if name not in second]:
                    more = ", ..." if len(without) > 3 else ""
                    lacks.append(f"{split}: {len(without)} without {what[:-1]} ({', '.join(without[:3])}{more})")
        if not records[split]:
            raise UserError(
                f"{source}: split {split} has no {'image' if split == 'test' else 'image with a labelIds file'} in "
                f"{folder} ({len(of_images)} images, {len(of_labels)} labels); add leftImg8bit and gtFine of {folder}"
            )
    notes += [
        "validation is the official val split, which papers report; the official test labels are not public, so "
        "score models on validation."
    ]
    if with_test:
        notes.append("test has no labels; it serves distillation and prediction only.")
    if lacks:
        notes.append(f"Left out because files are missing: {'; '.join(lacks)}.")
        print(f"{source}: {notes[-1]}", file=sys.stderr)
    return records, CityscapesReader(), CITYSCAPES.dataset, notes


def train_ids(ids: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Cityscapes ids to the 19 classes.

    Args:
        ids: integers (H, W). -1 (licence plate) may be stored as 255 or 65535.

    Returns:
        label: uint8 (H, W), class indices and 255.
        report: number of pixels of each value that is no id of Cityscapes; they are 255.
    """
    if ids.dtype != np.uint8:
        ids = ids.astype(np.int32)
        strange = ids[(ids < -1) | (ids >= len(CITYSCAPES.train_ids)) & (ids != 255) & (ids != 65535)]
        ids = np.where((ids >= 0) & (ids < len(CITYSCAPES.train_ids)), ids, 255).astype(np.uint8)
    else:
        strange = ids[(ids >= len(CITYSCAPES.train_ids)) & (ids != 255)]
    table = bytes(CITYSCAPES.train_ids).ljust(256, bytes([IGNORE_INDEX]))
    label = np.frombuffer(bytearray(ids.tobytes().translate(table)), np.uint8).reshape(ids.shape)
    values, counts = np.unique(strange, return_counts=True)
    return label, {str(value): int(count) for value, count in zip(values, counts, strict=True)}


def _by_name(files: Sequence[SourceFile], pattern: str) -> dict[str, dict[str, SourceFile]]:
    """Files by official split and name; a file in a folder wins over the same one in a zip."""
    found = {}
    for file in sorted(files, key=lambda file: (bool(file.members), file.path)):
        if match := re.search(pattern, file.path, re.IGNORECASE):
            found.setdefault(match[1].lower(), {}).setdefault(match[2], file)
    return {split: dict(sorted(names.items())) for split, names in found.items()}


def _check_label(file: SourceFile, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if tuple(size) != tuple(expected):
        raise UserError(
            f"{file}: is {size[1]}x{size[0]} but its image is {expected[1]}x{expected[0]} pixels; get it again"
        )
