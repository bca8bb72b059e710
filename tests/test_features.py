import pytest
import torch
from torch import nn

from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks, feature_widths
from drd_hf.models import default_feature_layer

from .conftest import tiny_model


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.square, self.odd, self.unused = nn.Identity(), nn.Identity(), nn.Identity()

    def forward(self, x):
        return self.square(x.flatten(2).mT), self.odd(x.flatten(2).mT[:, 1:])


def test_hooks_give_the_output_of_the_named_layer_and_clear_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    x = torch.randn(1, 3, 5, 5)
    with FeatureHooks(model, ["0"]) as hooks:
        model(x)
        captured = hooks.pop()["0"]
        with pytest.raises(UserError, match="was not run"):
            hooks.pop()
        torch.testing.assert_close(captured, torch.nn.functional.conv2d(x, model[0].weight, model[0].bias))
        model(x)
        hooks.clear()
        with pytest.raises(UserError, match="was not run"):
            hooks.pop()


def test_hooks_are_removed_on_leaving():
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    with FeatureHooks(model, ["0"]):
        assert model[0]._forward_hooks
    assert not model[0]._forward_hooks


def test_unknown_layer_lists_the_nearest_names():
    with pytest.raises(UserError, match="decode_head.linear_fuse"):
        FeatureHooks(tiny_model("segformer"), ["decode_head.linear_fusion"])


def test_square_tokens_become_a_map_and_others_are_refused():
    x = torch.arange(2 * 3 * 4 * 4.0).reshape(2, 3, 4, 4)
    model = Tokens()
    with FeatureHooks(model, ["square"]) as hooks:
        model(x)
        torch.testing.assert_close(hooks.pop()["square"], x)
    with FeatureHooks(model, ["odd"]) as hooks, pytest.raises(UserError, match="not a .* feature map"):
        model(x)
        hooks.pop()


@pytest.mark.parametrize(("family", "width"), [("segformer", 32), ("upernet", 32), ("mobilenet_v2", 256)])
def test_every_family_has_a_default_layer_with_a_feature_map(family, width):
    model = tiny_model(family, width=2).train()
    layer = default_feature_layer(model)
    assert feature_widths(model, [layer]) == {layer: width}
    assert model.training


def test_default_layer_of_an_unknown_family_is_refused():
    model = tiny_model("segformer")
    model.config.model_type = "unheard_of"
    with pytest.raises(UserError, match="feature_layers"):
        default_feature_layer(model)


def test_layers_with_channels_last_are_refused():
    # (B, H, W, C) of Swin-type layers was read as (B, C, H, W): the width of the image passed for its channels.
    class ChannelsLast(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 8, 1), nn.Identity()

        def forward(self, pixel_values):
            return self.last(self.conv(pixel_values).permute(0, 2, 3, 1))

    assert feature_widths(ChannelsLast(), ["conv"]) == {"conv": 8}
    with pytest.raises(UserError, match="channels last"):
        feature_widths(ChannelsLast(), ["last"])
