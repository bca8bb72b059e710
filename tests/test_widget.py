"""What `check_widget_ready` finds in a model folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor

from drd_hf import check_widget_ready, predict_raster
from drd_hf.errors import UserError
from drd_hf.export import load_segmenter
from drd_hf.hub import widget
from drd_hf.models import colors_of

from .conftest import tiny_config
from .test_push_model import COLORS, damage_card, damage_config, finished_run


@pytest.fixture
def run(tmp_path) -> Path:
    return finished_run(tmp_path / "student")


def test_a_finished_run_is_ready(run):
    assert check_widget_ready(run) == []


def rename(run: Path, names: list[str]) -> None:
    damage_config(run, id2label={str(i): name for i, name in enumerate(names)}, label2id={})


@pytest.mark.parametrize("damage, expected", [
    (lambda run: (run / "README.md").unlink(), "README.md is missing"),
    (lambda run: (run / "config.json").unlink(), "config.json is missing"),
    (lambda run: (run / "model.safetensors").rename(run / "pytorch_model.bin"), "model.safetensors is missing"),
    (lambda run: (run / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
    (lambda run: damage_card(run, "---\n", "---\n["), "README.md cannot be read"),
    (lambda run: damage_card(run, "pipeline_tag: image-segmentation\n", ""), "README.md: pipeline_tag is None, not 'image-segmentation'"),
    (lambda run: damage_card(run, "library_name: transformers", "library_name: timm"), "README.md: library_name is 'timm'"),
    (lambda run: damage_card(run, "- src: examples/first.png", "- src: examples/lost.png"), "README.md: the widget example examples/lost.png is not there"),
    (lambda run: damage_card(run, "- src: examples/first.png", "- text: examples/first.png"), "README.md: a widget example has no src"),
    (lambda run: damage_config(run, architectures=["SegformerModel"]), "config.json: architectures ['SegformerModel'] name no"),
    (lambda run: damage_config(run, architectures=None), "config.json: architectures None name no"),
    (lambda run: rename(run, ["LABEL_0", "LABEL_1", "LABEL_2"]), "config.json: id2label does not name the classes"),
    (lambda run: rename(run, ["road", "road", "tree"]), "config.json: two classes have the same name"),
    (lambda run: damage_config(run, class_colors=COLORS[:2]), "config.json: class_colors does not give every class"),
    (lambda run: damage_config(run, model_type="unheard_of"), "config.json cannot be loaded"),
    (lambda run: (run / "preprocessor_config.json").write_text('{"image_processor_type": "NoSuch"}'), 'pipeline("image-segmentation") fails'),
    (lambda run: (run / "model.safetensors").write_bytes(b"cut"), 'pipeline("image-segmentation") fails'),
])  # fmt: skip
def test_each_problem_is_one_line(run, damage, expected):
    damage(run)
    problems = check_widget_ready(run)
    assert problems and problems[0].startswith(expected)
    assert all(len(problem.splitlines()) == 1 for problem in problems)


def test_links_to_examples_elsewhere_are_not_looked_for(run):
    damage_card(run, "- src: examples/first.png", "- src: https://example.org/first.png")
    assert check_widget_ready(run) == []


def test_a_model_of_four_bands_has_no_widget(run):
    config = tiny_config("segformer")
    config.num_channels, config.class_colors = 4, COLORS
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(run)
    SegformerImageProcessor(do_resize=False).save_pretrained(run)
    assert check_widget_ready(run) == ["the model reads 4 bands, and images of the widget have three"]


def test_weights_larger_than_the_hub_loads_are_told(run, monkeypatch):
    monkeypatch.setattr(widget, "LARGEST", 1e5)
    assert check_widget_ready(run) == ["model.safetensors: 0.0 GB, the Hub loads at most 0 GB"]


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(UserError, match="there is no such folder"):
        check_widget_ready(tmp_path / "none")


def test_maps_are_drawn_in_the_colors_that_came_with_the_model(run, tmp_path):
    Image.fromarray(np.full((70, 90, 3), 99, np.uint8)).save(tmp_path / "photo.png")
    model, processor = load_segmenter(str(run))
    predict_raster(model, processor, tmp_path / "photo.png", tmp_path / "map.png", tile=64, progress=False)
    drawn = Image.open(tmp_path / "map.png").getpalette()
    assert [drawn[3 * i : 3 * i + 3] for i in range(len(COLORS))] == COLORS


@pytest.mark.parametrize("colors, expected", [
    ([[1, 2, 3]] * 3, [(1, 2, 3)] * 3),
    (((0, 0, 0), (255, 255, 255), (9, 9, 9)), [(0, 0, 0), (255, 255, 255), (9, 9, 9)]),
    ([[1, 2, 3]] * 2, None),
    ([[1, 2, 256]] * 3, None),
    ([[1, 2]] * 3, None),
    ([[1, 2, 0.5]] * 3, None),
    (["#000000"] * 3, None),
    ("red", None),
    (None, None),
])  # fmt: skip
def test_colors_are_one_for_each_class_or_none(tmp_path, colors, expected):
    config = tiny_config("segformer")
    if colors is not None:
        config.class_colors = colors
    config.save_pretrained(tmp_path)
    assert colors_of(config) == expected
    assert colors_of(type(config).from_pretrained(tmp_path)) == expected  # JSON makes lists of tuples
    assert ("class_colors" in json.loads((tmp_path / "config.json").read_text())) == (colors is not None)
