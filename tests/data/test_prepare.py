import errno
import importlib.util
import io
import os
import random
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from filelock import FileLock
from PIL import Image

import drd_hf
from drd_hf.data.facts import DatasetFacts, SegmentationClass
from drd_hf.data.prepare import output as output_module
from drd_hf.data.prepare import prepare_dataset, shards
from drd_hf.data.scenes import scene_records
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.errors import UserError

from .official import write_cityscapes, write_potsdam

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_dataset.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"}
FACTS = DatasetFacts("town", (SegmentationClass("land", (1, 2, 3)), SegmentationClass("roof|top", (4, 5, 6))))


@dataclass(frozen=True)
class Record:
    number: int

    @property
    def name(self):
        return f"image {self.number}"


def town(*numbers):
    return [Record(number) for number in numbers]


SOURCES = {"train": town(0, 1, 2, 3, 4), "test": town(5, 6)}


def draw(number, bands=3):
    """Image and label of a record: sizes differ, about a tenth of the pixels is ignored."""
    rng = np.random.default_rng(number)
    height, width = 20 + number, 30 - number
    return (
        rng.integers(1, 256, (height, width, bands), np.uint8),
        rng.choice(np.array([0, 1, 255], np.uint8), (height, width), p=[0.6, 0.3, 0.1]),
    )


@dataclass(frozen=True)
class Reader:
    """Draws what others read. `version` stands for the times of files, `log` gets the name of each image read."""

    version: str = "1"
    log: Path | None = None
    bands = ("red", "green", "blue")

    def header(self, record):
        return SourceHeader(record.name, 20 + record.number, 30 - record.number, self.version)

    def read(self, record):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{record.name}\n")
        report = {"9,9,9": 2} if record.number == 3 else {}
        return SourceImage(record.name, *draw(record.number), report=report)


@dataclass(frozen=True)
class FailingReader(Reader):
    """Fails at image 3, as long as the file `trouble` is there if it is given."""

    error: BaseException | None = None
    trouble: Path | None = None

    def read(self, record):
        if record.number == 3 and (self.trouble is None or self.trouble.exists()):
            raise self.error
        return super().read(record)


@dataclass(frozen=True)
class DyingReader(Reader):
    def read(self, record):
        os._exit(1)


@dataclass(frozen=True)
class LabellingReader(Reader):
    value: int = 0

    def read(self, record):
        source = super().read(record)
        return replace(source, label=np.full_like(source.label, self.value))


@dataclass(frozen=True)
class BrokenReader(Reader):
    """The header of image 1 and the pixels of image 3 cannot be read, nor anything of the numbers in `more`."""

    more: tuple = ()

    def header(self, record):
        if record.number in (1, *self.more):
            raise UserError(f"/home/me/photos/{record.number}.tif: is no image")
        return super().header(record)

    def read(self, record):
        if record.number == 3:
            raise UserError("/home/me/photos/3.tif: is cut short")
        return super().read(record)


@dataclass(frozen=True)
class RichReader(Reader):
    """Five bands. Image 0 has all there can be, image 1 only its pixels."""

    bands = ("red", "green", "blue", "near_infrared", "height")

    def header(self, record):
        rich = record.number == 0
        return replace(super().header(record), labelled=rich, eroded=rich, georeferenced=rich)

    def read(self, record):
        image, label = draw(record.number, 5)
        if record.number == 1:
            return SourceImage(record.name, image, None)
        return SourceImage(record.name, image, label, eroded(label), "EPSG:25832", TRANSFORM, off_palette=7)


TRANSFORM = (0.5, 0.1, 300000.0, 0.2, -0.5, 5800000.0)


def eroded(label):
    return np.where(np.arange(label.shape[1]) % 5 == 0, np.uint8(255), label)


def make(output, sources=SOURCES, reader=None, tile_size=16, **kwargs):
    return prepare_dataset(sources, reader or Reader(), FACTS, output, tile_size=tile_size, **kwargs)


