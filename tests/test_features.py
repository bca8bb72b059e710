import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, SegformerConfig, ViTMAEConfig

from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks, feature_widths, gives_class_scores
from drd_hf.models import default_feature_layer

from .conftest import VIT, tiny_encoder, tiny_model, tiny_universal


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


def test_inner_layers_of_hiera_are_refused_for_the_order_of_their_tokens():
    # Their number fits the grid, but they are not in rows: the map was scrambled without a word.
    model = tiny_encoder("hiera")
    with pytest.raises(UserError, match="no order of places"):
        FeatureHooks(model, ["encoder.stages.0"])
    FeatureHooks(model, ["encoder"]).remove()


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
def test_the_width_of_a_layer_is_found(family, width):
    model = tiny_model(family, width=2).train()
    layer = default_feature_layer(model)
    assert feature_widths(model, [layer]) == {layer: width}
    assert model.training


def test_a_family_without_an_entry_is_run_to_find_the_norm_before_its_classifier():
    for family in ("segformer", "mobilenet_v2", "upernet on resnet", "beit", "dpt"):
        model = tiny_model(family)
        of_the_table = default_feature_layer(model)
        model.config.model_type = "unheard_of"
        assert default_feature_layer(model) == of_the_table


def test_a_model_without_a_feature_map_has_no_default_layer():
    class Average(nn.Module):
        def __init__(self):
            super().__init__()
            self.config = SegformerConfig()
            self.linear = nn.Linear(3, 4)

        def forward(self, pixel_values):
            return self.linear(pixel_values.mean((2, 3)))

    with pytest.raises(UserError, match="feature_layers"):
        default_feature_layer(Average())


def test_finding_layers_and_widths_leaves_the_model_as_it_was():
    model = tiny_encoder("vit").train()
    model.layernorm.eval()
    state = torch.get_rng_state()
    feature_widths(model, [default_feature_layer(model)])
    assert model.training and not model.layernorm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


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


def test_channels_last_are_refused_in_training_too():
    class ChannelsLast(nn.Module):
        def forward(self, x):
            return x.permute(0, 2, 3, 1)

    model = nn.Sequential(ChannelsLast())
    with FeatureHooks(model, ["0"]) as hooks, pytest.raises(UserError, match="channels last"):
        model(torch.rand(2, 16, 12, 8))
        hooks.pop()


@pytest.mark.parametrize(("family", "prefix"), [("dinov2_with_registers", 5), ("deit", 2), ("swin", 0)])
def test_tokens_of_an_image_that_is_not_square_become_its_map(family, prefix):
    """Without class, distillation and register tokens; a square grid was guessed from the number of tokens before."""
    model = tiny_encoder(family).eval()
    patch = 32 if family == "swin" else model.config.patch_size
    pixel_values = torch.randn(2, 3, 2 * patch, 8 * patch)  # 16 tokens, which would be a square too
    options = {"interpolate_pos_encoding": True} if family == "deit" else {}
    with FeatureHooks(model, ["layernorm"]) as hooks, torch.no_grad():
        tokens = model(pixel_values=pixel_values, **options).last_hidden_state  # (B, prefix + 16, C)
        features = hooks.pop()["layernorm"]
    assert features.shape == (2, tokens.shape[2], 2, 8)
    for row in range(2):
        for column in range(8):
            assert torch.equal(features[:, :, row, column], tokens[:, prefix + 8 * row + column])


def test_a_border_that_fills_no_patch_is_left_out_or_padded():
    model = tiny_encoder("dinov2")
    with FeatureHooks(model, ["layernorm"]) as hooks:
        model(pixel_values=torch.zeros(1, 3, 64, 100))
        assert hooks.pop()["layernorm"].shape[-2:] == (4, 7)  # patches of 14 pixels, cut
    model = tiny_encoder("swin")
    with FeatureHooks(model, ["layernorm"]) as hooks:
        model(pixel_values=torch.zeros(1, 3, 70, 100))
        assert hooks.pop()["layernorm"].shape[-2:] == (3, 4)  # 32 pixels, padded


def test_tokens_that_cover_no_grid_of_the_image_are_refused():
    class Reordered(nn.Module):
        """Gives windows in the place of images, or some tokens only."""

        def __init__(self):
            super().__init__()
            self.windows, self.some, self.ids = nn.Identity(), nn.Identity(), nn.Identity()

        def forward(self, pixel_values):
            tokens = pixel_values.flatten(2).mT
            self.windows(tokens.reshape(4 * len(tokens), -1, 3))
            self.some(tokens[:, :35])
            self.ids(pixel_values.long())

    for layer in ("windows", "some", "ids"):
        model = Reordered()
        with FeatureHooks(model, [layer]) as hooks, pytest.raises(UserError, match=f"{layer!r} gives a tensor"):
            model(torch.rand(2, 3, 8, 8))
            hooks.pop()


