"""What relation distillation changes, drawn: spatial and channel relation maps of teacher and students side by side."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from transformers import PreTrainedModel

from drd_hf.data.transforms import normalization_of, normalize
from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks, input_channels
from drd_hf.models import default_feature_layer
from drd_hf.pictures import GAP, INK, OUTLINE, PAPER, TEXT_SIZE, save_png, shortened, wrap_text
from drd_hf.relations import (
    RELATIONS,
    channel_relation_distance,
    channel_relation_map,
    resize_to,
    spatial_relation_distance,
)
from drd_hf.relations.precision import full_precision, inverse_length

SMALL = TEXT_SIZE - 3
LINE, SMALL_LINE = TEXT_SIZE + 6, SMALL + 5
BAR_HEIGHT, RING = 14, 6  # pixels; RING is the radius of the mark at a chosen position
POSITIONS_PER_CHANNEL = 10  # a linear map fitted to fewer would explain anything

# Colours in Oklab, where equal steps look equally large: from one white to a blue and a red that are equally dark and vivid.
WHITE, END_LIGHTNESS, END_CHROMA, LOW_HUE, HIGH_HUE = 0.98, 0.42, 0.165, 261, 28
COLOR_STEPS = 64  # on each side of white
GREYS = 24  # from black to white, for texts and lines
ATTENTION_SHOWN = 0.995  # share of the values that the colours of an attention span: a few are far above all others


@dataclass(frozen=True)
class ShownModel:
    """A model whose relations are drawn.

    Attributes:
        title: heads its column, such as "teacher", "student alone", "distilled student".
        model: a segmenter or an encoder; used on the device it is on, and left in eval mode.
        processor: its image processor, of which only the normalisation is used.
        layer: dotted name of the layer that gives the features; None: `default_feature_layer`.
        bands: indices of the bands of the image that it reads, in its order; None: all.
    """

    title: str
    model: PreTrainedModel
    processor: object
    layer: str | None = None
    bands: Sequence[int] | None = None


@dataclass(frozen=True, eq=False)
class ShownRelations:
    """Relations of one model, and how far they are from those of the first one (None for the first itself).

    Attributes:
        title, layer: of the model.
        width: number of channels C of the layer.
        classes: what the model predicts at the P positions; None for a model without class scores.
        spatial: float (P, h, w), relations of each chosen position to all positions.
        channel: float (C, C), in the order in which it is drawn.
        position_distances: P numbers, the mean squared difference to the first model's `spatial`, which is resized to h, w.
        spatial_distance: `spatial_relation_distance`, over all pairs of positions.
        channel_distance: `channel_relation_distance`; with another width than the first model's, that of the features after
            the linear map which fits them to the first model's best. None where positions are too few to fit it.
    """

    title: str
    layer: str
    width: int
    classes: list[str] | None
    spatial: np.ndarray
    channel: np.ndarray
    position_distances: list[float] | None = None
    spatial_distance: float | None = None
    channel_distance: float | None = None


def draw_relations(
    models: Sequence[ShownModel],
    image: np.ndarray,
    positions: Sequence[tuple[int, int]] | None,
    path: str | os.PathLike,
    relation: str = "cosine",
    temperature: float = 1.0,
    order_channels: bool = True,
    cell_size: int = 235,
) -> Path:
    """Write a PNG of the relation maps of a teacher and its students: a column for each model, a row for each position.

    A row shows the image with the position marked, then for each model the relations of this position to all others, in one
    scale for all maps. The last row shows the channel relations. The numbers are those of `compare_relations`.

    Args:
        models: the first one is what the others are compared with, a teacher.
        image, positions, relation, temperature, order_channels: as for `compare_relations`; without positions those of
            `choose_positions` are taken.
        path: PNG file to write; its folder is created, and the file appears only when it is whole.
        cell_size: longer side of a map in pixels; three models make a picture of 1000 pixels with the default.

    Returns:
        `path` as a `Path`.

    Raises:
        UserError: as `compare_relations`.
    """
    if positions is None:
        positions = choose_positions(models, image)
    shown = compare_relations(models, image, positions, relation, temperature, order_channels)
    picture = _figure(shown, _rgb(models[-1], image), positions, relation, cell_size)
    return save_png(picture, Path(path))


def compare_relations(
    models: Sequence[ShownModel],
    image: np.ndarray,
    positions: Sequence[tuple[int, int]],
    relation: str = "cosine",
    temperature: float = 1.0,
    order_channels: bool = True,
) -> list[ShownRelations]:
    """Relations of chosen positions, and of the channels, in one forward pass of the image through each model.

    Args:
        models: the first one is what the others are compared with.
        image: uint8 (H, W, C). It is not cut into windows: give a part that the models take at once, best with sides that
            are multiples of 32.
        positions: (x, y) in pixels from the upper left corner.
        relation, temperature: as in `drd_hf.relations`.
        order_channels: sort channels so that those with like relations are neighbours (`channel_order`). Models as wide
            as the first one keep its order, since their channels correspond; others have their own.

    Raises:
        UserError: an unknown relation, a position outside the image, a model that does not read such an image, a layer
            that it does not have, or features that are not finite.
    """
    if relation not in RELATIONS or not temperature > 0:
        raise UserError(
            f"relation {relation!r} with temperature {temperature}: give one of {', '.join(RELATIONS)}, and a "
            "temperature above 0"
        )
    if not models or not positions:
        raise UserError("nothing to draw: give at least one model and one position")
    for entry in models:
        _bands(entry, image)
    height, width = np.shape(image)[:2]
    for x, y in positions:
        if not (0 <= x < width and 0 <= y < height):
            raise UserError(f"position ({x}, {y}) is outside the image of {width} x {height} pixels")
    size, shown, first, first_order = (height, width), [], None, None
    for entry in models:
        layer = entry.layer or default_feature_layer(entry.model)
        features, logits = _features(entry, layer, image)
        cells = [_cell_at(position, size, features.shape[-2:]) for position in positions]
        spatial = position_relations(features, cells, relation, temperature)
        if not spatial.isfinite().all():
            raise UserError(f"{entry.title}: temperature {temperature} is too small for its features")
        distances = {}
        if first is None:
            first, first_order = features, channel_order(features)
        else:
            resized = resize_to(first, features.shape[-2:])
            difference = spatial - position_relations(resized, cells, relation, temperature)
            distances = {
                "position_distances": difference.double().square().mean((1, 2)).tolist(),
                "spatial_distance": spatial_relation_distance(features, resized, relation, temperature).item(),
                "channel_distance": _channel_distance(features, resized, relation, temperature),
            }
        channel = channel_relation_map(features, relation, temperature)[0]
        if order_channels:
            order = first_order if features.shape[1] == first.shape[1] else channel_order(features)
            channel = channel[order][:, order]
        classes = None
        if logits is not None:
            places = [_cell_at(position, size, logits.shape[-2:]) for position in positions]
            classes = [entry.model.config.id2label[int(logits[:, row, column].argmax())] for row, column in places]
        maps = spatial.numpy(), channel.numpy()
        shown.append(ShownRelations(entry.title, layer, features.shape[1], classes, *maps, **distances))
    return shown


def choose_positions(models: Sequence[ShownModel], image: np.ndarray, count: int = 3) -> list[tuple[int, int]]:
    """Positions (x, y) in the `count` most frequent classes that the first model with class scores predicts.

    Of each class it is the position whose surroundings the model is surest of, which lies within the class, not at its edge.

    Raises:
        UserError: no model gives class scores.
    """
    for entry in models:
        _, logits = _features(entry, None, image)
        if logits is not None:
            break
    else:
        raise UserError("no model predicts classes to choose positions by: give positions")
    probabilities = logits.softmax(0)
    shares = F.one_hot(probabilities.argmax(0), len(probabilities)).sum((0, 1))
    side = max(min(logits.shape[-2:]) // 16, 1) // 2 * 2 + 1
    around = F.avg_pool2d(probabilities[None], side, stride=1, padding=side // 2)[0]  # less at the border of the image
    classes = [k for k in shares.argsort(descending=True, stable=True).tolist() if shares[k]][:count]
    places = [divmod(int(around[k].argmax()), logits.shape[2]) for k in classes]
    height, width = np.shape(image)[:2]
    rows, columns = logits.shape[-2:]
    return [(int((c + 0.5) * width / columns), int((r + 0.5) * height / rows)) for r, c in places]


def position_relations(
    features: torch.Tensor, cells: Sequence[tuple[int, int]], relation: str = "cosine", temperature: float = 1.0
) -> torch.Tensor:
    """Rows of `spatial_relation_map` without the others: features (1, C, h, w), P cells (row, column) -> (P, h, w)."""
    columns = features[0].flatten(1)  # (C, N)
    index = [row * features.shape[-1] + column for row, column in cells]
    with full_precision(features.device.type):
        if relation == "cosine":
            columns = columns * inverse_length(columns.square().sum(0))
            rows = columns[:, index].mT @ columns
        else:
            rows = columns[:, index].mT @ columns / (len(columns) ** 0.5 * temperature)
            rows = rows.softmax(-1)
    return rows.unflatten(1, features.shape[-2:])


def channel_order(features: torch.Tensor) -> torch.Tensor:
    """Order of the channels of (1, C, h, w) in which blocks of like ones are seen: (C,) indices.

    By the angle of their entries in the two leading eigenvectors of the cosine map (Friendly, Corrgrams, The American
    Statistician 2002), cut at the widest gap.
    """
    gram = channel_relation_map(features.double())[0]
    vectors = torch.linalg.eigh(gram).eigenvectors  # ascending eigenvalues
    if len(gram) < 3:
        return torch.arange(len(gram))
    angles = torch.atan2(vectors[:, -2], vectors[:, -1])
    angles, order = angles.sort(stable=True)
    gaps = angles.diff(append=angles[:1] + 2 * math.pi)
    return order.roll(-int(gaps.argmax()) - 1)


def heat_colors() -> np.ndarray:
    """Colours of relations from -1 (blue) over 0 (white) to 1 (red): uint8 (129, 3) sRGB, in perceptually equal steps.

    A straight line in Oklab on each side of white (B. Ottosson, A perceptual color space for image processing, 2020, whose
    matrices these are); lightness alone tells the strength, hue the sign.
    """
    value = np.linspace(-1, 1, 2 * COLOR_STEPS + 1)
    hue = np.radians(np.where(value < 0, LOW_HUE, HIGH_HUE))
    chroma = END_CHROMA * np.abs(value)
    lightness = WHITE + (END_LIGHTNESS - WHITE) * np.abs(value)
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    to_cones = [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
    to_linear = [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
    linear = np.clip((lab @ np.transpose(to_cones)) ** 3 @ np.transpose(to_linear), 0, 1)
    encoded = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(255 * encoded).astype(np.uint8)


def _features(entry: ShownModel, layer: str | None, image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features (1, C, h, w) of the layer, and class scores (K, h, w) or None, float32 on the CPU."""
    model, pixels = entry.model.eval(), _bands(entry, image)
    pixels = torch.from_numpy(np.ascontiguousarray(pixels)).to(model.device).permute(2, 0, 1)[None]
    pixel_values = normalize(pixels, *normalization_of(entry.processor)).to(model.dtype)
    with torch.no_grad(), FeatureHooks(model, [layer] if layer else []) as hooks:
        try:
            output = model(pixel_values=pixel_values)
        except (RuntimeError, ValueError) as error:
            reason = error if isinstance(error, UserError) else (str(error).strip().splitlines() or [""])[0]
            raise UserError(
                f"{entry.title}: {type(model).__name__} does not run on an image of {image.shape[1]} x {image.shape[0]} "
                f"pixels ({reason}); choose another part of it"
            ) from error
        features = hooks.pop()[layer].float().cpu() if layer else torch.empty(0)
    if not features.isfinite().all():
        raise UserError(f"{entry.title}: layer {layer!r} gives features that are not finite")
    logits = getattr(output, "logits", None)
    scores = isinstance(logits, torch.Tensor) and logits.ndim == 4
    return features, logits[0].float().cpu() if scores else None


