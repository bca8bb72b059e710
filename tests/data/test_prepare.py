import io
import os
import re
import stat
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from drd_hf.data import prepare
from drd_hf.data.facts import DatasetFacts, SegmentationClass
from drd_hf.data.prepare import prepare_dataset
from drd_hf.errors import UserError

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_dataset.py"
FACTS = DatasetFacts("town", (SegmentationClass("land", (1, 2, 3)), SegmentationClass("roof|top", (4, 5, 6))))
SOURCES = {"train": [0, 1, 2, 3, 4], "test": [5, 6]}


def draw(record):
    """Image and label of a record: sizes differ, about a tenth of the pixels is ignored."""
    rng = np.random.default_rng(record)
    height, width = 20 + record, 30 - record
    return (
        rng.integers(0, 256, (height, width, 3), np.uint8),
        rng.choice(np.array([0, 1, 255], np.uint8), (height, width), p=[0.6, 0.3, 0.1]),
    )


def reader(record):
    return *draw(record), f"image {record}", {"9,9,9": 2} if record == 3 else {}


def failing_reader(record, error):
    if record == 3:
        raise error
    return reader(record)


def dying_reader(record):
    os._exit(1)


def labelling_reader(record, value):
    image, label, name, report = reader(record)
    return image, np.full_like(label, value), name, report


def make(output, sources=SOURCES, reader=reader, tile_size=16, **kwargs):
    return prepare_dataset(sources, reader, FACTS, output, tile_size=tile_size, **kwargs)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(folder, split):
    return [row for path in sorted((folder / "data").glob(f"{split}-*")) for row in pq.read_table(path).to_pylist()]


def card(folder):
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def decode(cell):
    return np.asarray(Image.open(io.BytesIO(cell["bytes"])))


@pytest.mark.parametrize("stride", [16, 7])
def test_tiles_put_together_give_back_every_source_without_loss(tmp_path, stride):
    make(tmp_path / "out", stride=stride)
    for split, records in SOURCES.items():
        found = rows(tmp_path / "out", split)
        assert list(dict.fromkeys(row["source"] for row in found)) == [f"image {record}" for record in records]
        for record in records:
            image, label = draw(record)
            new_image, new_label = np.zeros((40, 40, 3), np.uint8), np.full((40, 40), 77, np.uint8)
            for row in found:
                if row["source"] == f"image {record}":
                    place = np.s_[row["row"] : row["row"] + 16, row["column"] : row["column"] + 16]
                    new_image[place], new_label[place] = decode(row["image"]), decode(row["label"])
            height, width = label.shape
            assert (new_image[:height, :width] == image).all()
            assert (new_label[:height, :width] == label).all()
            assert (new_label[height:] == 77).all()
            assert (new_label[:, width:] == 77).all()


def test_files_do_not_depend_on_the_number_of_processes_or_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "TILES_PER_ROW_GROUP", 3)
    for name, num_proc in (("one", 1), ("four", 4), ("again", 1)):
        make(tmp_path / name, num_proc=num_proc)
    assert contents(tmp_path / "one") == contents(tmp_path / "four") == contents(tmp_path / "again")


def test_shares_count_every_source_pixel_once_even_where_tiles_overlap(tmp_path):
    info = make(tmp_path / "out", stride=5)
    labels = np.concatenate([draw(record)[1].ravel() for record in SOURCES["train"]])
    assert info.pixel_shares["train"]["land"] == pytest.approx((labels == 0).mean(), abs=1e-6)
    assert info.pixel_shares["train"]["roof|top"] == pytest.approx((labels == 1).mean(), abs=1e-6)
    assert info.ignored_shares["train"] == pytest.approx((labels == 255).mean(), abs=1e-6)
    assert info.num_sources == {"train": 5, "test": 2}
    assert info.num_tiles == {split: len(rows(tmp_path / "out", split)) for split in SOURCES}


def test_unknown_pixels_of_all_readers_add_up(tmp_path):
    assert make(tmp_path / "out", sources={"train": [3], "test": [1]}).unknown_pixels == {"9,9,9": 2}
    assert "(value: pixels): 9,9,9: 2." in (tmp_path / "out" / "README.md").read_text()


