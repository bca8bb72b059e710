"""Pictures of segmentations: label maps in class colours, side-by-side comparisons and contact sheets with a legend."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.preview import PreviewTile
from drd_hf.errors import UserError

GAP = 12  # pixels between cells and around everything
SWATCH = 18  # side of a colour square of the legend
TEXT_SIZE = 16
INK, OUTLINE, PAPER = (30, 30, 30), (150, 150, 150), (255, 255, 255)


def colorize(label, colors: Sequence[tuple[int, int, int]], ignore_color: tuple[int, int, int] = (0, 0, 0)):
    """Draw a label map in class colours.

    Args:
        label: `(H, W)` integers 0..K-1, or 255 where the pixel is ignored.
        colors: K RGB colours, 0-255, in label order.
        ignore_color: RGB colour of ignored pixels.

    Returns:
        `(H, W, 3)` uint8 array.

    Raises:
        UserError: `label` is no integer map, or holds a value that is neither a class nor 255.
    """
    label = np.asarray(label)
    if label.ndim != 2 or label.dtype.kind not in "iu":
        raise UserError(f"a label map is (H, W) integers, got {label.dtype} of shape {label.shape}")
    ignored = label == IGNORE_INDEX
    unknown = np.unique(label[~ignored & ((label < 0) | (label >= len(colors)))])
    if len(unknown):
        listed = ", ".join(map(str, unknown[:8].tolist()))
        raise UserError(f"the label map contains {listed}, but there are {len(colors)} colours: pass one per class")
    palette = np.array([*colors, ignore_color], dtype=np.uint8)
    return palette[np.where(ignored, len(colors), label)]


def comparison_picture(
    rows: Sequence[Sequence],
    titles: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    id2label: Mapping[int | str, str],
    path: str | os.PathLike,
    cell_size: int = 256,
) -> Path:
    """Write a PNG that shows images and label maps side by side under column titles, over a legend of the classes.

    Args:
        rows: one sequence per scene, as long as `titles`; an entry is an `(H, W, 3)` uint8 RGB image or an `(H, W)`
            integer label map. Entries are fitted into square cells and keep their aspect ratio.
        titles: what the columns show, for example image, reference, teacher, student alone, distilled.
        colors: K RGB colours, 0-255, in label order; ignored pixels (255) are black.
        id2label: class names for the legend.
        path: PNG file to write; its folder is created, and the file appears only when it is whole.
        cell_size: side of a cell in pixels.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: no rows, a row that does not fit the titles, or an entry of another shape or type.
    """
    if not rows or not titles:
        raise UserError("nothing to draw: pass at least one row and one title")
    for r, row in enumerate(rows):
        if len(row) != len(titles):
            raise UserError(f"row {r} has {len(row)} pictures for {len(titles)} titles: give every title one picture")
    cells = [
        [_cell(entry, colors, cell_size, f"row {r}, {title}") for entry, title in zip(row, titles, strict=True)]
        for r, row in enumerate(rows)
    ]
    row_heights = [max(cell.height for cell in row) for row in cells]

    names = [str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]
    if len(names) != len(colors):
        raise UserError(f"{len(colors)} colours for {len(names)} class names: pass one colour per class")
    legend = list(zip(names, colors, strict=True))
    if any(np.ndim(entry) == 2 and np.any(np.asarray(entry) == IGNORE_INDEX) for row in rows for entry in row):
        legend.append(("ignored", (0, 0, 0)))

    font = ImageFont.load_default(TEXT_SIZE)
    widest_entry = max(_entry_width(name, font) for name, _ in legend)
    width = max(GAP + len(titles) * (cell_size + GAP), widest_entry + 2 * GAP)
    places, legend_height = _legend_places([name for name, _ in legend], font, width)
    wrapped = [wrap_text(title, font, cell_size) for title in titles]
    line_height = TEXT_SIZE + 6
    title_height = max(map(len, wrapped)) * line_height
    legend_top = GAP + title_height + sum(height + GAP for height in row_heights) + GAP // 2

    picture = Image.new("RGB", (width, legend_top + legend_height + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for column, lines in enumerate(wrapped):
        center = GAP + column * (cell_size + GAP) + cell_size / 2
        bottom = GAP + title_height - line_height * len(lines)
        for i, line in enumerate(lines):
            draw.text((center, bottom + line_height * (i + 0.5) - 3), line, fill=INK, font=font, anchor="mm")
    top = GAP + title_height
    for row, height in zip(cells, row_heights, strict=True):
        for column, cell in enumerate(row):
            left = GAP + column * (cell_size + GAP) + (cell_size - cell.width) // 2
            upper = top + (height - cell.height) // 2
            picture.paste(cell, (left, upper))
            # Around the cell, so that a white class does not run into the paper.
            draw.rectangle((left - 1, upper - 1, left + cell.width, upper + cell.height), outline=OUTLINE)
        top += height + GAP
    _draw_legend(
        picture, [(name, Image.new("RGB", (SWATCH, SWATCH), tuple(c))) for name, c in legend], places, legend_top
    )
    return save_png(picture, Path(path))


def overlay(image: np.ndarray, label: np.ndarray, colors: Sequence[tuple[int, int, int]]) -> np.ndarray:
    """An image with its labels over it, half transparent; ignored pixels are hatched in grey.

    Args:
        image: `(H, W, 3)` uint8.
        label: `(H, W)` integers 0..K-1, or 255.
        colors: K RGB colours, 0-255, in label order.

    Returns:
        `(H, W, 3)` uint8.
    """
    blended = (0.5 * image + 0.5 * colorize(label, colors)).astype(np.uint8)
    rows, columns = np.indices(label.shape, sparse=True)
    hatch = np.where((rows + columns) % 8 < 3, 60, 170).astype(np.uint8)
    return np.where((label == IGNORE_INDEX)[..., None], hatch[..., None], blended)


def contact_sheet(
    tiles: Sequence[PreviewTile],
    title: str,
    colors: Sequence[tuple[int, int, int]],
    id2label: Mapping[int | str, str],
    shares: Mapping[str, float],
    path: str | os.PathLike,
    cell_size: int = 224,
) -> Path:
    """Write a PNG of tiles, each beside its overlay of labels, under a title and over a legend with the class shares.

    A tile without a reference has an empty cell beside it that says so.

    Args:
        tiles: from `preview_tiles`.
        title: wrapped to the width of the sheet.
        colors: K RGB colours, 0-255, in label order; ignored pixels are hatched in grey.
        id2label: class names for the legend.
        shares: share of each class by its name, and of what is ignored under `ignored`; what is missing is left out.
        path: PNG file to write; its folder is created, and the file appears only when it is whole.
        cell_size: side of a tile on the sheet, in pixels.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: no tiles, a label without a colour, or a file that cannot be written.
    """
    if not tiles:
        raise UserError("nothing to draw: the split has no tiles")
    columns = max(1, round(math.sqrt(len(tiles) * 2 / 3)))  # pairs beside each other, for a sheet of about 3:2
    pair, line_height = 2 * cell_size + 2, TEXT_SIZE + 6
    width = GAP + columns * (pair + GAP)
    font, small = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TEXT_SIZE - 4)
    names = [str(name) for _, name in sorted(id2label.items(), key=lambda item: int(item[0]))]
    swatches = [Image.new("RGB", (SWATCH, SWATCH), tuple(color)) for color in colors]
    nothing = np.full((SWATCH, SWATCH), IGNORE_INDEX)
    swatches.append(Image.fromarray(overlay(np.zeros((SWATCH, SWATCH, 3), np.uint8), nothing, colors)))
    texts = [_legend_text(name, shares) for name in (*names, "ignored")]
    width = max(width, max(_entry_width(text, font) for text in texts) + 2 * GAP)
    places, legend_height = _legend_places(texts, font, width)
    title_lines = wrap_text(title, font, width - 2 * GAP)
    grid_top = 2 * GAP + len(title_lines) * line_height
    row_height = cell_size + line_height + GAP
    legend_top = grid_top + math.ceil(len(tiles) / columns) * row_height

    sheet = Image.new("RGB", (width, legend_top + legend_height + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(title_lines):
        draw.text((GAP, GAP + line_height * i), line, fill=INK, font=font)
    for i, tile in enumerate(tiles):
        left, top = GAP + i % columns * (pair + GAP), grid_top + i // columns * row_height
        for x, cell in zip((left, left + cell_size + 2), _pair_of_cells(tile, colors, cell_size), strict=True):
            box = (x, top, x + cell_size - 1, top + cell_size - 1)
            if cell is None:
                draw.rectangle(box, outline=OUTLINE)
                draw.text((x + cell_size / 2, top + cell_size / 2), "no label", fill=INK, font=small, anchor="mm")
            else:
                sheet.paste(cell, (x + (cell_size - cell.width) // 2, top + (cell_size - cell.height) // 2))
        draw.text((left, top + cell_size + 3), shortened(tile.caption, small, pair), fill=INK, font=small)
    _draw_legend(sheet, list(zip(texts, swatches, strict=True)), places, legend_top)
    return save_png(sheet, Path(path))


def _pair_of_cells(tile: PreviewTile, colors, cell_size: int) -> tuple[Image.Image, Image.Image | None]:
    """The tile and its overlay, both at the size of the sheet, so that the hatching is as fine everywhere."""
    image = _cell(tile.image, colors, cell_size, tile.caption)
    if tile.label is None:
        return image, None
    label = Image.fromarray(np.asarray(tile.label, np.uint8)).resize(image.size, Image.Resampling.NEAREST)
    try:
        return image, Image.fromarray(overlay(np.asarray(image), np.asarray(label), colors))
    except UserError as error:
        raise UserError(f"{tile.caption}: {error}") from None


def _legend_text(name: str, shares: Mapping[str, float]) -> str:
    if name not in shares:
        return name
    return f"{name} <0.1%" if 0 < shares[name] < 0.0005 else f"{name} {shares[name]:.1%}"


def shortened(text: str, font, width: int) -> str:
    """`text`, or its end where it is wider than `width` pixels: the place of a tile stands there."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"…{text}") > width:
        text = text[1:]
    return f"…{text}"


