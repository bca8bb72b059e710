"""What an evaluation found, drawn: confusion matrix, bars for each class, errors in an image; and curves of a training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError
from drd_hf.pictures import GAP, INK, OUTLINE, PAPER, SWATCH, TEXT_SIZE, comparison_picture, save_png, wrap_text

CELL = 58  # side of a cell of the confusion matrix
LINE = TEXT_SIZE + 6
BAR, LONGEST_BAR = 14, 420  # pixels; a bar of LONGEST_BAR is a score of 1
BLUE = (8, 69, 148)
PANEL, SMOOTH = (640, 200), 3  # pixels of a panel of curves, which is drawn larger and averaged
CURVE_COLORS = ((8, 69, 148), (230, 145, 56), (39, 134, 62), (178, 34, 94), (120, 120, 120), (120, 85, 190))
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
    title_lines = wrap_text(title, font, width - 2 * GAP)
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
    return save_png(picture, Path(path))


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
    title_lines = wrap_text(title, font, width - 2 * GAP)
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
    return save_png(picture, Path(path))


def curves_picture(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    x_title: str,
    title: str,
    path: str | os.PathLike,
) -> Path:
    """Write a PNG of curves, one panel under the other.

    Args:
        panels: {title of the panel: {name of a curve: its points (x, y) in the order of x}}; y from 0 up, values that are
            not finite are gaps. All panels share the axis x. At most `CURVE_COLORS` curves in a panel.
        x_title: under the last panel.
        title, path: as for `confusion_picture`.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: no points at all, or too many curves.
    """
    points = [point for curves in panels.values() for curve in curves.values() for point in curve]
    if not points or max(map(len, panels.values())) > len(CURVE_COLORS):
        raise UserError(f"curves need points, and at most {len(CURVE_COLORS)} of them fit a panel")
    font, small = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(TEXT_SIZE - 3)
    plot_width, plot_height = PANEL
    left, width = GAP + 52, GAP + 52 + PANEL[0] + 3 * GAP
    title_lines = wrap_text(title, font, width - 2 * GAP)
    legends = [_legend_lines(curves, font, plot_width) for curves in panels.values()]
    heights = [LINE * (2 + len(lines)) + plot_height + LINE + GAP for lines in legends]
    top = 2 * GAP + LINE * len(title_lines)
    picture = Image.new("RGB", (width, top + sum(heights) + LINE), PAPER)
    draw = ImageDraw.Draw(picture)
    for i, line in enumerate(title_lines):
        draw.text((GAP, GAP + LINE * i), line, fill=INK, font=font)
    x_ticks = _ticks(max(x for x, _ in points))
    for (name, curves), legend, height in zip(panels.items(), legends, heights, strict=True):
        draw.text((GAP, top), name, fill=INK, font=font)
        plot_top = top + LINE
        for line in legend:
            for offset, text, color in line:
                middle = plot_top + LINE / 2
                draw.line((left + offset, middle, left + offset + SWATCH, middle), fill=color, width=3)
                draw.text((left + offset + SWATCH + 6, middle), text, fill=INK, font=font, anchor="lm")
            plot_top += LINE
        plot_top += LINE // 2
        largest = max((y for curve in curves.values() for _, y in curve if math.isfinite(y)), default=0)
        y_ticks = _ticks(1.02 * largest)  # no curve runs along the frame
        plot = Image.new("RGB", (plot_width * SMOOTH, plot_height * SMOOTH), PAPER)
        inner = ImageDraw.Draw(plot)

        def place(x, y, y_max=y_ticks[-1]):
            return SMOOTH * plot_width * x / x_ticks[-1], SMOOTH * (plot_height - 1) * (1 - y / y_max)

        for y in y_ticks:
            inner.line((place(0, y), place(x_ticks[-1], y)), fill=GRID, width=SMOOTH)
            y_text = plot_top + plot_height - plot_height * y / y_ticks[-1]
            draw.text((left - 6, y_text), f"{y:g}", fill=INK, font=small, anchor="rm")
        for curve, color in zip(curves.values(), CURVE_COLORS, strict=False):
            for run in _finite_runs(curve):
                at = [place(x, y) for x, y in run]
                inner.line(at, fill=color, width=3 * SMOOTH, joint="curve")
                for x, y in at if len(run) == 1 else ():  # a line of one point would not be seen
                    inner.ellipse((x - 3 * SMOOTH, y - 3 * SMOOTH, x + 3 * SMOOTH, y + 3 * SMOOTH), fill=color)
        picture.paste(plot.resize(PANEL, Image.Resampling.BOX), (left, plot_top))
        draw.rectangle((left, plot_top, left + plot_width, plot_top + plot_height), outline=OUTLINE)
        for x in x_ticks:
            x_text = left + plot_width * x / x_ticks[-1]
            draw.text((x_text, plot_top + plot_height + LINE / 2 + 2), f"{x:g}", fill=INK, font=small, anchor="mm")
        top += height
    draw.text((left + plot_width / 2, top - GAP / 2), x_title, fill=INK, font=font, anchor="mm")
    return save_png(picture, Path(path))


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


def _ticks(largest: float) -> list[float]:
    """From 0 to a round number that is not less than `largest`, in three to six steps."""
    if not largest > 0:
        return [0, 1]
    power = 10 ** math.floor(math.log10(largest))
    step = next(factor * power for factor in (0.2, 0.5, 1, 2) if factor * power * 5.5 >= largest)
    return [float(f"{i * step:.6g}") for i in range(math.ceil(largest / step - 1e-9) + 1)]


def _finite_runs(curve: Sequence[tuple[float, float]]) -> list[list[tuple[float, float]]]:
    """The pieces of a curve between values that are not finite."""
    runs = [[]]
    for x, y in curve:
        if math.isfinite(y):
            runs[-1].append((x, y))
        else:
            runs.append([])
    return [run for run in runs if run]


def _legend_lines(names, font, width: int) -> list[list[tuple[int, str, tuple[int, int, int]]]]:
    """Lines of (offset, name, colour), as many to a line as `width` holds."""
    lines, offset = [[]], 0
    for name, color in zip(names, CURVE_COLORS, strict=False):
        entry = SWATCH + 6 + math.ceil(font.getlength(name)) + 2 * GAP
        if lines[-1] and offset + entry > width:
            lines, offset = [*lines, []], 0
        lines[-1].append((offset, name, color))
        offset += entry
    return lines


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