@pytest.fixture
def small_shards(monkeypatch):
    """Every source is a shard, every three tiles a row group."""
    monkeypatch.setattr(shards, "PIXELS_PER_SHARD", 1)
    monkeypatch.setattr(shards, "TILES_PER_ROW_GROUP", 3)


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
        assert list(dict.fromkeys(row["source"] for row in found)) == [record.name for record in records]
        for record in records:
            image, label = draw(record.number)
            new_image, new_label = np.zeros((40, 40, 3), np.uint8), np.full((40, 40), 77, np.uint8)
            for row in found:
                if row["source"] == record.name:
                    place = np.s_[row["row"] : row["row"] + 16, row["column"] : row["column"] + 16]
                    new_image[place], new_label[place] = decode(row["image"]), decode(row["label"])
            height, width = label.shape
            assert (new_image[:height, :width] == image).all()
            assert (new_label[:height, :width] == label).all()
            assert (new_label[height:] == 77).all()
            assert (new_label[:, width:] == 77).all()


@pytest.mark.parametrize("stride", [16, 7])
def test_further_bands_eroded_labels_and_georeference_are_kept(tmp_path, stride):
    info = make(tmp_path / "out", {"train": town(0, 1)}, RichReader(), stride=stride)
    found = rows(tmp_path / "out", "train")
    assert list(found[0]) == "image extra_bands label label_eroded source row column crs transform".split()
    (image, label), (other, _) = draw(0, 5), draw(1, 5)
    a, b, c, d, e, f = TRANSFORM
    for row in found:
        rich = row["source"] == "image 0"
        inside = np.s_[row["row"] : row["row"] + 16, row["column"] : row["column"] + 16]
        pixels = np.dstack([decode(row["image"]), *map(decode, row["extra_bands"])])
        assert (pixels == (image if rich else other)[inside]).all()
        if rich:
            assert (decode(row["label"]) == label[inside]).all()
            assert (decode(row["label_eroded"]) == eroded(label)[inside]).all()
            x, y = a * row["column"] + b * row["row"] + c, d * row["column"] + e * row["row"] + f
            assert (row["crs"], row["transform"]) == ("EPSG:25832", pytest.approx([a, b, x, d, e, y], abs=1e-6))
        else:
            assert row["label"] is row["label_eroded"] is row["crs"] is row["transform"] is None
    assert info.bands == RichReader.bands
    assert (info.has_eroded, info.georeferenced, info.off_palette_pixels) == (True, True, {"image 0": 7})
    assert info.pixel_shares["train"]["land"] == pytest.approx((label == 0).mean(), abs=1e-6)  # of the labelled image
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| height | `extra_bands`, entry 1 |" in text and "(source: pixels): image 0: 7." in text


def test_unlabelled_sources_keep_all_their_tiles_and_say_so(tmp_path):
    make(tmp_path / "out", {"train": town(0), "test": town(1)}, RichReader())
    assert len(rows(tmp_path / "out", "test")) == 4  # 21 x 29 pixels
    share = 100 * (draw(0, bands=5)[1] == 0).mean()
    assert f"| 0 | land | 1, 2, 3 | {share:.2f} | no labels |" in (tmp_path / "out" / "README.md").read_text()


def test_scaled_georeference_meets_the_corners_of_the_source(tmp_path):
    make(tmp_path / "out", {"train": town(0)}, RichReader(), scale=0.5)  # 20x30 -> 10x15
    (row,) = rows(tmp_path / "out", "train")
    place = lambda t, x, y: (t[0] * x + t[1] * y + t[2], t[3] * x + t[4] * y + t[5])  # noqa: E731
    assert place(row["transform"], 15, 10) == pytest.approx(place(TRANSFORM, 30, 20), abs=1e-6)
    assert place(row["transform"], 0, 0) == pytest.approx(place(TRANSFORM, 0, 0), abs=1e-6)


@dataclass(frozen=True)
class PartlyEmptyReader(Reader):
    """The first rows hold no data; a black pixel with a label is data, and so is an ignored one that is not black."""

    def read(self, record):
        image, label = draw(record.number)
        image[:4], label[:4] = 0, 255
        image[4, :2], label[4, :2] = 0, 1
        return SourceImage(record.name, image, label)