def _bands(entry: ShownModel, image: np.ndarray) -> np.ndarray:
    if np.ndim(image) != 3 or image.dtype != np.uint8:
        raise UserError("an image is a uint8 array (H, W, bands)")
    bands = list(range(image.shape[2]) if entry.bands is None else entry.bands)
    if len(bands) != input_channels(entry.model) or not all(0 <= band < image.shape[2] for band in bands):
        raise UserError(
            f"{entry.title}: reads {input_channels(entry.model)} bands, got {len(bands)} of an image with "
            f"{image.shape[2]}: choose its bands"
        )
    return image[..., bands]


def _rgb(entry: ShownModel, image: np.ndarray) -> Image.Image:
    """The first three bands that a model reads as a picture, or the first one in grey."""
    pixels = _bands(entry, image)
    pixels = pixels[..., :3] if pixels.shape[2] >= 3 else np.repeat(pixels[..., :1], 3, axis=2)
    return Image.fromarray(np.ascontiguousarray(pixels))


def _cell_at(position: tuple[int, int], size: Sequence[int], grid: Sequence[int]) -> tuple[int, int]:
    """Row and column, in a grid that covers an image of `size` = (H, W), of the pixel (x, y)."""
    return position[1] * grid[0] // size[0], position[0] * grid[1] // size[1]


