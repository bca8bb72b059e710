"""Joint transforms of image and label tiles for `dataset.with_transform`, and the collator that makes batches of them."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import rasterio
import torch
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.tiles import covered_before
from drd_hf.errors import UserError

PNG_END = b"IEND\xaeB`\x82"


class RandomScaledCrop(v2.Transform):
    """Cut a random window and resize it to `crop_size`: random scaling and random cropping in one cheap step.

    The scale is uniform in `scale`, the window `crop_size / scale` wide. Where it reaches beyond the tile the image is
    black and the mask 255. Up to `tries` places are drawn until no class covers more than `max_class_share` of the
    window's labelled pixels; if none is found, the place with the lowest such share is taken.
    """

    def __init__(self, crop_size: int, scale: tuple[float, float], max_class_share: float, tries: int = 10):
        super().__init__()
        self.crop_size, self.scale, self.max_class_share, self.tries = crop_size, tuple(scale), max_class_share, tries

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        mask = next(x for x in flat_inputs if isinstance(x, tv_tensors.Mask))  # (H, W)
        window = max(round(self.crop_size / torch.empty(()).uniform_(*self.scale).item()), 1)
        best = math.inf, None
        for _ in range(self.tries):
            top, left = (_random_offset(length, window) for length in mask.shape[-2:])
            share = _largest_class_share(mask[max(top, 0) : top + window, max(left, 0) : left + window])
            if share < best[0] or best[1] is None:
                best = share, (top, left)
            if share <= self.max_class_share or window >= max(mask.shape[-2:]):  # all windows hold the whole tile
                break
        top, left = best[1]
        return {"top": top, "left": left, "window": window}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        top, left, window = params["top"], params["left"], params["window"]
        height, width = inpt.shape[-2:]
        size = [self.crop_size, self.crop_size]
        is_mask = isinstance(inpt, tv_tensors.Mask)
        # Padding by hand, because F.crop fills what lies beyond the tile with 0, which is a class.
        padding = [max(-left, 0), max(-top, 0), max(left + window - width, 0), max(top + window - height, 0)]
        inpt = inpt[..., max(top, 0) : top + window, max(left, 0) : left + window]
        if is_mask:
            # F.resize rounds masks down, half a pixel away from where it puts the image; nearest-exact does not.
            mask = F.pad_mask(inpt, padding, fill=IGNORE_INDEX)
            mask = F.resize_image(mask[None], size, interpolation=v2.InterpolationMode.NEAREST_EXACT)[0]
            return tv_tensors.Mask(mask)
        return tv_tensors.Image(F.resize_image(F.pad_image(inpt, padding), size, antialias=True))


class RandomQuarterTurn(v2.Transform):
    """Turn by 0, 90, 180 or 270 degrees: aerial images have no up."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        return {"turns": int(torch.randint(4, ()))}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return tv_tensors.wrap(torch.rot90(inpt, params["turns"], (-2, -1)), like=inpt)


class ColorJitterOfThree(v2.ColorJitter):
    """`ColorJitter` of the first three channels; what follows them, near infrared for example, is left alone.

    One or two channels are no colours: their brightness and contrast vary, of each by itself.
    """

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, tv_tensors.Mask):
            return inpt
        image = inpt.as_subclass(torch.Tensor)
        grey = len(image) < 3
        adjust = (
            (F.adjust_brightness_image, params["brightness_factor"]),
            (F.adjust_contrast_image, params["contrast_factor"]),
            (F.adjust_saturation_image, None if grey else params["saturation_factor"]),
            (shift_hue, None if grey else params["hue_factor"]),
        )
        colors = image[:, None] if grey else image[:3]
        for step in params["fn_idx"]:
            function, factor = adjust[step]
            if factor is not None:
                colors = function(colors, factor)
        if grey:
            return tv_tensors.Image(colors[:, 0])
        return tv_tensors.Image(torch.cat((colors, image[3:])) if len(image) > 3 else colors)