def test_mean_and_std_are_of_each_pixel_of_train_once_where_there_is_data(tmp_path):
    info = make(tmp_path / "out", {"test": town(5), "train": town(0, 1)}, PartlyEmptyReader(), stride=5)
    images = [PartlyEmptyReader().read(record).image for record in town(0, 1)]
    pixels = np.concatenate([image[4:].reshape(-1, 3) for image in images]) / 255
    np.testing.assert_allclose(info.band_mean, pixels.mean(0), atol=1e-6)
    np.testing.assert_allclose(info.band_std, pixels.std(0), atol=1e-6)
    assert card(tmp_path / "out")["segmentation"]["band_mean"] == list(info.band_mean)


def test_files_do_not_depend_on_the_number_of_processes_or_the_run(tmp_path, small_shards):
    for name, num_proc in (("one", 1), ("four", 4), ("again", 1)):
        make(tmp_path / name, num_proc=num_proc)
    assert contents(tmp_path / "one") == contents(tmp_path / "four") == contents(tmp_path / "again")


def test_shares_count_every_source_pixel_once_even_where_tiles_overlap(tmp_path):
    info = make(tmp_path / "out", stride=5)
    labels = np.concatenate([draw(record.number)[1].ravel() for record in SOURCES["train"]])
    assert info.pixel_shares["train"]["land"] == pytest.approx((labels == 0).mean(), abs=1e-6)
    assert info.pixel_shares["train"]["roof|top"] == pytest.approx((labels == 1).mean(), abs=1e-6)
    assert info.ignored_shares["train"] == pytest.approx((labels == 255).mean(), abs=1e-6)
    assert info.num_sources == {"train": 5, "test": 2}
    assert info.num_tiles == {split: len(rows(tmp_path / "out", split)) for split in SOURCES}


def test_unknown_pixels_of_all_readers_add_up(tmp_path):
    assert make(tmp_path / "out", sources={"train": town(3), "test": town(1)}).unknown_pixels == {"9,9,9": 2}
    assert "(value: pixels): 9,9,9: 2." in (tmp_path / "out" / "README.md").read_text()


def test_shards_hold_whole_sources_and_are_numbered_out_of_their_number(tmp_path, monkeypatch):
    make(tmp_path / "whole")
    monkeypatch.setattr(shards, "PIXELS_PER_SHARD", 5 * 16 * 16)  # images of 4 tiles each: two in a shard
    make(tmp_path / "cut")
    names = sorted(path.name for path in (tmp_path / "cut" / "data").glob("train-*"))
    assert names == [f"train-{i:05d}-of-00003.parquet" for i in range(3)]
    found = [
        set(pq.read_table(path)["source"].to_pylist()) for path in sorted((tmp_path / "cut" / "data").glob("tr*"))
    ]
    assert found == [{"image 0", "image 1"}, {"image 2", "image 3"}, {"image 4"}]
    assert rows(tmp_path / "cut", "train") == rows(tmp_path / "whole", "train")


def test_scale_resamples_before_tiles_are_cut(tmp_path):
    info = make(tmp_path / "out", sources={"train": town(0)}, scale=0.5)  # 20x30 -> 10x15, smaller than one tile
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
    facts = replace(
        FACTS, description="A small town.", license="For research only; ask first.", citation="Someone, 2020."
    )
    facts = replace(facts, terms="Name the town.", may_be_shared=False)
    reader = LabellingReader(value=1)
    info = prepare_dataset(
        {"train": town(0)}, reader, facts, tmp_path / "out", 16, stride=8, notes=["image 9 is lost"]
    )
    assert card(tmp_path / "out")["license"] == "other"
    mean, std = ([f"{value:.4f}" for value in values] for values in (info.band_mean, info.band_std))
    assert (tmp_path / "out" / "README.md").read_text().split("---\n", 2)[2] == (
        f"""
# town

A small town.

> **These pixels may not be handed on.** The terms of the source do not allow it; read them below before you copy this dataset.

Tiles of 16 x 16 pixels with a class for every pixel, prepared with `drd_hf {drd_hf.__version__}`.

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

- train: image 0

## Notes

- image 9 is lost

## Bands

Mean and standard deviation are of values in 0..1 over the pixels of train that hold data.

| band | column | mean | standard deviation |
|---|---|---:|---:|
| red | `image`, channel 0 | {mean[0]} | {std[0]} |
| green | `image`, channel 1 | {mean[1]} | {std[1]} |
| blue | `image`, channel 2 | {mean[2]} | {std[2]} |

## How the tiles were made

A tile starts every 8 pixels; the last one of a row or column is shifted inward to end at the border, so tiles overlap.
Images smaller than a tile are continued by reflection with the label 255. Tiles of labelled images without a labelled pixel were left out.
`row` and `column` are the place of a tile's first pixel in `source`. Pixels without data have the label 255.

## Licence

For research only; ask first.

Name the town.

## Citation

Someone, 2020.
"""
    )