def _channel_distance(features, first, relation: str, temperature: float) -> float | None:
    projection = None
    if features.shape[1] != first.shape[1]:
        ours, theirs = (maps[0].flatten(1).mT.double() for maps in (features, first))  # (N, C)
        if len(ours) < POSITIONS_PER_CHANNEL * ours.shape[1]:
            return None
        projection = torch.linalg.lstsq(ours, theirs, driver="gelsd").solution.mT.float()
    return channel_relation_distance(features, first, relation, temperature, projection=projection).item()


# The figure


def _figure(
    shown: Sequence[ShownRelations], image: Image.Image, positions, relation: str, cell_size: int
) -> Image.Image:
    font, small = ImageFont.load_default(TEXT_SIZE), ImageFont.load_default(SMALL)
    zoom = cell_size / max(image.size)
    size = tuple(max(1, round(side * zoom)) for side in image.size)
    lefts = [GAP + i * (cell_size + GAP) for i in range(1 + len(shown))]
    width = lefts[-1] + cell_size + GAP
    heads = [wrap_text(entry.title, font, cell_size) for entry in shown]
    rows_top = GAP + max(map(len, heads)) * LINE + 3 * SMALL_LINE
    row_height = size[1] + SMALL_LINE + GAP
    bar_top = rows_top + len(positions) * row_height
    bar_space = BAR_HEIGHT + 2 * SMALL_LINE + GAP
    channels_top = bar_top + bar_space + GAP
    channels_bottom = channels_top + cell_size + (2 if relation == "cosine" else 1) * SMALL_LINE + GAP
    picture = Image.new("RGB", (width, channels_bottom + bar_space), PAPER)
    draw = ImageDraw.Draw(picture)

    def write(left: int, top: int, words: str) -> None:
        draw.text((left, top), shortened(words, small, cell_size), fill=INK, font=small)

    def paste(cell: Image.Image, left: int, top: int) -> None:
        picture.paste(cell, (left, top))
        draw.rectangle((left - 1, top - 1, left + cell.width, top + cell.height), outline=OUTLINE)

    heads = [["Spatial relations"], *heads]
    details = [["of the marked position", "to all others"], *map(_details, shown)]
    for left, head, more in zip(lefts, heads, details, strict=True):
        for i, line in enumerate(head):
            draw.text((left, rows_top - 3 * SMALL_LINE - 4 - (len(head) - i) * LINE), line, fill=INK, font=font)
        for i, line in enumerate(more):
            write(left, rows_top - (3 - i) * SMALL_LINE - 4, line)

    spatial = [_drawn_values(entry.spatial, relation, entry.spatial[0].size) for entry in shown]
    scale = _scale(spatial, relation, "of every position to the marked one")
    thumbnail = image.resize(size, Image.Resampling.BOX if zoom < 1 else Image.Resampling.BICUBIC)
    for p, (x, y) in enumerate(positions):
        top = rows_top + p * row_height
        paste(thumbnail, lefts[0], top)
        write(lefts[0], top + size[1] + 2, f"position ({x}, {y})")
        for left, entry, maps in zip(lefts[1:], shown, spatial, strict=True):
            paste(_heat(maps[p], size, scale), left, top)
            words = [f"predicts {entry.classes[p]}"] if entry.classes else []
            if entry.position_distances:
                words.append(f"distance {entry.position_distances[p]:#.3g}")
            write(left, top + size[1] + 2, ", ".join(words))
        for left in lefts:
            _ring(draw, left + (x + 0.5) * zoom, top + (y + 0.5) * zoom)
    _bar(draw, picture, (lefts[1], bar_top), width - GAP - lefts[1], scale)

    channel = [_drawn_values(entry.channel, relation, entry.width) for entry in shown]
    scale = _scale(channel, relation, "of every two channels")
    draw.text((lefts[0], channels_top - 4), "Channel relations", fill=INK, font=font)
    for i, line in enumerate(wrap_text(_channel_note(shown), small, cell_size)):
        write(lefts[0], channels_top - 4 + LINE + i * SMALL_LINE, line)
    for left, entry, maps in zip(lefts[1:], shown, channel, strict=True):
        paste(_heat(maps, (cell_size, cell_size), scale), left, channels_top)
        words = f"{entry.width} x {entry.width}"
        if entry.channel_distance is not None:
            fitted = ", fitted" if entry.width != shown[0].width else ""
            words += f", distance {entry.channel_distance:#.3g}{fitted}"
        write(left, channels_top + cell_size + 2, words)
        if relation == "cosine":  # of any width: how much the channels repeat each other
            write(left, channels_top + cell_size + 2 + SMALL_LINE, f"mean |cosine| {np.abs(maps).mean():#.3g}")
    _bar(draw, picture, (lefts[1], channels_bottom), width - GAP - lefts[1], scale)
    return _with_palette(picture, thumbnail)


