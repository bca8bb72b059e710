"""Relation maps as pictures: the numbers against their definitions, the colours, the figure, the script."""

import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import SegformerImageProcessor

from drd_hf.errors import UserError
from drd_hf.features import FeatureHooks
from drd_hf.relation_pictures import (
    ShownModel,
    _channel_distance,
    _heat,
    _scale,
    channel_order,
    choose_positions,
    compare_relations,
    draw_relations,
    heat_colors,
    position_relations,
)

from .conftest import tiny_encoder, tiny_model

PROCESSOR = SegformerImageProcessor()
IMAGE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
STUDENT_LAYER, TEACHER_LAYER = "decode_head.batch_norm", "decode_head.fpn_bottleneck.batch_norm"


def shown(family="segformer", title="model", seed=0, **options):
    return ShownModel(title, tiny_model(family, seed=seed), PROCESSOR, **options)


def features_of(entry, layer):
    """What the layer gives for the image, normalised as the processor says, by hand: (C, h, w) float64."""
    pixels = (IMAGE / 255 - np.array(PROCESSOR.image_mean)) / np.array(PROCESSOR.image_std)
    with torch.no_grad(), FeatureHooks(entry.model.eval(), [layer]) as hooks:
        entry.model(pixel_values=torch.from_numpy(pixels).float().permute(2, 0, 1)[None])
        return hooks.pop()[layer][0].double().numpy()


def cosines(features, row, column):
    """(C, h, w) -> (h, w), cosine of one position with each."""
    chosen = features[:, row, column]
    lengths = np.sqrt((features**2).sum(0)) * np.sqrt((chosen**2).sum())
    return np.einsum("chw,c->hw", features, chosen) / lengths


# Numbers


def test_the_relations_of_a_position_are_its_cosines_to_all_others():
    features = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    maps = position_relations(features, [(0, 0), (3, 5)])
    for values, (row, column) in zip(maps, [(0, 0), (3, 5)], strict=True):
        np.testing.assert_allclose(values, cosines(features[0].double().numpy(), row, column), atol=1e-6)


def test_attention_is_the_softmax_of_scaled_products():
    features = torch.randn(1, 5, 4, 6, generator=torch.Generator().manual_seed(0))
    flat = features[0].double().numpy().reshape(5, 24)
    weights = np.exp(flat.T @ flat[:, 2 * 6 + 1] / (np.sqrt(5) * 0.7))
    (values,) = position_relations(features, [(2, 1)], "attention", 0.7)
    np.testing.assert_allclose(values.flatten(), weights / weights.sum(), rtol=1e-5)


def test_a_position_without_features_is_related_to_nothing():
    features = torch.ones(1, 3, 2, 2)
    features[..., 0, 1] = 0
    assert position_relations(features, [(0, 1)]).tolist() == [[[0, 0], [0, 0]]]


def test_models_are_compared_at_the_positions_of_the_image():
    student, other = shown(), shown(seed=1)
    first, second = compare_relations([student, other], IMAGE, [(0, 0), (95, 40)])
    a, b = (features_of(entry, STUDENT_LAYER) for entry in (student, other))
    assert first.spatial.shape == (2, 16, 24) and first.layer == STUDENT_LAYER  # a quarter of the image
    for p, (row, column) in enumerate([(0, 0), (10, 23)]):
        expected, theirs = cosines(a, row, column), cosines(b, row, column)
        np.testing.assert_allclose(first.spatial[p], expected, atol=1e-5)
        np.testing.assert_allclose(second.spatial[p], theirs, atol=1e-5)
        assert second.position_distances[p] == pytest.approx(((expected - theirs) ** 2).mean(), rel=1e-4)
    grams = [f.reshape(len(f), -1) / np.linalg.norm(f.reshape(len(f), -1), axis=0) for f in (a, b)]
    assert second.spatial_distance == pytest.approx(((grams[0].T @ grams[0] - grams[1].T @ grams[1]) ** 2).mean(), rel=1e-4)  # fmt: skip
    assert first.position_distances is None and first.spatial_distance is None and first.channel_distance is None


def test_a_model_is_at_no_distance_from_itself():
    entry = shown()
    _, again = compare_relations([entry, entry], IMAGE, [(5, 5)])
    assert again.position_distances == [0] and again.spatial_distance < 1e-12 and again.channel_distance < 1e-12