def test_licence_that_is_an_identifier_stands_in_the_card_head(tmp_path):
    facts = DatasetFacts("town", FACTS.classes, license="cc0-1.0")
    prepare_dataset({"train": town(0)}, Reader(), facts, tmp_path / "out", 16)
    assert card(tmp_path / "out")["license"] == "cc0-1.0"


@pytest.mark.parametrize("num_proc", [1, 2])
@pytest.mark.parametrize("error", [UserError("image 3: broken"), RuntimeError("disk"), KeyboardInterrupt()])
def test_failure_leaves_nothing_behind(tmp_path, error, num_proc):
    with pytest.raises(type(error)):
        make(tmp_path / "out", {"train": town(0, 1, 2, 3)}, FailingReader(error=error), num_proc=num_proc)
    assert list(tmp_path.iterdir()) == []


def test_failure_keeps_the_dataset_that_was_to_be_replaced(tmp_path):
    make(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="image 3: broken"):
        make(tmp_path / "out", reader=FailingReader(error=UserError("image 3: broken")), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == before


def test_process_that_dies_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match="a process died"):
        make(tmp_path / "out", reader=DyingReader(), num_proc=2)
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_replaced_only_on_request(tmp_path):
    make(tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="out: exists already; .*--overwrite"):
        make(tmp_path / "out", tile_size=8)
    assert contents(tmp_path / "out") == before
    make(tmp_path / "out", sources={"train": town(0)}, tile_size=8, overwrite=True)
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
        ({"sources": {"train": town(0), "test": []}}, "split test has no images"),
        ({"sources": {"val": town(0)}}, "unknown split 'val'; nearest: validation"),
        ({"sources": {"train": town(0, 1, 0)}}, "split train has two images named image 0"),
        ({"reader": LabellingReader(value=2)}, "image 0: label 2 is none of the 2 classes"),
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


def converted(log):
    """Names of the images that were read, and an empty log."""
    names = log.read_text().split("\n")[:-1] if log.exists() else []
    log.unlink(missing_ok=True)
    return sorted(names)


@pytest.fixture
def stopped(tmp_path, small_shards):
    """A conversion that stopped at image 3; what it lacked is there now. Its reader."""
    (tmp_path / "trouble").touch()
    reader = FailingReader(log=tmp_path / "log", error=UserError("image 3: broken"), trouble=tmp_path / "trouble")
    with pytest.raises(UserError, match="image 3: broken; 3 finished .* kept in .*out.unfinished: the same command"):
        make(tmp_path / "out", reader=reader)
    assert not (tmp_path / "out").exists()
    assert converted(tmp_path / "log") == ["image 0", "image 1", "image 2"]
    (tmp_path / "trouble").unlink()
    return reader


def test_finished_shards_survive_an_error_and_are_not_made_again(tmp_path, stopped, capsys):
    make(tmp_path / "out", reader=stopped)
    assert converted(tmp_path / "log") == ["image 3", "image 4", "image 5", "image 6"]
    assert "going on: 3 images" in capsys.readouterr().err
    make(tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_other_failures_and_ctrl_c_keep_finished_shards_too_and_say_so(tmp_path, small_shards, capsys, error):
    with pytest.raises(type(error)):
        make(tmp_path / "out", reader=FailingReader(error=error))
    assert re.search(r"\n3 finished part\(s\) are kept in .*: the same command goes on", capsys.readouterr().err)


def test_an_error_of_the_headers_takes_no_finished_shards_away(tmp_path, stopped):
    with pytest.raises(UserError, match="is no image; 3 finished"):
        make(tmp_path / "out", reader=BrokenReader())


@pytest.mark.parametrize("changes", [{"version": "2"}, {"tile_size": 8}, {"stride": 8}, {"scale": 0.5}])
def test_finished_shards_of_other_files_or_options_are_made_again(tmp_path, stopped, changes):
    options = {name: value for name, value in changes.items() if name != "version"}
    make(tmp_path / "out", reader=replace(stopped, version=changes.get("version", "1")), **options)
    assert len(converted(tmp_path / "log")) == 7
    make(tmp_path / "plain", **options)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_a_shard_that_was_cut_off_is_made_again(tmp_path, stopped):
    for path in (tmp_path / "out.unfinished" / "shards").glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-1])
    make(tmp_path / "out", reader=stopped)
    assert len(converted(tmp_path / "log")) == 7