def _with_palette(picture: Image.Image, photo: Image.Image) -> Image.Image:
    """A picture in 256 colours, less than half the size as a file: those of relations, of texts, and the best for the photo."""
    greys = np.repeat(np.linspace(0, 255, GREYS).round()[:, None], 3, axis=1)
    fixed = np.concatenate([heat_colors(), greys])
    of_photo = np.reshape(photo.quantize(256 - len(fixed)).getpalette(), (-1, 3))
    palette = np.concatenate([fixed, of_photo]).astype(np.float32)
    # Pillow matches to a palette by way of a coarse grid: white paper would turn into the white of a cosine of 0.
    pixels = np.asarray(picture).astype(np.uint32)
    packed = pixels[..., 0] << 16 | pixels[..., 1] << 8 | pixels[..., 2]
    colors, places = np.unique(packed, return_inverse=True)
    colors = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1).astype(np.float32)
    nearest = ((palette**2).sum(axis=1) - 2 * colors @ palette.T).argmin(axis=1)
    indexed = Image.fromarray(nearest[places].reshape(packed.shape).astype(np.uint8), "P")
    indexed.putpalette(palette.astype(np.uint8).ravel().tolist())
    return indexed


def _details(entry: ShownRelations) -> list[str]:
    rows, columns = entry.spatial.shape[1:]
    lines = [entry.layer, f"{entry.width} channels, {rows} x {columns} positions"]
    if entry.spatial_distance is not None:
        lines.append(f"distance of all positions {entry.spatial_distance:#.3g}")
    return lines