def shift_hue(image: torch.Tensor, turns: float) -> torch.Tensor:
    """Turn the hue of a uint8 (3, H, W) image, -0.5 to 0.5 turns, in whole numbers, a tenth of the time of floats.

    On the hexagon of HSV colours hue times chroma is a sum of differences of channels: nothing is divided. Within one
    grey level of torchvision's `adjust_hue`.
    """
    red, green, blue = image.to(torch.int16)  # |values| stay below 12 * 255
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    hue = torch.where(green == high, blue - red + 2 * chroma, red - green + 4 * chroma)
    hue = torch.where(red == high, green - blue, hue)  # 0 red, 2 chroma green, 4 chroma blue, 6 chroma a full turn
    hue += (chroma * (6 * turns)).round_().to(torch.int16)
    full = 6 * chroma
    hue += full * (hue < 0)
    hue -= full * (hue >= full)
    above = (
        (hue - 3 * chroma).abs_() - chroma,
        2 * chroma - (hue - 2 * chroma).abs_(),
        2 * chroma - (hue - 4 * chroma).abs_(),
    )
    return torch.stack([low + x.clamp_min_(0).minimum(chroma) for x in above]).to(torch.uint8)


class TrainTransform:
    """Random scale, crop, flips, quarter turns and colours. For `dataset.with_transform`.

    Takes a batch of columns with lists of `image` (PIL, uint8 arrays of H x W x C, or undecoded, see `undecoded`),
    `extra_bands` (lists of single-channel images, None or absent where there are none) and `label` (None for a tile
    without labels); returns lists `image` of uint8 (C, S, S), the extra bands behind the channels of the image, and
    `labels` of uint8 (S, S), S being `crop_size`, and the columns `source`, `row` and `column` as they are, where the
    dataset has them. Other columns are dropped. Randomness is torch's global generator, which the Trainer seeds.

    Args:
        crop_size: side of the result in pixels.
        scale: range of the random magnification; (1, 1) for none. Below `crop_size / tile_size` tiles do not fill
            the crop, and the rest is black and ignored.
        max_class_share: see `RandomScaledCrop`; 1 takes the first window with a label.
        horizontal_flip, vertical_flip, quarter_turns, photometric: switch augmentations off with False. Photometric
            jitter is of the first three channels, taken for colours; of one or two, only brightness and contrast.

    Attribute `settings`: these arguments by name.
    """

    def __init__(
        self,
        crop_size: int,
        scale: tuple[float, float] = (0.5, 2.0),
        max_class_share: float = 0.75,
        horizontal_flip: bool = True,
        vertical_flip: bool = True,
        quarter_turns: bool = True,
        photometric: bool = True,
    ):
        if crop_size < 1:
            raise UserError(f"crop_size is {crop_size}; give a positive number of pixels")
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= torch.finfo(torch.float32).max:
            raise UserError(f"scale is {scale}; give two positive finite numbers, the smaller one first")
        if not 0 < max_class_share <= 1:
            raise UserError(f"max_class_share is {max_class_share}; give a share above 0 and at most 1")
        self.settings = {
            "crop_size": crop_size,
            "scale": list(scale),
            "max_class_share": max_class_share,
            "horizontal_flip": horizontal_flip,
            "vertical_flip": vertical_flip,
            "quarter_turns": quarter_turns,
            "photometric": photometric,
        }
        steps = [RandomScaledCrop(crop_size, scale, max_class_share)]
        if horizontal_flip:
            steps.append(v2.RandomHorizontalFlip())
        if vertical_flip:
            steps.append(v2.RandomVerticalFlip())
        if quarter_turns:
            steps.append(RandomQuarterTurn())
        if photometric:
            # Without the channel permutation of RandomPhotometricDistort: colour order means something from above.
            steps.append(
                v2.RandomApply([ColorJitterOfThree(brightness=0.2, contrast=0.3, saturation=0.3, hue=0.03)], p=0.5)
            )
        self.steps = v2.Compose(steps)

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        pairs = [self.steps(*pair) for pair in _pairs(batch, "label")]
        return {
            "image": [image.as_subclass(torch.Tensor) for image, _ in pairs],
            "labels": [mask.as_subclass(torch.Tensor) for _, mask in pairs],
            **{key: batch[key] for key in ("source", "row", "column") if key in batch},
        }