def test_broken_sources_are_left_out_on_request_and_listed(tmp_path, capsys):
    with pytest.raises(UserError, match="1.tif: is no image"):
        make(tmp_path / "out", reader=BrokenReader())
    info = make(tmp_path / "out", reader=BrokenReader(), skip_broken=True)
    assert info.left_out == {"image 1": "1.tif: is no image", "image 3": "3.tif: is cut short"}
    assert info.num_sources == {"train": 3, "test": 2}
    assert info.source_names["train"] == ["image 0", "image 2", "image 4"]
    lines = capsys.readouterr().err.splitlines()
    assert {"left out: image 1 (1.tif: is no image)", "left out: image 3 (3.tif: is cut short)"} <= set(lines)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- image 3 is left out because it cannot be read: 3.tif: is cut short\n" in text
    assert "/home" not in text, "a card tells nothing about the machine"


def test_split_whose_sources_are_all_broken_is_an_error(tmp_path):
    # The message named no file and no reason.
    for numbers, first in (((1,), "1.tif: is no image"), ((3,), "3.tif: is cut short"), ((1, 1), "1.* more")):
        with pytest.raises(UserError, match=f"split test has nothing left, none of its images can be read: {first}"):
            make(tmp_path / "out", {"train": town(0), "test": town(*numbers)}, BrokenReader(), skip_broken=True)


def test_what_was_left_out_before_is_an_error_without_the_request(tmp_path, small_shards):
    with pytest.raises(UserError, match="split test has nothing left"):
        make(tmp_path / "out", {"train": town(0, 2), "test": town(3)}, BrokenReader(), skip_broken=True)
    with pytest.raises(UserError, match="3.tif: is cut short"):
        make(tmp_path / "out", {"train": town(0, 2), "test": town(3)}, BrokenReader())


@dataclass(frozen=True)
class ChangingReader(Reader):
    def header(self, record):
        return replace(super().header(record), identity=str(time.perf_counter_ns()))


def test_source_that_changes_during_the_conversion_is_refused(tmp_path):
    with pytest.raises(UserError, match="image 0: has changed since"):
        make(tmp_path / "out", reader=ChangingReader())


def test_converter_does_not_import_torch():
    # It took 600 MB in each process of the converter and seconds of every start, for nothing.
    code = "import sys, drd_hf.data.prepare, drd_hf.data.folder, drd_hf.data.scenes; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT).returncode == 0


def test_two_processes_cannot_prepare_one_output(tmp_path, monkeypatch):
    monkeypatch.setattr(output_module, "SECONDS_FOR_ORPHANS", 0.1)
    (tmp_path / "out.unfinished").mkdir()
    with FileLock(tmp_path / "out.unfinished" / "lock"):
        with pytest.raises(UserError, match="out: another process is preparing it; wait"):
            make(tmp_path / "out")
        assert [path.name for path in (tmp_path / "out.unfinished").iterdir()] == ["lock"]
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folder_of_somebody_else_under_the_name_of_the_workplace_is_left_alone(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="letter.txt is not from it"):
        make(tmp_path / "out")
    assert (tmp_path / "out.unfinished" / "letter.txt").read_text() == "dear"


FILE_EVENTS = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir")


def states_before_file_events(folder, states, function):
    """What is in `folder` right before each change of it by `function`: folders in `states`, one for each change.

    Another process runs it. What a killed process leaves is what the file system has at that moment.
    """
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        return [states / str(n) for n in range(len(list(states.iterdir())))]
    taking = []

    def watch(event, args):
        writes = event == "open" and str(args[0]).startswith(str(folder)) and args[2] & (os.O_WRONLY | os.O_RDWR)
        if not taking and (event in FILE_EVENTS or writes):
            taking.append(True)
            shutil.copytree(folder, states / str(len(list(states.iterdir()))))
            taking.clear()

    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        states.mkdir()
        sys.addaudithook(watch)
        function()
        status = 0
    finally:
        os._exit(status)