def _channel_note(shown: Sequence[ShownRelations]) -> str:
    note = "of every two channels, like ones beside each other."
    if any(entry.width != shown[0].width for entry in shown):
        note += (
            f" The projector to the {shown[0].width} channels of the {shown[0].title} is dropped after training: other"
            " widths are shown as they are, in an order of their own. Fitted: their distance after the linear map that"
            f" takes their features closest to those of the {shown[0].title}."
        )
    return note


@dataclass(frozen=True)
class _Scale:
    """What the colours of a row of maps mean: 0 is white, `high` the end."""

    low: float
    high: float
    name: str


def _scale(maps: Sequence[np.ndarray], relation: str, of_what: str) -> _Scale:
    if relation == "cosine":
        return _Scale(-1.0, 1.0, f"cosine {of_what}")
    high = max(1.0, float(np.quantile(np.concatenate([values.ravel() for values in maps]), ATTENTION_SHOWN)))
    return _Scale(0.0, high, f"attention {of_what}, 1 if it were even; the highest {1 - ATTENTION_SHOWN:.1%} are cut")


def _drawn_values(maps: np.ndarray, relation: str, items: int) -> np.ndarray:
    """Cosines as they are, attention in multiples of an even one, 1 / items: grids of other sizes share a scale."""
    return maps if relation == "cosine" else maps * items