def test_shards_are_numbered_out_of_their_number(tmp_path, monkeypatch):
    make(tmp_path / "whole")
    monkeypatch.setattr(prepare, "TILES_PER_ROW_GROUP", 8)
    monkeypatch.setattr(prepare, "BYTES_PER_SHARD", 1)
    make(tmp_path / "cut")
    expected = -(-len(rows(tmp_path / "whole", "train")) // 8)
    names = sorted(path.name for path in (tmp_path / "cut" / "data").glob("train-*"))
    assert names == [f"train-{i:05d}-of-{expected:05d}.parquet" for i in range(expected)]
    assert expected > 1
    assert rows(tmp_path / "cut", "train") == rows(tmp_path / "whole", "train")


def test_scale_resamples_before_tiles_are_cut(tmp_path):
    info = make(tmp_path / "out", sources={"train": [0]}, scale=0.5)  # 20x30 -> 10x15, smaller than one tile
    (row,) = rows(tmp_path / "out", "train")
    assert (decode(row["label"]) != 255)[10:].sum() == (decode(row["label"]) != 255)[:, 15:].sum() == 0
    assert (decode(row["label"])[:10, :15] != 255).mean() > 0.8
    assert info.scale == card(tmp_path / "out")["segmentation"]["scale"] == 0.5


def test_card_head_describes_the_files_to_the_hub(tmp_path):
    make(tmp_path / "out")
    head = card(tmp_path / "out")
    assert head["task_categories"] == ["image-segmentation"]
    assert head["configs"] == [
        {
            "config_name": "default",
            "data_files": [
                {"split": "train", "path": "data/train-*.parquet"},
                {"split": "test", "path": "data/test-*.parquet"},
            ],
        }
    ]
    assert {f["name"]: f["dtype"] for f in head["dataset_info"]["features"]} == {
        "image": "image",
        "label": "image",
        "source": "string",
        "row": "int32",
        "column": "int32",
    }
    assert head["segmentation"]["classes"] == [
        {"name": "land", "color": [1, 2, 3]},
        {"name": "roof|top", "color": [4, 5, 6]},
    ]
    assert "license" not in head
    assert "license" not in head["segmentation"]


def test_card_text_is_as_expected(tmp_path):
    facts = DatasetFacts("town", FACTS.classes, "A small town.", "For research only; ask first.", "Someone, 2020.")
    prepare_dataset({"train": [0]}, partial(labelling_reader, value=1), facts, tmp_path / "out", 16, stride=8)
    assert card(tmp_path / "out")["license"] == "other"
    assert (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[2] == (
        """
# town

A small town.

Tiles of 16 x 16 pixels with a class for every pixel, prepared with `drd_hf`.

```python
from drd_hf import load_splits

splits = load_splits("path/or/hub-id")  # columns image, label, source, row, column
```

## Classes

Shares are of all pixels of the source images, each counted once. Label 255 is ignored.

| label | class | colour (RGB) | train % |
|---:|---|---|---:|
| 0 | land | 1, 2, 3 | 0.00 |
| 1 | roof\\|top | 4, 5, 6 | 100.00 |
| 255 | ignored | | 0.00 |

## Splits

| split | source images | tiles |
|---|---:|---:|
| train | 1 | 6 |

## How the tiles were made

A tile starts every 8 pixels; the last one of a row or column is shifted inward to end at the border, so tiles overlap.
Images smaller than a tile are continued by reflection with the label 255. Tiles without a labelled pixel were left out.
`row` and `column` are the place of a tile's first pixel in `source`.

## Licence

For research only; ask first.

## Citation

Someone, 2020.
"""
    )


def test_licence_that_is_an_identifier_stands_in_the_card_head(tmp_path):
    facts = DatasetFacts("town", FACTS.classes, license="cc0-1.0")
    prepare_dataset({"train": [0]}, reader, facts, tmp_path / "out", 16)
    assert card(tmp_path / "out")["license"] == "cc0-1.0"


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("error", [UserError("image 3: broken"), RuntimeError("disk"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(tmp_path, error, num_proc):
    with pytest.raises(type(error)):
        make(tmp_path / "out", reader=partial(failing_reader, error=error), num_proc=num_proc)
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_dataset_that_was_to_be_replaced(tmp_path):
    make(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="image 3: broken"):
        make(tmp_path / "out", reader=partial(failing_reader, error=UserError("image 3: broken")), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == before


def test_process_that_dies_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="a process died"):
        make(tmp_path / "out", reader=dying_reader, num_proc=2)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_replaced_only_on_request(tmp_path):
    make(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="out: exists already; .*--overwrite"):
        make(tmp_path / "out", tile_size=8)
    assert contents(tmp_path / "out") == before
    make(tmp_path / "out", sources={"train": [0]}, tile_size=8, overwrite=True)
    assert card(tmp_path / "out")["segmentation"]["tile_size"] == 8
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out" / "data").glob("test-*"))


def test_overwrite_deletes_no_folder_that_is_not_such_a_dataset(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name in ("home", "home/letter.txt", "link"):
        with pytest.raises(UserError, match="is not a dataset that this tool wrote"):
            make(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


def test_empty_folder_is_filled_and_parents_are_made(tmp_path):
    (tmp_path / "empty").mkdir()
    make(tmp_path / "empty")
    make(tmp_path / "a" / "b")
    assert contents(tmp_path / "empty") == contents(tmp_path / "a" / "b")


def test_output_is_as_readable_as_any_new_folder(tmp_path):
    # Folders from tempfile are private to their owner, and moving one into place makes the output private too.
    make(tmp_path / "out")
    (tmp_path / "plain").mkdir()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("out", "plain")]
    assert modes[0] == modes[1]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"sources": {}}, "no split was given"),
        ({"sources": {"train": [0], "test": []}}, "split test has no images"),
        ({"sources": {"val": [0]}}, "unknown split 'val'; nearest: validation"),
        ({"sources": {"train": [0, 1, 0]}}, "split train has two images named image 0"),
        ({"reader": partial(labelling_reader, value=255)}, "split train has no tile with a labelled pixel"),
        ({"reader": partial(labelling_reader, value=2)}, "image 0: label 2 is none of the 2 classes"),
        ({"tile_size": 0}, "tile_size is 0"),
        ({"stride": 17}, "stride is 17"),
        ({"scale": 0}, "scale is 0"),
        ({"num_proc": 0}, "num_proc is 0"),
    ],
)
def test_wrong_input_is_refused_and_leaves_nothing(tmp_path, kwargs, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "out", **kwargs)
    assert list(tmp_path.iterdir()) == []


def run_script(*args):
    # Absolute paths only: the script must not depend on the folder it is called from.
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1])}
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_script_prepares_a_folder_and_reports_bad_input_in_one_line(tmp_path):
    for part, split in enumerate(("train", "test")):
        for kind in ("images", "masks"):
            (tmp_path / "source" / split / kind).mkdir(parents=True)
        image, label = draw(part)
        Image.fromarray(image).save(tmp_path / "source" / split / "images" / "a.jpg")
        Image.fromarray(label).save(tmp_path / "source" / split / "masks" / "a.png")
    layout = {
        "images": "*/images/*.jpg",
        "masks": "*/masks/*.png",
        "classes": [{"name": "land", "value": 0}, {"name": "roof", "value": 1}],
        "splits": {"train": ["train/*"], "test": ["test/*"]},
    }
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(layout))
    args = ["--dataset", "folder", "--source", tmp_path / "source", "--layout", tmp_path / "layout.yaml"]
    args += ["--output", tmp_path / "out", "--tile_size", 16]

    refused = run_script(*args)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: .*a\.png: 1 values .* --unknown ignore", refused.stderr.strip().splitlines()[-1])
    assert not (tmp_path / "out").exists()

    done = run_script(*args, "--unknown", "ignore")
    assert done.returncode == 0, done.stderr
    assert "train: 4 tiles of 1 images; land" in done.stdout
    ignored = sum(int((draw(part)[1] == 255).sum()) for part in (0, 1))
    assert f"ignored pixels of unknown value: 255: {ignored}" in done.stdout
    assert card(tmp_path / "out")["segmentation"]["name"] == "source"


def test_script_prepares_generated_scenes_that_differ_between_splits(tmp_path):
    args = ["--dataset", "scenes", "--output", tmp_path / "out", "--tile_size", 64, "--scene_size", 64]
    done = run_script(*args, "--scenes_train", 2, "--scenes_validation", 1, "--scenes_test", 0)
    assert done.returncode == 0, done.stderr
    found = [row for split in ("train", "validation") for row in rows(tmp_path / "out", split)]
    assert len({row["image"]["bytes"] for row in found}) == len({row["source"] for row in found}) == 3
    assert not list((tmp_path / "out" / "data").glob("test-*"))