def test_killed_before_any_change_of_a_file_it_goes_on_and_never_loses_the_old_dataset(
    tmp_path, small_shards, monkeypatch
):
    # A start with other options after a kill in the last steps ended in a FileNotFoundError: what was left of the
    # workplace was removed as if all was done, and then written to.
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what a killed process wrote is not lost; waiting takes long
    sources, folder = {"train": town(0), "test": town(2)}, tmp_path / "folder"
    options = {"same": {"tile_size": 16}, "other": {"tile_size": 40}}
    make(folder / "out", {"train": town(6)})
    before = contents(folder / "out")
    for name in options:
        make(tmp_path / name, sources, **options[name])
    after = {name: contents(tmp_path / name) for name in options}

    run = lambda output, name: make(output / "out", sources, overwrite=True, **options[name])  # noqa: E731
    states = states_before_file_events(folder, tmp_path / "states", lambda: run(folder, "same"))
    assert len(states) > 25
    for state in states:
        if (state / "out").exists():
            assert contents(state / "out") in (before, after["same"])
        else:
            assert contents(state / "out.unfinished" / "old") == before
        shutil.copytree(state, state.with_suffix(".copy"))
        for start, name in ((state, "same"), (state.with_suffix(".copy"), "other")):
            run(start, name)
            assert contents(start / "out") == after[name]
            assert [path.name for path in start.iterdir()] == ["out"]


def test_process_that_waits_for_the_folder_does_not_disturb_the_one_that_is_done(tmp_path, monkeypatch):
    # A second process that polled for the lock made the file again while the first one removed the folder, and the
    # first one, whose dataset was complete, ended in "Directory not empty".
    remove = os.rmdir

    def rmdir(path, *args, **kwargs):
        if str(path).endswith("out.unfinished"):
            (tmp_path / "out.unfinished" / "lock").touch()
        remove(path, *args, **kwargs)

    monkeypatch.setattr(os, "rmdir", rmdir)
    make(tmp_path / "out")
    monkeypatch.undo()
    with pytest.raises(UserError, match="out: exists already"):
        make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("written", ["README.md", "assembled.json", "train-00000"])
def test_full_disk_in_the_last_step_is_one_line_and_the_parts_are_kept(tmp_path, small_shards, monkeypatch, written):
    # Errors of the last step were tracebacks, after hours of work.
    def full(function):
        def call(*args, **kwargs):
            if any(written in str(arg) for arg in args):
                raise OSError(errno.ENOSPC, "No space left on device")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "link"), (shutil, "copyfile"), (output_module, "write_file")):
            patch.setattr(module, name, full(getattr(module, name)))
        with pytest.raises(
            UserError, match="out.unfinished: cannot be written .No space left.*7 finished .* are kept"
        ):
            make(tmp_path / "out")
    make(tmp_path / "out")
    make(tmp_path / "plain")
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_mount_point_is_refused_before_any_work():
    # A mounted folder cannot be replaced, which was found out after the whole conversion.
    with pytest.raises(UserError, match="^/proc: is a mount point, .* give a folder inside it"):
        make("/proc")


def test_output_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    # These were taken for a folder that another process has just removed, and tried again for ever.
    with pytest.raises(UserError, match="/proc/none/out.unfinished: cannot be written"):
        make("/proc/none/out")
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(UserError, match="out.unfinished: cannot be written"):
        make("out")


@pytest.mark.parametrize("name", ["old_photos/x", "dataset_mine/x", "shards.txt", "lock2", "assembled.json.tmp"])
def test_files_whose_names_only_begin_like_ours_are_left_alone(tmp_path, name):
    # Any name that began with that of a part of the workplace was taken for one, and the folder removed at the end.
    path = tmp_path / "out.unfinished" / name
    path.parent.mkdir(parents=True)
    path.write_text("dear")
    with pytest.raises(UserError, match=f"{name.split('/')[0]} is not from it; move it away"):
        make(tmp_path / "out")
    assert path.read_text() == "dear"