def _draw_legend(picture: Image.Image, legend: Sequence[tuple[str, Image.Image]], places, top: int) -> None:
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(TEXT_SIZE)
    for (text, swatch), (x, y) in zip(legend, places, strict=True):
        y += top
        picture.paste(swatch, (x, y))
        draw.rectangle((x, y, x + SWATCH, y + SWATCH), outline=OUTLINE)
        draw.text((x + SWATCH + 6, y + SWATCH / 2), text, fill=INK, font=font, anchor="lm")


def _cell(entry, colors, cell_size: int, where: str) -> Image.Image:
    array = np.asarray(entry)
    if array.ndim == 2 and array.dtype.kind in "iu":
        try:
            array, resampling = colorize(array, colors), Image.Resampling.NEAREST
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    elif array.ndim == 3 and array.shape[2] == 3 and array.dtype == np.uint8:
        resampling = Image.Resampling.BICUBIC
    else:
        raise UserError(
            f"{where}: expected an (H, W, 3) uint8 image or an (H, W) integer label map, "
            f"got {array.dtype} of shape {array.shape}"
        )
    scale = cell_size / max(array.shape[:2])
    size = (max(1, round(array.shape[1] * scale)), max(1, round(array.shape[0] * scale)))
    return Image.fromarray(np.ascontiguousarray(array)).resize(size, resampling)


def _legend_places(names: Sequence[str], font, width: int) -> tuple[list[tuple[int, int]], int]:
    """Top left corner of every legend entry, as many to a line as `width` holds, and the height of all lines."""
    places, x, y = [], GAP, 0
    for name in names:
        entry = _entry_width(name, font)
        if x > GAP and x + entry > width - GAP:
            x, y = GAP, y + SWATCH + 8
        places.append((x, y))
        x += entry + 2 * GAP
    return places, y + SWATCH


def _entry_width(name: str, font) -> int:
    return SWATCH + 6 + math.ceil(font.getlength(name))


def wrap_text(text: str, font, width: int) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide, as far as its words allow."""
    lines = [""]
    for word in str(text).split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def save_png(picture: Image.Image, path: Path) -> Path:
    """Write a picture under another name in the same folder, which is made, and move it into place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        picture.save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path