def test_a_teacher_of_another_grid_is_shown_on_its_own_and_compared_on_that_of_the_student():
    encoder, student = ShownModel("teacher", tiny_encoder("convnext"), PROCESSOR), shown()
    first, second = compare_relations([encoder, student], IMAGE, [(50, 30)])
    coarse = features_of(encoder, first.layer)
    assert first.spatial.shape == (1, 2, 3) and second.spatial.shape == (1, 16, 24)
    np.testing.assert_allclose(first.spatial[0], cosines(coarse, 0, 1), atol=1e-5)
    fine = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None], (16, 24), mode="bilinear")[0].numpy()
    expected = (cosines(fine, 7, 12) - cosines(features_of(student, STUDENT_LAYER), 7, 12)) ** 2
    assert second.position_distances[0] == pytest.approx(expected.mean(), rel=1e-4)
    assert first.classes is None and second.classes[0] in ("ground", "building", "tree")  # an encoder predicts nothing


def test_channels_keep_their_numbers_if_asked_to():
    entry = shown()
    flat = features_of(entry, STUDENT_LAYER)
    flat = flat.reshape(len(flat), -1)
    flat = flat / np.linalg.norm(flat, axis=1, keepdims=True)
    (plain,) = compare_relations([entry], IMAGE, [(5, 5)], order_channels=False)
    np.testing.assert_allclose(plain.channel, flat @ flat.T, atol=1e-5)
    (ordered,) = compare_relations([entry], IMAGE, [(5, 5)])
    assert not np.allclose(ordered.channel, plain.channel)
    np.testing.assert_allclose(np.sort(ordered.channel.ravel()), np.sort(plain.channel.ravel()), atol=1e-6)


def test_channels_of_one_kind_become_neighbours():
    generator = torch.Generator().manual_seed(0)
    kinds, noise = torch.randn(3, 20, 20, generator=generator), torch.randn(1, 24, 20, 20, generator=generator)
    kind = torch.arange(24) % 3
    order = channel_order(kinds[kind][None] + 0.1 * noise)
    assert sorted(order.tolist()) == list(range(24))
    changes = (kind[order].diff() != 0).sum()
    assert changes == 2  # three blocks


def test_a_linear_image_of_the_teachers_features_is_at_no_channel_distance():
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(1, 4, 20, 20, generator=generator)
    student = torch.einsum("sc,bchw->bshw", torch.randn(7, 4, generator=generator), teacher)  # of rank 4
    assert _channel_distance(student, teacher, "cosine", 1.0) < 1e-8
    unrelated = torch.randn(1, 7, 20, 20, generator=generator)
    assert _channel_distance(unrelated, teacher, "cosine", 1.0) > 0.01


def test_too_few_positions_fit_no_linear_map():
    assert _channel_distance(torch.randn(1, 7, 8, 8), torch.randn(1, 4, 8, 8), "cosine", 1.0) is None  # 64 < 70