def test_rest_of_a_file_that_a_killed_process_wrote_is_removed(tmp_path):
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / "assembled.json.123.tmp").write_text("{")
    make(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_card_of_another_encoding_is_somebody_elses(tmp_path):
    # It was a UnicodeDecodeError.
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "README.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match="is not a dataset that this tool wrote"):
        make(tmp_path / "out", overwrite=True)


@dataclass(frozen=True)
class SlowReader(Reader):
    def read(self, record):
        time.sleep(0.2)
        return super().read(record)


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def test_workers_of_a_killed_process_die_and_the_next_one_goes_on(tmp_path, small_shards):
    make(tmp_path / "plain")
    child = os.fork()
    if not child:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            make(tmp_path / "out", reader=SlowReader(log=tmp_path / "log"), num_proc=2)
        finally:
            os._exit(0)
    wait_for(lambda: list(tmp_path.glob("out.unfinished/shards/*.json")))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    # The session of the killed process is empty when its workers are gone.
    wait_for(lambda: not os.path.exists(f"/proc/{child}") and not processes_of_session(child))
    done = len(list(tmp_path.glob("out.unfinished/shards/*.json")))
    converted(tmp_path / "log")
    make(tmp_path / "out", reader=SlowReader(log=tmp_path / "log"), num_proc=2)
    assert 1 <= done == 7 - len(converted(tmp_path / "log"))
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def processes_of_session(session):
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(path.parent.name)
    return found


def test_split_without_a_labelled_pixel_is_refused(tmp_path):
    with pytest.raises(UserError, match="split train has no tile with a labelled pixel"):
        make(tmp_path / "out", reader=LabellingReader(value=255))
    assert not (tmp_path / "out").exists()


def run_script(*args):
    # Absolute paths only: the script must not depend on the folder it is called from.
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


@pytest.fixture
def script(monkeypatch):
    """The script's `main` with the words of a command, in this process, which saves the time of a start."""
    spec = importlib.util.spec_from_file_location("prepare_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def call(*words):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        module.main()

    return call


def test_script_prepares_a_folder_and_reports_bad_input_in_one_line(tmp_path, script, capsys):
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

    script(*args, "--unknown", "ignore")
    said = capsys.readouterr().out
    assert "train: 4 tiles of 1 images; land" in said
    ignored = sum(int((draw(part)[1] == 255).sum()) for part in (0, 1))
    assert f"ignored pixels of unknown value: 255: {ignored}" in said
    assert card(tmp_path / "out")["segmentation"]["name"] == "source"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("scenes --bands RGB", "--bands is for --dataset potsdam or vaihingen; leave it out for scenes"),
        ("scenes --source .", "--source is for --dataset potsdam or vaihingen or cityscapes or folder; leave"),
        ("cityscapes --source . --height", "--height is for --dataset potsdam or vaihingen; leave it out for citysc"),
        ("cityscapes --source . --leave_out 2_10", "--leave_out is for"),
        ("cityscapes --source . --validation_tiles", "--validation_tiles is for"),
        ("potsdam --source . --with_test", "--with_test is for --dataset cityscapes; leave it out for potsdam"),
        ("vaihingen --source . --unknown ignore", "--unknown is for --dataset folder; leave it out for vaihingen"),
        ("folder --source . --layout x.yaml --seed 3", "--seed is for --dataset scenes; leave it out for folder"),
    ],
)
def test_script_refuses_options_of_another_dataset(tmp_path, script, words, message):
    # They were accepted and had no effect.
    with pytest.raises(UserError, match=re.escape(message)):
        script("--output", tmp_path / "out", "--dataset", *words.split())


def test_script_says_that_a_split_has_no_labels(tmp_path, script, capsys):
    # It listed 0.0% of every class.
    write_cityscapes(tmp_path / "source", size=32)
    args = ["--source", tmp_path / "source", "--output", tmp_path / "out", "--tile_size", 32]
    script("--dataset", "cityscapes", *args, "--with_test")
    lines = capsys.readouterr().out.splitlines()
    assert any(re.fullmatch(r"test: \d+ tiles of \d+ images; no labels", line) for line in lines), lines
    assert any(re.fullmatch(r"train: .*; road \d+\.\d%, .*, ignored \d+\.\d%", line) for line in lines), lines


