import re

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from drd_hf.data import load_splits, prepare_dataset
from drd_hf.data.preview import preview_tiles, spread_over_sources
from drd_hf.data.transforms import undecoded
from drd_hf.errors import UserError

from .test_multiband import FACTS, Blocks, BlocksReader, prepare_blocks, run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    output = tmp_path_factory.mktemp("preview") / "tiles"
    prepare_blocks(output)  # three scenes of 2 x 2 tiles in train
    return output


@pytest.mark.parametrize("seed", range(5))
def test_tiles_are_spread_over_the_images_of_a_split(seed):
    sources = ["a"] * 50 + ["b"] * 50 + ["c"] * 2
    chosen = [sources[i] for i in spread_over_sources(sources, 8, seed)]
    assert {name: chosen.count(name) for name in "abc"} == {"a": 3, "b": 3, "c": 2}
    assert len({sources[i] for i in spread_over_sources(sources, 3, seed)}) == 3


def test_another_seed_chooses_other_tiles_and_none_twice():
    sources = [f"image{i // 100}" for i in range(1000)]
    first, second, again = (spread_over_sources(sources, 24, seed) for seed in (0, 1, 0))
    assert first == again != second and len(set(first)) == 24 and first == sorted(first)
    assert spread_over_sources(sources[:5], 24, 0) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("bands", "order"),
    [(None, [0, 1, 2]), (["near_infrared", "red", "green"], [3, 0, 1]), (["height"], [4, 4, 4])],
)
def test_chosen_bands_are_shown_as_red_green_blue(folder, bands, order):
    tiles = preview_tiles(load_splits(folder), "train", 100, bands=bands)
    assert len(tiles) == 12
    scenes = {f"train{i}": BlocksReader().read(Blocks("", seed=i)) for i in range(3)}
    for tile in tiles:
        source, row, column = re.fullmatch(r"(\w+) \((\d+), (\d+)\)", tile.caption).groups()
        row, column = int(row), int(column)
        window = slice(row, row + 64), slice(column, column + 64)
        np.testing.assert_array_equal(tile.image, scenes[source].image[window][..., order])
        np.testing.assert_array_equal(tile.label, scenes[source].label[window])


def test_the_eroded_reference_is_shown_if_asked_for(folder):
    splits = load_splits(folder)
    full, eroded = (preview_tiles(splits, "test", 1, label=label)[0].label for label in ("label", "label_eroded"))
    assert (full == 255).sum() == 0 and (eroded == 255).sum() == 64 * 64 - 60 * 60
    assert np.array_equal(eroded[eroded != 255], full[eroded != 255])


def test_what_a_dataset_does_not_have_is_refused(folder, tmp_path):
    splits = load_splits(folder)
    for options, message in (
        ({"split": "val"}, "has no split 'val', only train, validation, test"),
        ({"bands": ["red", "thermal", "blue"]}, "name one or three of red, green, blue, near_infrared, height"),
        ({"bands": ["red", "green"]}, "name one or three"),
        ({"count": 0}, "0 tiles: give at least 1"),
    ):
        with pytest.raises(UserError, match=message):
            preview_tiles(splits, **({"split": "train"} | options))
    sources = {"train": [Blocks("unlabelled", 0, labelled=False)]}
    prepare_dataset(sources, BlocksReader(), FACTS, tmp_path / "tiles", tile_size=64)
    with pytest.raises(UserError, match="has no eroded reference"):
        preview_tiles(load_splits(tmp_path / "tiles"), "train", label="label_eroded")


def test_the_script_draws_labelled_and_unlabelled_tiles(tmp_path, capsys):
    sources = {"train": [Blocks("a", 0), Blocks("b", 1)], "test": [Blocks("c", 2, labelled=False)]}
    prepare_dataset(sources, BlocksReader(), FACTS, tmp_path / "tiles", tile_size=64)
    for split, words in (
        ("train", ["--bands", "near_infrared", "red", "green", "--reference", "eroded"]),
        ("test", []),
    ):
        output = tmp_path / f"{split}.png"
        run("preview_dataset.py", "--dataset", tmp_path / "tiles", "--output", output, "--split", split, *words)
        with Image.open(output) as picture:
            assert picture.size[0] > 2 * 224
    assert "4 tiles of test" in capsys.readouterr().out


def test_a_dataset_of_the_eroded_reference_alone_is_shown_as_such(tmp_path, capsys):
    # It was called full, and could not be shown as eroded.
    note = "Labels are the reference with eroded boundaries: pixels near object borders are 255."
    prepare_dataset({"train": [Blocks("a", 0)]}, BlocksReader(), FACTS, tmp_path / "tiles", tile_size=64, notes=[note])
    for words in ([], ["--reference", "eroded"]):
        run("preview_dataset.py", "--dataset", tmp_path / "tiles", "--output", tmp_path / "sheet.png", *words)
    with pytest.raises(SystemExit):
        run(
            "preview_dataset.py",
            "--dataset",
            tmp_path / "tiles",
            "--output",
            tmp_path / "a.png",
            "--reference",
            "full",
        )
    assert "has no full reference, only the eroded one" in capsys.readouterr().err


def test_a_damaged_tile_is_named(folder):
    # Pillow's error was a traceback that named no tile.
    splits = load_splits(folder)
    rows = [row | {"image": {"bytes": b"cut", "path": None}} for row in undecoded(splits["train"])]
    splits["train"] = Dataset.from_list(rows, features=splits["train"].features)
    with pytest.raises(UserError, match=r"^train0 \(0, 0\): the image of a tile is damaged"):
        preview_tiles(splits, "train")


@pytest.mark.parametrize(
    "words",
    [
        ["--output", "sheet.jpg"],
        ["--output", "a.png", "--cell_size", "3"],
        ["--output", "a.png", "--seed", "-1"],
        ["--output", "a.png", "--reference", "both"],
        ["--output", "/proc/none/a.png"],
    ],
)
def test_the_script_refuses_what_it_cannot_write(folder, words, capsys):
    with pytest.raises(SystemExit) as end:
        run("preview_dataset.py", "--dataset", folder, *words)
    assert end.value.code not in (0, None) and capsys.readouterr().err.startswith("error: --")