def test_a_hidden_part_of_the_tokens_is_not_taken_for_a_coarser_grid():
    # ViTMAE keeps a quarter of its patches in a random order: as many as patches twice as wide would be.
    torch.manual_seed(0)
    model = AutoModel.from_config(ViTMAEConfig(**VIT)).eval()
    with FeatureHooks(model, ["layernorm"]) as hooks, pytest.raises(UserError, match="not a .* feature map"):
        model(pixel_values=torch.rand(1, 3, 64, 64))
        hooks.pop()


def test_a_layer_that_runs_twice_in_one_pass_is_refused():
    # The hook kept the last of several maps and said nothing.
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(self.conv(x)))

    model, x = Shared(), torch.rand(2, 3, 4, 4)
    with FeatureHooks(model, ["conv"]) as hooks, pytest.raises(UserError, match="'conv' ran 2 times"):
        model(x)
        hooks.pop()
    with FeatureHooks(model, ["norm"]) as hooks:
        for _ in range(2):  # once in each of two passes, the first of which nobody read
            expected = model(x)
        assert torch.equal(hooks.pop()["norm"], expected)


@pytest.mark.parametrize(
    "output", [lambda x: (x, x), lambda x: [x, x], lambda x: {"a": x, "b": x}, lambda x: "a", lambda x: None]
)
def test_a_layer_that_gives_no_single_tensor_is_refused(output):
    # Of a tuple the first tensor was taken, of a list the last.
    class Parts(nn.Module):
        def forward(self, x):
            return output(x)

    model = nn.Sequential(Parts())
    with FeatureHooks(model, ["0"]) as hooks, pytest.raises(UserError, match="'0' gives .* not a feature map"):
        model(torch.rand(1, 3, 4, 4))
        hooks.pop()


def test_a_tuple_of_one_map_is_that_map():
    class Single(nn.Module):
        def forward(self, x):
            return x, None

    x = torch.rand(1, 3, 4, 4)
    model = nn.Sequential(Single())
    with FeatureHooks(model, ["0"]) as hooks:
        model(x)
        assert hooks.pop()["0"] is x


def test_blocks_that_run_again_in_the_backward_pass_leave_nothing_behind():
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Tanh(), nn.Conv2d(3, 3, 1))

        def forward(self, x):
            return checkpoint(self.block, x, use_reentrant=False)

    model, runs = Checkpointed(), []
    convolution = model.block[0]
    convolution.register_forward_hook(lambda module, args, output: runs.append(output))
    with FeatureHooks(model, ["block.0"]) as hooks:
        for _ in range(2):
            x = torch.rand(1, 3, 4, 4)
            output = model(x)
            features = hooks.pop()["block.0"]
            torch.testing.assert_close(features, nn.functional.conv2d(x, convolution.weight, convolution.bias))
            output.sum().backward()
            with pytest.raises(UserError, match="was not run"):
                hooks.pop()
    assert len(runs) == 4  # each block ran again


def test_hooks_of_a_compiled_model_find_the_layers_by_their_own_names():
    model = tiny_model("segformer").eval()
    layer = default_feature_layer(model)
    compiled = torch.compile(model, backend="eager")
    assert default_feature_layer(compiled) == layer
    assert feature_widths(compiled, [layer]) == feature_widths(model, [layer])
    pixel_values = torch.rand(1, 3, 64, 64)
    with FeatureHooks(model, [layer]) as hooks, torch.no_grad():
        model(pixel_values=pixel_values)
        expected = hooks.pop()[layer]
    with FeatureHooks(compiled, [layer]) as hooks, torch.no_grad():
        for _ in range(2):
            compiled(pixel_values=pixel_values)
            torch.testing.assert_close(hooks.pop()[layer], expected)


def test_only_semantic_segmenters_give_class_scores():
    assert gives_class_scores(tiny_model("segformer"))
    assert not gives_class_scores(tiny_encoder("vit")) and not gives_class_scores(tiny_universal("mask2former"))


def test_a_model_that_wants_more_than_images_is_named():
    class Captioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, pixel_values, input_ids):
            return self.conv(pixel_values)

    with pytest.raises(UserError, match="Captioned does not run on a blank image") as caught:
        feature_widths(Captioned(), ["conv"])
    assert "\n" not in str(caught.value)