def test_script_prepares_generated_scenes_that_differ_between_splits(tmp_path, script):
    args = ["--dataset", "scenes", "--output", tmp_path / "out", "--tile_size", 64, "--scene_size", 64]
    script(*args, "--scenes_train", 2, "--scenes_validation", 1, "--scenes_test", 0)
    found = [row for split in ("train", "validation") for row in rows(tmp_path / "out", split)]
    assert len({row["image"]["bytes"] for row in found}) == len({row["source"] for row in found}) == 3
    assert not list((tmp_path / "out" / "data").glob("test-*"))


def test_no_scene_is_in_two_splits_or_under_two_seeds():
    counts = {"train": 10_000, "validation": 10_000, "test": 1}
    seeds = [record.seed for seed in (0, 1) for records in scene_records(counts, seed).values() for record in records]
    assert len(set(seeds)) == len(seeds) == 40_002
    assert list(scene_records({"train": 1, "test": 0})) == ["train"]
    for counts, seed in (({"train": -1}, 0), ({"train": 10_001}, 0), ({"train": 1}, -1)):
        with pytest.raises(UserError, match="--seed must be at least 0"):
            scene_records(counts, seed)


def test_script_prepares_potsdam_and_refuses_to_upload_it_before_any_work(tmp_path, script, capsys):
    write_potsdam(tmp_path / "source", ("2_10", "2_11", "2_13"), layout="zips", georeference="internal")
    args = ["--dataset", "potsdam", "--source", tmp_path / "source", "--output", tmp_path / "out", "--tile_size", 32]
    with pytest.raises(UserError, match="^the terms of .*Potsdam.* --i_have_the_right"):
        script(*args, "--push_to_hub", "somebody/potsdam")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]

    script(*args, "--bands", "RGBIR", "--height", "--reference", "both", "--validation_tiles")
    said = capsys.readouterr().out
    assert "train: 8 tiles of 2 images" in said and "validation" not in said
    head = card(tmp_path / "out")["segmentation"]
    assert head["bands"] == ["red", "green", "blue", "near_infrared", "height"]
    assert (head["has_eroded"], head["georeferenced"], head["may_be_shared"]) == (True, True, False)


@pytest.mark.slow
def test_script_killed_at_twenty_random_moments_gives_the_same_bytes_each_time(tmp_path):
    # Goes on after each kill until it is through; what it made must be what an undisturbed run makes.
    rng = np.random.default_rng(0)
    for number in range(24):
        coarse = Image.fromarray(rng.integers(0, 256, (50, 50, 3), np.uint8)).resize((1400, 1300))
        for kind, image in (("images", coarse), ("masks", coarse.convert("L").point(lambda v: v // 128))):
            path = tmp_path / "source" / ("train" if number < 18 else "test") / kind / f"{number:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    layout = {
        "images": "*/images/*.png",
        "masks": "*/masks/*.png",
        "classes": [{"name": "land", "value": 0}, {"name": "roof", "value": 1}],
        "splits": {"train": ["train/*"], "test": ["test/*"]},
    }
    (tmp_path / "layout.yaml").write_text(yaml.safe_dump(layout))
    args = ["--dataset", "folder", "--source", tmp_path / "source", "--layout", tmp_path / "layout.yaml"]
    args += ["--stride", 256, "--num_proc", 2, "--output"]
    start = time.monotonic()
    assert run_script(*args, tmp_path / "plain").returncode == 0
    duration = time.monotonic() - start
    expected = contents(tmp_path / "plain")
    assert len(expected) > 5

    moments, kills, went_on = random.Random(0), 0, 0
    while kills < 20:
        command = [sys.executable, str(SCRIPT), *map(str, args), str(tmp_path / "out")]
        script = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        try:
            _, errors = script.communicate(timeout=moments.uniform(0, duration))
        except subprocess.TimeoutExpired:
            script.kill()
            _, errors = script.communicate()
            kills += 1
        else:
            assert script.returncode == 0, errors.decode()
        if (tmp_path / "out").exists():
            assert contents(tmp_path / "out") == expected
            if not (tmp_path / "out.unfinished").exists():
                shutil.rmtree(tmp_path / "out")
        went_on += b"going on" in errors
    done = run_script(*args, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert went_on >= 5
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["layout.yaml", "out", "plain", "source"]
