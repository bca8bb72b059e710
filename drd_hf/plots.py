"""What an evaluation found, drawn: confusion matrix, bars for each class, and the errors in an image."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError
from drd_hf.pictures import GAP, INK, OUTLINE, PAPER, SWATCH, TEXT_SIZE, _save_png, _wrap, comparison_picture

CELL = 58  # side of a cell of the confusion matrix
LINE = TEXT_SIZE + 6
BAR, LONGEST_BAR = 14, 420  # pixels; a bar of LONGEST_BAR is a score of 1
BLUE = (8, 69, 148)
BAR_COLORS = ((8, 69, 148), (107, 174, 214), (230, 145, 56), (120, 120, 120))
GRID = (225, 225, 225)
WRONG = (255, 0, 0)
PICTURE_SIZES = 256, 720  # smallest and largest side of an image in a picture of its errors


def confusion_picture(matrix, class_names: Sequence[str], title: str, path: str | os.PathLike) -> Path:
    """Write a PNG of a confusion matrix: of the pixels of each reference class, the percentage predicted as each class.

    Args:
        matrix: `(K, K)` integers, rows = reference, columns = prediction. A class without pixels has an empty row.
        class_names: K names.
        title: wrapped to the width of the picture.
        path: PNG file to write; its folder is created, and the file appears only when it is whole.

    Returns:
        `path` as a `Path`.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    k = len(class_names)
    if matrix.shape != (k, k):
        raise UserError(f"a matrix of shape {matrix.shape} for {k} class names: pass one name per class")
    totals = matrix.sum(axis=1)
    font, small = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TEXT_SIZE - 2)
    name_width = math.ceil(max(font.getlength(name) for name in class_names))
    share_width = math.ceil(font.getlength("share of pixels"))
    left = GAP + LINE + name_width + GAP
    width = left + k * CELL + GAP + share_width + GAP
    title_lines = _wrap(title, font, width - 2 * GAP)
    names_top = 2 * GAP + len(title_lines) * LINE
    top = names_top + LINE + name_width + GAP
    picture = Image.new("RGB", (width, top + k * CELL + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(title_lines):
        draw.text((GAP, GAP + LINE * i), line, fill=INK, font=font)
    draw.text((left + k * CELL / 2, names_top + LINE / 2), "prediction", fill=INK, font=font, anchor="mm")
    side = _upright("reference", font)
    picture.paste(side, (GAP, top + (k * CELL - side.height) // 2))
    shares_left = left + k * CELL + GAP
    draw.text((shares_left, top - GAP / 2), "share of pixels", fill=INK, font=font, anchor="lb")
    for i, name in enumerate(class_names):
        middle = top + i * CELL + CELL / 2
        draw.text((left - GAP / 2, middle), name, fill=INK, font=font, anchor="rm")
        upright = _upright(name, font)
        picture.paste(upright, (left + i * CELL + (CELL - upright.width) // 2, top - GAP // 2 - upright.height))
        share = totals[i] / totals.sum() if totals.sum() else 0
        draw.text((shares_left, middle), f"{share:.1%}", fill=INK, font=font, anchor="lm")
        for j in range(k):
            x, y = left + j * CELL, top + i * CELL
            value = matrix[i, j] / totals[i] if totals[i] else math.nan
            color = PAPER if math.isnan(value) else _blend(PAPER, BLUE, value)
            draw.rectangle((x, y, x + CELL, y + CELL), fill=color, outline=OUTLINE)
            ink = PAPER if value > 0.5 else INK
            draw.text((x + CELL / 2, y + CELL / 2), _percent(value), fill=ink, font=small, anchor="mm")
    return _save_png(picture, Path(path))


def bars_picture(
    scores: Mapping[str, Sequence[float]],
    class_names: Sequence[str],
    colors: Sequence[tuple[int, int, int]],
    title: str,
    path: str | os.PathLike,
) -> Path:
    """Write a PNG with a group of bars for each class, one for each score.

    Args:
        scores: name of a score -> its K values from 0 to 1; NaN where a class does not occur. At most four.
        class_names: K names.
        colors: K RGB colours, which mark the names.
        title, path: as for `confusion_picture`.

    Returns:
        `path` as a `Path`.
    """
    if not 1 <= len(scores) <= len(BAR_COLORS) or {len(class_names), len(colors)} != set(map(len, scores.values())):
        raise UserError(f"bars need one to {len(BAR_COLORS)} scores, and a name, a colour and values for every class")
    font, small = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TEXT_SIZE - 3)
    name_width = math.ceil(max(font.getlength(name) for name in class_names))
    left = GAP + SWATCH + 6 + name_width + GAP
    legend_width = sum(SWATCH + 6 + math.ceil(font.getlength(name)) + 2 * GAP for name in scores)
    width = max(left + LONGEST_BAR + 70, legend_width + 2 * GAP)
    title_lines = _wrap(title, font, width - 2 * GAP)
    legend_top = 2 * GAP + len(title_lines) * LINE
    top = legend_top + LINE + GAP
    group = len(scores) * BAR + GAP
    bottom = top + len(class_names) * group
    picture = Image.new("RGB", (width, bottom + LINE + GAP), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(title_lines):
        draw.text((GAP, GAP + LINE * i), line, fill=INK, font=font)
    x = GAP
    for name, color in zip(scores, BAR_COLORS, strict=False):
        draw.rectangle((x, legend_top, x + SWATCH, legend_top + SWATCH), fill=color)
        draw.text((x + SWATCH + 6, legend_top + SWATCH / 2), name, fill=INK, font=font, anchor="lm")
        x += SWATCH + 6 + math.ceil(font.getlength(name)) + 2 * GAP
    for tick in range(0, 11, 2):
        x = left + tick / 10 * LONGEST_BAR
        draw.line((x, top - GAP / 2, x, bottom), fill=GRID)
        draw.text((x, bottom + LINE / 2), f"{tick / 10:.1f}", fill=INK, font=small, anchor="mm")
    for i, name in enumerate(class_names):
        upper = top + i * group
        middle = upper + (group - GAP) / 2
        swatch = (GAP, middle - SWATCH / 2, GAP + SWATCH, middle + SWATCH / 2)
        draw.rectangle(swatch, fill=tuple(colors[i]), outline=OUTLINE)
        draw.text((GAP + SWATCH + 6, middle), name, fill=INK, font=font, anchor="lm")
        if all(math.isnan(values[i]) for values in scores.values()):
            draw.text((left + 3, middle - 1), "does not occur", fill=INK, font=small, anchor="lm")
            continue
        for j, (values, color) in enumerate(zip(scores.values(), BAR_COLORS, strict=False)):
            value, y = float(values[i]), upper + j * BAR
            if math.isnan(value):  # no outline, for example
                draw.text((left + 3, y + BAR / 2 - 1), "-", fill=INK, font=small, anchor="lm")
                continue
            draw.rectangle((left, y, left + value * LONGEST_BAR, y + BAR - 2), fill=color)
            draw.text(
                (left + value * LONGEST_BAR + 4, y + BAR / 2 - 1), f"{value:.3f}", fill=INK, font=small, anchor="lm"
            )
    return _save_png(picture, Path(path))


def errors_picture(
    image: np.ndarray,
    reference: np.ndarray,
    prediction: np.ndarray,
    colors: Sequence[tuple[int, int, int]],
    id2label: Mapping[int | str, str],
    title: str,
    path: str | os.PathLike,
) -> Path:
    """Write a PNG of an image beside its reference, its prediction and where these differ.

    A large image is shown smaller: averaged, its labels by the nearest pixel.

    Args:
        image: `(H, W, 3)` uint8.
        reference, prediction: `(H, W)` uint8 class ids; 255 in the reference is ignored, drawn in black.
        colors, id2label: of the K classes.
        title: over the image.
        path: PNG file to write; its folder is created, and the file appears only when it is whole.

    Returns:
        `path` as a `Path`.
    """
    if not image.shape[:2] == reference.shape == prediction.shape:
        raise UserError(
            f"an image of {image.shape}, a reference of {reference.shape}, a prediction of {prediction.shape}"
        )
    labelled = reference != IGNORE_INDEX
    number = int(np.count_nonzero(labelled))
    wrong = int(np.count_nonzero(labelled & (prediction != reference)))
    share = f": {wrong / number:.1%} of the labelled pixels" if number else ""
    smallest, largest = PICTURE_SIZES
    scale = min(1.0, largest / max(reference.shape))
    size = tuple(max(1, round(length * scale)) for length in reference.shape[::-1])
    image = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(size, Image.Resampling.BOX))
    reference, prediction = (
        np.asarray(Image.fromarray(np.ascontiguousarray(ids)).resize(size, Image.Resampling.NEAREST))
        for ids in (reference, prediction)
    )
    return comparison_picture(
        [[image, reference, prediction, error_map(image, reference, prediction)]],
        [title, "reference", "prediction", f"errors in red{share}"],
        colors,
        id2label,
        path,
        cell_size=max(smallest, *size),
    )


def error_map(image: np.ndarray, reference: np.ndarray, prediction: np.ndarray) -> np.ndarray:
    """`(H, W, 3)` uint8: the image in light grey, wrong pixels red, ignored ones black."""
    grey = (image.astype(np.float32).mean(axis=2) / 2 + 127).astype(np.uint8)
    drawn = np.repeat(grey[..., None], 3, axis=2)
    drawn[prediction != reference] = WRONG
    drawn[reference == IGNORE_INDEX] = 0
    return drawn


def _upright(text: str, font) -> Image.Image:
    """Text that reads from bottom to top."""
    canvas = Image.new("RGB", (math.ceil(font.getlength(text)) + 2, LINE), PAPER)
    ImageDraw.Draw(canvas).text((0, LINE / 2), text, fill=INK, font=font, anchor="lm")
    return canvas.transpose(Image.Transpose.ROTATE_90)


def _percent(value: float) -> str:
    if math.isnan(value):
        return "-"
    return "0" if value == 0 else "<0.1" if value < 0.0005 else f"{100 * value:.1f}"


def _blend(first: tuple[int, int, int], second: tuple[int, int, int], share: float) -> tuple[int, ...]:
    return tuple(round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
