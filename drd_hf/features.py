"""Feature maps of named layers, taken by forward hooks."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from drd_hf.errors import UserError, nearest

# Parameters that hold tokens which stand for no place of the image; they come first in every sequence.
PREFIX_TOKENS = (
    *("cls_token", "class_token", "class_embedding", "distillation_token", "dist_token"),
    *("register_tokens", "reg_token"),
)


class FeatureHooks:
    """Captures the outputs of named layers of a model during its forward pass.

    A forward pass of the model starts clean, and reading ends it: what runs afterwards (blocks that gradient
    checkpointing runs again in the backward pass) is not captured. Register before the first call of a compiled model:
    hooks added later never fire.

    Args:
        model: any `nn.Module` that is called with images (B, C, H, W), by position or as `pixel_values`.
        layers: dotted names as in `model.named_modules()`. Each gives one tensor: a map (B, C, h, w) or tokens
            (B, N, C), which become the map of the grid that covers the image; class and register tokens are dropped.

    Raises:
        UserError: a layer that the model does not have (the nearest names are listed), or whose tokens are in no order of
            places (inner layers of Hiera).

    Example:
        >>> with FeatureHooks(model, ["decode_head.linear_fuse"]) as hooks:  # doctest: +SKIP
        ...     model(pixel_values)
        ...     features = hooks.pop()["decode_head.linear_fuse"]  # (B, C, H, W)
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]):
        self.layers = list(dict.fromkeys(layers))
        model = _uncompiled(model)
        modules = dict(model.named_modules())
        for layer in self.layers:
            if layer not in modules or not layer:
                raise UserError(
                    f"{type(model).__name__} has no layer {layer!r}; nearest names: {nearest(layer, filter(None, modules))}"
                )
        _refuse_unordered(model, self.layers)
        self._tokens = _TokenLayout.of(model)
        self._outputs: dict[str, list] = {}
        self._image_shape: tuple[int, ...] | None = None
        self._listening = False
        self._handles = []
        if self.layers:
            self._handles = [model.register_forward_pre_hook(self._start, with_kwargs=True)]
            self._handles += [modules[layer].register_forward_hook(self._capture(layer)) for layer in self.layers]

    def _start(self, module, args, kwargs):
        self._outputs = {}
        self._image_shape = _image_shape(args, kwargs)
        self._listening = True

    def _capture(self, layer: str):
        def hook(module, args, output):
            if self._listening:
                self._outputs.setdefault(layer, []).append(output)

        return hook

    def pop(self) -> dict[str, torch.Tensor]:
        """The feature maps of the last forward pass, {layer: (B, C, H, W)}; reading clears them.

        Raises:
            UserError: a layer was not run or ran more than once, or its output is not a feature map.
        """
        outputs, image_shape = self._outputs, self._image_shape
        self.clear()
        for layer in self.layers:
            times = len(outputs.get(layer, ()))
            if times == 0:
                raise UserError(f"layer {layer!r} was not run in the forward pass, choose another feature layer")
            if times > 1:
                raise UserError(
                    f"layer {layer!r} ran {times} times in one forward pass and gives no single feature map, "
                    "choose another feature layer"
                )
        return {layer: _feature_map(outputs[layer][0], layer, image_shape, self._tokens) for layer in self.layers}

    def clear(self) -> None:
        """Drop what was captured, to free its memory, and capture nothing until the next forward pass."""
        self._outputs = {}
        self._listening = False

    def remove(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.clear()

    def __enter__(self) -> "FeatureHooks":
        return self

    def __exit__(self, *exc) -> None:
        self.remove()


def feature_widths(model: nn.Module, layers: Iterable[str], image_size: int | None = None) -> dict[str, int]:
    """Number of channels of each layer's feature map, {layer: C}, from forward passes on blank images.

    Args:
        image_size: side of the blank image. Default: what the model's configuration says (one pass, since the model
            may take nothing else), or else 64 and 128.

    Raises:
        UserError: the model does not run on a blank image, or the "channels" of a layer change with the size of the
            image: its maps are (B, H, W, C).
    """
    model, layers = _uncompiled(model), list(layers)
    fixed = None if image_size else _setting(model, "image_size")
    sizes = [_pair(fixed)] if fixed else [_pair(image_size or 64), _pair(2 * (image_size or 64))]
    with FeatureHooks(model, layers) as hooks:
        maps = []
        for size in sizes:
            _run_on_blank(model, size)
            maps.append(hooks.pop())
    for layer in layers:
        if len({features[layer].shape[1] for features in maps}) > 1:
            raise _channels_last(layer)
    return {layer: feature.shape[1] for layer, feature in maps[0].items()}


@dataclass
class RunLayer:
    """A layer as it was met in a forward pass."""

    name: str
    module: nn.Module
    width: int | None  # channels of its feature map; None where it gives something else, or ran more than once
    stride: int | None = None  # pixels of the image for one position of the map, None without a width


def layers_in_order(model: nn.Module) -> tuple[list[RunLayer], object]:
    """The layers of a model in the order in which a forward pass on a blank image finishes them, and its output.

    Raises:
        UserError: the model does not run on a blank image.
    """
    model = _uncompiled(model)
    tokens, size = _TokenLayout.of(model), _pair(_setting(model, "image_size") or 64)
    order: list[RunLayer] = []

    def note(name):
        def hook(module, args, output):
            try:
                features = _feature_map(output, name, (1, 0, *size), tokens)
                width = features.shape[1] if features.shape[2] * features.shape[3] > 1 else None
                stride = max(round(size[0] / features.shape[2]), 1)
            except UserError:
                width = stride = None
            order.append(RunLayer(name, module, width, stride))

        return hook

    handles = [module.register_forward_hook(note(name)) for name, module in model.named_modules() if name]
    try:
        output = _run_on_blank(model, size)
    finally:
        for handle in handles:
            handle.remove()
    times = Counter(run.name for run in order)
    for run in order:
        if run.width is None or times[run.name] > 1:
            run.width = run.stride = None
    return order, output


def _refuse_unordered(model: nn.Module, layers: list[str]) -> None:
    # Hiera keeps the tokens of its inner stages in an order of its own, and their number fits the grid all the same.
    if _setting(model, "model_type") != "hiera":
        return
    for layer in layers:
        stage = re.search(r"(?:^|\.)stages\.(\d+)\.", f"{layer}.")
        if stage and int(stage[1]) < len(_setting(model, "depths")) - 1:
            raise UserError(
                f"layer {layer!r} of Hiera has its tokens in no order of places, choose 'encoder' or its last stage"
            )


def input_channels(model: nn.Module) -> int:
    """Channels of the images that a model reads."""
    return _setting(model, "num_channels") or 3


def gives_class_scores(model: nn.Module) -> bool:
    """Whether a model gives logits (B, classes, h, w) for images, as semantic segmenters do and others do not."""
    logits = getattr(_run_on_blank(_uncompiled(model), _pair(_setting(model, "image_size") or 64)), "logits", None)
    return isinstance(logits, torch.Tensor) and logits.ndim == 4


@dataclass
class _TokenLayout:
    """How a model lays out an image as tokens."""

    prefix: int  # tokens in front that stand for no place
    patch: tuple[int, int] | None  # height and width of a patch in pixels

    @classmethod
    def of(cls, model: nn.Module) -> "_TokenLayout":
        # Counted from the parameters, because configurations do not say whether there is a class token.
        prefix = sum(
            p.shape[-2] if p.ndim > 1 else 1
            for name, p in model.named_parameters()
            if name.rpartition(".")[2] in PREFIX_TOKENS
        )
        patch = _setting(model, "patch_size")
        return cls(prefix, _pair(patch) if patch else None)

    def grid(self, tokens: int, height: int, width: int) -> tuple[int, int, int] | None:
        """(rows, columns, prefix tokens) of so many tokens that cover an image; None if no grid fits."""
        # A class token goes with one grid of patches. Without it, stages may merge tokens, by powers of two.
        plain = self.prefix and self.patch
        steps = [(a * 2**k, b * 2**k) for a, b in (self.patch or (1, 1), (1, 1)) for k in range(7)]
        for prefix in dict.fromkeys((self.prefix, 0)):
            count = tokens - prefix
            for a, b in [self.patch] if plain else steps:  # the border of the image is cut or padded
                for rows, columns in ((height // a, width // b), (math.ceil(height / a), math.ceil(width / b))):
                    if rows * columns == count > 0:
                        return rows, columns, prefix
            rows = math.isqrt(count * height // width) if count > 0 and not plain else 0
            if (
                rows and count % rows == 0 and rows * width == count // rows * height
            ):  # exactly the image's proportions
                return rows, count // rows, prefix
        return None


def _feature_map(output, layer: str, image_shape: tuple[int, ...] | None, tokens: _TokenLayout) -> torch.Tensor:
    """A layer's output as (B, C, h, w): a map as it is, tokens (B, N, C) laid out on the grid of an image (B, C, H, W)."""
    while not isinstance(output, torch.Tensor):
        kind = type(output).__name__
        values = output.values() if isinstance(output, Mapping) else output
        values = [v for v in values if v is not None] if isinstance(output, (Mapping, tuple, list)) else []
        if len(values) != 1:
            raise UserError(
                f"layer {layer!r} gives {kind} with {len(values)} values, not a feature map; choose another layer"
            )
        output = values[0]
    if not output.is_floating_point() or output.ndim not in (3, 4):
        raise _no_map(output, layer, image_shape)
    if image_shape is not None and output.shape[0] != image_shape[0]:
        raise _no_map(output, layer, image_shape)  # windows of attention stand in the place of images
    if output.ndim == 3:
        count = output.shape[1]
        side = math.isqrt(count)
        if image_shape is not None:
            grid = tokens.grid(count, *image_shape[2:])
        else:
            grid = (side, side, 0) if side * side == count else None
        if grid is None:
            raise _no_map(output, layer, image_shape)
        rows, columns, prefix = grid
        return output[:, prefix:].mT.unflatten(2, (rows, columns))
    if image_shape is not None:
        _, a, b, c = output.shape
        if _covers(a, b, *image_shape[2:]) and not _covers(b, c, *image_shape[2:]):
            raise _channels_last(layer)
    return output


def _no_map(output: torch.Tensor, layer: str, image_shape: tuple[int, ...] | None) -> UserError:
    of_what = "" if image_shape is None else f" of a {image_shape[2]}x{image_shape[3]} image"
    return UserError(
        f"layer {layer!r} gives a tensor of shape {tuple(output.shape)}, not a (B, C, H, W) feature map{of_what}; "
        "choose another layer"
    )


def _covers(rows: int, columns: int, height: int, width: int) -> bool:
    """Whether a grid has the proportions of an image, up to a row or column at the border."""
    return abs(rows * width - columns * height) <= max(height, width)


def _channels_last(layer: str) -> UserError:
    return UserError(f"layer {layer!r} gives channels last, not (B, C, H, W): choose another layer")


def _image_shape(args: tuple, kwargs: Mapping) -> tuple[int, ...] | None:
    """Shape of the images that a model is called with, (B, C, H, W)."""
    for value in (kwargs.get("pixel_values"), *args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim == 4:
            return tuple(value.shape)
    return None


def _run_on_blank(model: nn.Module, size: tuple[int, int]):
    """Output of a model in eval mode for one black image of a (height, width)."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(()))
    image = torch.zeros(1, input_channels(model), *size, device=parameter.device, dtype=parameter.dtype)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return model(pixel_values=image)
    except UserError:
        raise
    except Exception as error:  # whatever a model raises, it cannot be used
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{type(model).__name__} does not run on a blank image of {size[0]}x{size[1]} pixels ({reason}): "
            "choose a model that takes pixel_values alone"
        ) from error
    finally:
        for module in training:
            module.training = True


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)


def _setting(model: nn.Module, name: str):
    """A value of the model's configuration, or else of its backbone's; None if neither has it."""
    config = getattr(model, "config", None)
    for holder in (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None)):
        value = holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)
        if value is not None:
            return value
    return None


def _pair(value) -> tuple[int, int]:
    return tuple(int(x) for x in value) if isinstance(value, (list, tuple)) else (int(value), int(value))