def _heat(values: np.ndarray, size: tuple[int, int], scale: _Scale) -> Image.Image:
    shrinks = values.shape[1] > size[0] or values.shape[0] > size[1]
    resampling = Image.Resampling.BOX if shrinks else Image.Resampling.NEAREST
    values = np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, resampling))
    return Image.fromarray(_colored(values / scale.high))


def _colored(strength: np.ndarray) -> np.ndarray:
    """(...) numbers from -1 to 1 -> (..., 3) uint8."""
    return heat_colors()[np.round((strength.clip(-1, 1) + 1) * COLOR_STEPS).astype(int)]


def _bar(draw: ImageDraw.ImageDraw, picture: Image.Image, corner: tuple[int, int], width: int, scale: _Scale) -> None:
    left, top = corner
    small = ImageFont.load_default(SMALL)
    ramp = np.linspace(scale.low, scale.high, width) / scale.high
    picture.paste(Image.fromarray(np.repeat(_colored(ramp)[None], BAR_HEIGHT, axis=0)), corner)
    draw.rectangle((left - 1, top - 1, left + width, top + BAR_HEIGHT), outline=OUTLINE)
    for share, anchor in ((0, "la"), (0.25, "ma"), (0.5, "ma"), (0.75, "ma"), (1, "ra")):
        value = scale.low + share * (scale.high - scale.low)
        draw.text((left + share * width, top + BAR_HEIGHT + 3), f"{value:.3g}", fill=INK, font=small, anchor=anchor)
    below = top + BAR_HEIGHT + 2 + SMALL_LINE
    draw.text((left + width / 2, below), scale.name, fill=INK, font=small, anchor="ma")


def _ring(draw: ImageDraw.ImageDraw, x: float, y: float) -> None:
    """A mark that is seen on dark and on light: white in black."""
    for radius, color, line in ((RING + 1, (0, 0, 0), 4), (RING, (255, 255, 255), 2)):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), outline=color, width=line)
