"""Feature maps of named layers, taken by forward hooks."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from drd_hf.errors import UserError, nearest


class FeatureHooks:
    """Captures the outputs of named layers of a model during its forward pass.

    Register before the first call of a compiled model: hooks added later never fire.

    Args:
        model: any `nn.Module`.
        layers: dotted names as in `model.named_modules()`.

    Raises:
        UserError: a layer that the model does not have (the nearest names are listed).

    Example:
        >>> with FeatureHooks(model, ["decode_head.linear_fuse"]) as hooks:  # doctest: +SKIP
        ...     model(pixel_values)
        ...     features = hooks.pop()["decode_head.linear_fuse"]  # (B, C, H, W)
    """

    def __init__(self, model: nn.Module, layers: Iterable[str]):
        self.layers = list(dict.fromkeys(layers))
        modules = dict(model.named_modules())
        for layer in self.layers:
            if layer not in modules or not layer:
                raise UserError(
                    f"{type(model).__name__} has no layer {layer!r}; nearest names: {nearest(layer, filter(None, modules))}"
                )
        self._features: dict[str, torch.Tensor] = {}
        self._handles = [modules[layer].register_forward_hook(self._capture(layer)) for layer in self.layers]

    def _capture(self, layer: str):
        def hook(module, args, output):
            self._features[layer] = output

        return hook

    def pop(self) -> dict[str, torch.Tensor]:
        """The feature maps of the last forward pass, {layer: (B, C, H, W)}; reading clears them.

        Raises:
            UserError: a layer was not run, or its output is not a feature map.
        """
        captured, self._features = self._features, {}
        missing = [layer for layer in self.layers if layer not in captured]
        if missing:
            raise UserError(f"layer {missing[0]!r} was not run in the forward pass, choose another feature layer")
        return {layer: _feature_map(captured[layer], layer) for layer in self.layers}

    def clear(self) -> None:
        """Drop what was captured, to free its memory."""
        self._features = {}

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


def feature_widths(model: nn.Module, layers: Iterable[str], image_size: int = 64) -> dict[str, int]:
    """Number of channels of each layer's feature map, {layer: C}, from two forward passes on blank images.

    Raises:
        UserError: the "channels" of a layer change with the size of the image: its maps are (B, H, W, C).
    """
    config = getattr(model, "config", None)
    channels = getattr(config, "num_channels", None) or 3
    parameter = next(model.parameters())
    training = model.training
    model.eval()
    try:
        with FeatureHooks(model, layers) as hooks, torch.no_grad():
            widths = []
            for size in (image_size, 2 * image_size):
                model(
                    pixel_values=torch.zeros(1, channels, size, size, device=parameter.device, dtype=parameter.dtype)
                )
                widths.append({layer: feature.shape[1] for layer, feature in hooks.pop().items()})
    finally:
        model.train(training)
    for layer, width in widths[0].items():
        if widths[1][layer] != width:
            raise UserError(f"layer {layer!r} gives channels last, not (B, C, H, W): choose another layer")
    return widths[0]


def _feature_map(output, layer: str) -> torch.Tensor:
    """A layer's output as (B, C, H, W). Tuples and model outputs give their first tensor, (B, N, C) tokens their square grid."""
    while not isinstance(output, torch.Tensor):
        if isinstance(output, dict):  # ModelOutput
            output = next(iter(output.values()))
        elif isinstance(output, (tuple, list)) and output:
            output = output[-1] if isinstance(output, list) else output[0]
        else:
            raise UserError(f"layer {layer!r} gives {type(output).__name__}, not a feature map; choose another layer")
    if output.ndim == 3:
        batch, tokens, width = output.shape
        side = math.isqrt(tokens)
        if side * side == tokens:
            return output.mT.reshape(batch, width, side, side)
    if output.ndim != 4:
        raise UserError(
            f"layer {layer!r} gives a tensor of shape {tuple(output.shape)}, not a (B, C, H, W) feature map; "
            "choose another layer"
        )
    return output