class EvalTransform:
    """Tiles as they are. For `dataset.with_transform`.

    Takes a batch of columns like `TrainTransform`; returns lists `image` of uint8 (C, H, W) and `labels` of uint8 (H, W),
    all 255 for a tile without labels.

    With `dataset` or `info` a pixel is labelled in the first tile that covers it and 255 in later ones, so that a metric
    counts each pixel of a source once even where tiles overlap.

    Args:
        dataset: the split to be evaluated; tiles of another one are refused.
        info: of the prepared dataset, instead of `dataset`; its tile size and stride tell enough, so that tiles of a
            stream need not be known beforehand.
        label: column that is the reference: `label`, or `label_eroded` where object borders are left out.
    """

    def __init__(self, dataset=None, info=None, label: str = "label"):
        if dataset is not None and info is not None:
            raise UserError("EvalTransform takes a dataset or its info, not both")
        self.label = label
        self.grid = None if info is None else (info.tile_size, info.stride)
        self.covered = None if dataset is None else _covered_by_earlier_tiles(dataset)

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list[torch.Tensor]]:
        pairs = _pairs(batch, self.label)
        images, labels = ([x.as_subclass(torch.Tensor) for x in column] for column in zip(*pairs, strict=True))
        if self.grid or self.covered is not None:
            places = zip(batch["source"], batch["row"], batch["column"], strict=True)
            for label, place in zip(labels, places, strict=True):
                top, left = self._covered(place)
                label[:top] = IGNORE_INDEX
                label[:, :left] = IGNORE_INDEX
        return {"image": images, "labels": labels}

    def _covered(self, place: tuple[str, int, int]) -> tuple[int, int]:
        if self.grid:
            return tuple(covered_by_grid(origin, *self.grid) for origin in place[1:])
        if place not in self.covered:
            raise UserError(f"tile {place} is not in the dataset that EvalTransform was made with; give that one")
        return self.covered[place]