class ColourModel(torch.nn.Module):
    """Class k where channel k is the brightest."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(
            num_labels=3, num_channels=3, model_type="colours", id2label=dict(enumerate("abc"))
        )
        self.layer = torch.nn.Identity()

    def forward(self, pixel_values):
        return SimpleNamespace(logits=2 * self.layer(pixel_values))


def test_positions_are_chosen_deep_inside_the_most_frequent_classes():
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :40, 1], image[:, 40:, 0] = 255, 255
    image[20:30, 50:60] = (0, 0, 255)
    (x1, y1), (x0, y0), (x2, y2) = choose_positions([ShownModel("m", ColourModel(), PROCESSOR)], image)
    assert 2 <= x1 < 38 and 2 <= y1 < 62  # class 1 is the most frequent
    assert 42 <= x0 < 62 and not (18 <= y0 < 32 and 48 <= x0 < 62)
    assert 52 <= x2 < 58 and 22 <= y2 < 28


def test_only_classes_that_are_predicted_get_a_position():
    image = np.zeros((32, 32, 3), np.uint8)
    image[..., 2] = 255
    assert len(choose_positions([ShownModel("m", ColourModel(), PROCESSOR)], image)) == 1


# Colours


def cielab(srgb):
    """CIE 1976 L*a*b* of 8-bit sRGB, white D65."""
    c = np.asarray(srgb) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    xyz = linear @ np.array([[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]])
    t = xyz / [0.9505, 1, 1.089]
    f = np.where(t > (6 / 29) ** 3, np.cbrt(t), t / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


def test_equal_steps_of_a_relation_are_equal_steps_for_the_eye():
    lab = cielab(heat_colors()[::8])  # in another model of colour vision than the one they are made in
    middle = len(lab) // 2
    steps = np.linalg.norm(np.diff(lab, axis=0), axis=1)
    assert steps.max() < 1.5 * steps.min()
    assert (np.diff(lab[: middle + 1, 0]) > 0).all() and (np.diff(lab[middle:, 0]) < 0).all()
    assert np.abs(lab[::-1, 0] - lab[:, 0]).max() < 4  # as strong, as dark: readable without seeing hues
    assert lab[middle, 0] > 95 and np.abs(lab[middle, 1:]).max() < 1
    assert lab[0, 2] < -30 and lab[-1, 1] > 30  # blue, red


def test_cosines_have_the_full_scale_and_zero_is_white():
    scale = _scale([np.zeros(1)], "cosine", "")
    drawn = np.asarray(_heat(np.array([[-1.0, 0.0], [1.0, 0.5]]), (4, 4), scale))
    colors = heat_colors()
    assert (drawn[:2, :2] == colors[0]).all() and (drawn[:2, 2:] == colors[64]).all()
    assert (drawn[2:, :2] == colors[128]).all() and (drawn[2:, 2:] == colors[96]).all()


def test_maps_of_attention_share_a_scale_from_nothing_to_nearly_the_highest():
    values = [np.linspace(0, 5, 1001), np.linspace(0, 10, 1001)]
    scale = _scale(values, "attention", "")
    assert scale.low == 0 and 9.5 < scale.high < 10
    colors = heat_colors()
    drawn = np.asarray(_heat(np.array([[0.0, scale.high, 99.0]]), (3, 1), scale))
    assert (drawn[0] == colors[[64, 128, 128]]).all()


# The figure


@pytest.mark.parametrize("relation", ["cosine", "attention"])
def test_the_figure_shows_every_map_in_its_colours(relation, tmp_path):
    path = tmp_path / "new" / "a.png"
    entries = [ShownModel(title, ColourModel(), PROCESSOR, "layer") for title in ("teacher", "student")]
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, :32, 1], image[:, 32:, 0] = 255, 255
    assert draw_relations(entries, image, [(10, 10), (50, 50)], path, relation, cell_size=128) == path
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width == 12 + 3 * (128 + 12)
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)

    def count(color):
        return int((np.abs(pixels - color).max(1) <= 1).sum())

    # Two positions and two models, each like half of the image, but for rings and text.
    assert count(heat_colors()[-1]) > 4 * 128 * 64 - 2000
    assert count((255, 255, 255)) > 3000  # paper
    assert count((0, 255, 0)) > 2 * 128 * 64 - 1000  # the image beside each row


def test_positions_are_chosen_where_none_are_given(tmp_path):
    entry = ShownModel("teacher", ColourModel(), PROCESSOR, "layer")
    given = choose_positions([entry], IMAGE)
    chosen = draw_relations([entry], IMAGE, None, tmp_path / "a.png", cell_size=64).read_bytes()
    assert chosen == draw_relations([entry], IMAGE, given, tmp_path / "b.png", cell_size=64).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"positions": [(96, 0)]}, r"position \(96, 0\) is outside the image of 96 x 64 pixels"),
        ({"positions": []}, "at least one model and one position"),
        ({"relation": "euclidean"}, "give one of cosine, attention"),
        ({"relation": "attention", "temperature": 0}, "temperature above 0"),
        ({"relation": "attention", "temperature": 1e-300}, "model: temperature 1e-300 is too small"),
        (
            {"models": [shown(layer="decode_head.batch")]},
            "has no layer 'decode_head.batch'; nearest names: decode_head.batch_norm",
        ),  # fmt: skip
        ({"models": [shown(bands=[0, 1])]}, "model: reads 3 bands, got 2 of an image with 3"),
        ({"models": [shown(bands=[0, 1, 3])]}, "model: reads 3 bands"),
        ({"image": IMAGE[..., 0]}, r"uint8 array \(H, W, bands\)"),
        ({"image": IMAGE[:4, :4], "positions": [(0, 0)]}, "model: .* does not run on an image of 4 x 4 pixels"),
        ({"models": [ShownModel("m", tiny_encoder("convnext"), PROCESSOR)], "positions": None}, "give positions"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(options, message, tmp_path):
    arguments = {"models": [shown()], "image": IMAGE, "positions": [(5, 5)]} | options
    with pytest.raises(UserError, match=message):
        draw_relations(path=tmp_path / "a.png", **arguments)
    assert not list(tmp_path.iterdir())


def test_features_that_are_no_numbers_are_named():
    entry = shown()
    torch.nn.init.constant_(entry.model.decode_head.batch_norm.weight, float("nan"))
    with pytest.raises(UserError, match="model: layer 'decode_head.batch_norm' gives features that are not finite"):
        compare_relations([entry], IMAGE, [(5, 5)])


# The script


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("relations")
    for name, family, seed in (("teacher", "upernet", 0), ("student", "segformer", 0), ("alone", "segformer", 1)):
        tiny_model(family, seed=seed).save_pretrained(folder / name)
        PROCESSOR.save_pretrained(folder / name)
    large = np.random.default_rng(1).integers(0, 256, (150, 200, 3), dtype=np.uint8)
    Image.fromarray(large).save(folder / "image.png")
    return folder


def run(folder, monkeypatch, *words):
    monkeypatch.chdir(folder)
    script = Path(__file__).resolve().parents[1] / "scripts" / "show_relations.py"
    models = ["--teacher", "teacher", "--student", "student", "--image", "image.png"]
    monkeypatch.setattr(sys, "argv", ["show_relations.py", *models, *map(str, words)])
    runpy.run_path(str(script), run_name="__main__")


def test_the_script_draws_teacher_and_both_students(project, monkeypatch, capsys, tmp_path):
    output = tmp_path / "relations.png"
    run(project, monkeypatch, "--student_alone", "alone", "--output", output)
    assert capsys.readouterr().out.strip() == str(output)
    with Image.open(output) as picture:
        assert picture.width == 1000


def test_a_part_of_the_image_is_drawn_as_if_it_were_the_image(project, monkeypatch, tmp_path):
    words = f"--point 5 60 --point 20 3 --relation attention --layers {STUDENT_LAYER}={TEACHER_LAYER}".split()
    run(project, monkeypatch, "--box", 10, 20, 138, 148, "--scale", 0.5, *words, "--output", tmp_path / "part.png")
    with Image.open(project / "image.png") as image:
        image.crop((10, 20, 138, 148)).resize((64, 64), Image.Resampling.BOX).save(tmp_path / "cut.png")
    run(project, monkeypatch, "--image", tmp_path / "cut.png", *words, "--output", tmp_path / "whole.png")
    assert (tmp_path / "part.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "a.jpg"], "--output a.jpg: give the name of a .png file"),
        (["--output", "a.png", "--box", 0, 0, 300, 100], "--box 0 0 300 100: image.png has 200 x 150 pixels"),
        (["--output", "a.png", "--scale", 8], "1600 x 1200 pixels are too many"),
        (["--output", "a.png", "--point", 500, 3], "position (500, 3) is outside the image"),
        (["--output", "a.png", "--bands", 1, 2], "teacher: reads 3 bands, got 2"),
        (["--output", "a.png", "--bands", 0, 1, 2], "teacher: reads 3 bands"),
        (["--output", "a.png", "--layers", "nothing"], "has no layer 'nothing'"),
        (["--output", "a.png", "--image", "none.png"], "none.png"),
        (["--output", "a.png", "--teacher", "none"], "none"),
        (["--output", "/proc/none/a.png"], "--output /proc/none/a.png: cannot be written"),
    ],
)
def test_the_script_refuses_in_one_line(project, monkeypatch, capsys, words, message):
    with pytest.raises(SystemExit) as end:
        run(project, monkeypatch, *words)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert end.value.code not in (0, None) and error.startswith("error: ") and message in error
    assert not (project / "a.png").exists()