def covered_by_grid(origin: int, tile_size: int, stride: int) -> int:
    """How many first pixels of the tile at `origin`, along one axis, the tile before it covers in a full grid.

    Tiles start at multiples of the stride, but for the last one, which ends at the border: the tile before any other
    starts at the largest multiple below it. Equal to `covered_before` of all origins.
    """
    return max((origin - 1) // stride * stride + tile_size - origin, 0) if origin else 0


class SegmentationCollator:
    """Stack transformed tiles into a batch, normalised as the model's image processor says.

    Takes items with `image` uint8 (C, H, W) and `labels` (H, W), None or absent where a tile has none; returns
    `pixel_values` float32 (B, C, H, W), `labels` int64 (B, H, W), 255 without labels, and `teacher_pixel_values` like
    `pixel_values` where the teacher is normalised differently or reads other channels. Items with a `source` add
    `sources`, B strings that name the tiles. Sizes are left alone: `do_resize` of a processor is not applied.

    Args:
        processor: image processor of the model that is trained or evaluated.
        teacher_processor: image processor of the teacher, if any; None: normalised like the model's.
        num_labels: number of classes of the model; other labels than these and 255 are refused. None: not checked.
        channels: indices of the channels that the model reads, in its order. None: all.
        teacher_channels: the same for the teacher. None: those of the model.
    """

    def __init__(
        self,
        processor,
        teacher_processor=None,
        num_labels: int | None = None,
        channels: Sequence[int] | None = None,
        teacher_channels: Sequence[int] | None = None,
    ):
        self.num_labels = num_labels
        self.normalization = normalization_of(processor)
        self.teacher_normalization = normalization_of(processor if teacher_processor is None else teacher_processor)
        self.channels = None if channels is None else list(channels)
        self.teacher_channels = self.channels if teacher_channels is None else list(teacher_channels)
        self.same_pixels = (self.normalization, self.channels) == (self.teacher_normalization, self.teacher_channels)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        masks = [_labels_of(item) for item in items]
        sizes = {tuple(x.shape[-2:]) for x in (*(item["image"] for item in items), *masks)}
        if len(sizes) > 1:
            shown = ", ".join(f"{height}x{width}" for height, width in sorted(sizes))
            raise UserError(f"tiles of different sizes in one batch: {shown}; use one tile or crop size")
        counts = {len(item["image"]) for item in items}
        if len(counts) > 1:
            raise UserError(
                f"tiles of {' and '.join(map(str, sorted(counts)))} channels in one batch: give one number"
            )
        images = torch.stack([item["image"] for item in items])
        labels = torch.stack([mask.long() for mask in masks])
        if self.num_labels is not None:
            wrong = labels[(labels < 0) | (labels >= self.num_labels) & (labels != IGNORE_INDEX)]
            if wrong.numel():
                raise UserError(
                    f"labels {wrong.unique().tolist()} are out of range: the model knows 0..{self.num_labels - 1}, and "
                    f"{IGNORE_INDEX} is ignored; prepare the dataset with the classes of this model"
                )
        student = _select(images, self.channels, "student_channels")
        batch = {"pixel_values": normalize(student, *self.normalization), "labels": labels}
        if not self.same_pixels:
            teacher = _select(images, self.teacher_channels, "teacher_channels")
            batch["teacher_pixel_values"] = normalize(teacher, *self.teacher_normalization)
        if all(item.get("source") is not None for item in items):
            batch["sources"] = [_name_of(item) for item in items]
        return batch


def _labels_of(item: Mapping[str, Any]) -> torch.Tensor:
    labels = item.get("labels")
    return torch.full(item["image"].shape[-2:], IGNORE_INDEX) if labels is None else labels


def _name_of(item: Mapping[str, Any]) -> str:
    row, column = item.get("row"), item.get("column")
    return str(item["source"]) if row is None or column is None else f"{item['source']} (row {row}, column {column})"


def _select(images: torch.Tensor, channels: list[int] | None, option: str) -> torch.Tensor:
    if channels is None:
        return images
    if not channels or not all(0 <= channel < images.shape[1] for channel in channels):
        raise UserError(
            f"{option} {channels}: the tiles have the channels 0 to {images.shape[1] - 1}, name some of these"
        )
    return images[:, channels]


def undecoded(dataset):
    """A split whose images reach the transforms as compressed bytes, which they decode in half the time."""
    encoded, columns = datasets.Image(decode=False), dataset.features or ()
    if "image" not in columns:
        return dataset
    dataset = dataset.cast_column("image", encoded)
    if "extra_bands" in columns:
        if isinstance(dataset, datasets.IterableDataset):
            dataset = dataset.cast_column("extra_bands", datasets.List(encoded))
        else:  # cast_column, for a list, would write the whole split to the disk anew
            dataset.info.features["extra_bands"] = datasets.List(encoded)
    for name in ("label", "label_eroded"):
        if name in columns:
            dataset = dataset.cast_column(name, encoded)
    return dataset


def decode(image) -> torch.Tensor:
    """uint8 (C, H, W) from a PIL image, a uint8 array or list of (H, W, C) or (H, W), or the bytes of an image file.

    Args:
        image: bytes are a dictionary with `bytes` or `path`, as an undecoded image column gives it. GDAL, whose PNG
            decoder takes half the time of libpng, is tried first.

    Raises:
        UserError: the bytes are no image, or cut short.
    """
    if isinstance(image, Mapping):
        image = _decode_bytes(image.get("bytes") or Path(image["path"]).read_bytes())
    if isinstance(image, torch.Tensor):
        return image
    return F.pil_to_tensor(image) if isinstance(image, Image.Image) else F.to_image(np.asarray(image, np.uint8))


def _decode_bytes(content: bytes) -> torch.Tensor | Image.Image:
    if content.endswith(PNG_END):  # GDAL gives black pixels for what is cut off
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                with rasterio.MemoryFile(content) as file, file.open(driver="PNG") as png:
                    return torch.from_numpy(png.read())
        except RasterioError:
            pass
    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except (OSError, SyntaxError) as error:
        raise UserError(f"the image of a tile is damaged ({error}); prepare or download the dataset again") from error
    return image


def _pairs(batch: Mapping[str, list], column: str) -> list[tuple[tv_tensors.Image, tv_tensors.Mask]]:
    """Image with its extra bands, and label, of every row."""
    nothing = [None] * len(batch["image"])
    if column != "label" and column not in batch:
        raise UserError(f"the dataset has no column {column}: prepare it with that reference, or evaluate on label")
    rows = zip(batch["image"], batch.get("extra_bands", nothing), batch.get(column, nothing), strict=True)
    pairs = []
    for i, row in enumerate(rows):
        try:
            pairs.append(_to_tv_tensors(*row))
        except UserError as error:
            place = {key: batch[key][i] for key in ("source", "row", "column") if key in batch}
            raise UserError(f"{_name_of(place)}: {error}" if place.get("source") else str(error)) from error
    return pairs


def _to_tv_tensors(image, extra_bands, label) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    image = decode(image)
    if extra_bands:
        image = torch.cat((image, *(decode(band) for band in extra_bands)))
    mask = torch.full(image.shape[-2:], IGNORE_INDEX, dtype=torch.uint8) if label is None else decode(label)[0]
    return tv_tensors.Image(image), tv_tensors.Mask(mask)


def _random_offset(length: int, window: int) -> int:
    """First pixel of a random window in `length` pixels; negative if the window is the larger of the two."""
    low, high = sorted((0, length - window))
    return int(torch.randint(low, high + 1, ()))


def _largest_class_share(mask: torch.Tensor) -> float:
    """Share of the most frequent class among labelled pixels; infinity if there are none."""
    counts = torch.bincount(mask.as_subclass(torch.Tensor).flatten(), minlength=256)
    counts[IGNORE_INDEX] = 0
    labelled = int(counts.sum())
    return int(counts.max()) / labelled if labelled else math.inf


def _covered_by_earlier_tiles(dataset) -> dict[tuple[str, int, int], tuple[int, int]]:
    """(source, row, column) of each tile -> how many of its top rows and left columns earlier tiles cover."""
    tile_size = decode(dataset.with_format(None)[0]["image"]).shape[-2]
    places = dataset.with_format(None).select_columns(["source", "row", "column"])
    places = list(zip(*(places[:][key] for key in ("source", "row", "column")), strict=True))
    rows, columns = {}, {}
    for source, row, column in places:
        rows.setdefault(source, set()).add(row)
        columns.setdefault(source, set()).add(column)
    tops = {source: covered_before(origins, tile_size) for source, origins in rows.items()}
    lefts = {source: covered_before(origins, tile_size) for source, origins in columns.items()}
    return {(s, row, column): (tops[s][row], lefts[s][column]) for s, row, column in places}


def normalization_of(processor) -> tuple[float, tuple[float, ...], tuple[float, ...], bool]:
    """Factor, mean and deviation per channel, and whether channels are reversed, as a processor's settings say."""
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    mean, std = (0.0,), (1.0,)
    if getattr(processor, "do_normalize", False):
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return factor, mean, std, bool(getattr(processor, "do_flip_channel_order", False))


def normalize(images: torch.Tensor, factor: float, mean, std, reverse_channels: bool) -> torch.Tensor:
    """uint8 (B, C, H, W) -> float32, with what `normalization_of` gives; a mean of one number is that of all channels."""
    if len(mean) not in (1, images.shape[1]):
        raise UserError(
            f"images of {images.shape[1]} channels meet an image processor for {len(mean)}: choose channels with "
            "student_channels and teacher_channels, or give the processor an image_mean and image_std for each"
        )
    if reverse_channels and images.shape[1] != 3:
        raise UserError(
            f"the image processor reverses colours (do_flip_channel_order), but the images have {images.shape[1]} channels: "
            "choose three with student_channels and teacher_channels"
        )
    images = images.flip(1) if reverse_channels else images
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    # (factor x - mean) / std in two passes, the first of which turns bytes into floats.
    scale, shift = ((x / std).to(images.device, torch.float32) for x in (factor, mean))
    return torch.mul(images, scale).sub_(shift)
