import os
import pickle
import subprocess
import sys
from dataclasses import dataclass, replace

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from drd_hf.data.facts import DatasetFacts, SegmentationClass
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.source import SourceHeader, SourceImage
from drd_hf.data.splits import SegmentationInfo, SegmentationSplits, load_splits
from drd_hf.errors import UserError

from ..hub_server import hub  # noqa: F401

FACTS = DatasetFacts(
    "no: yes",  # a name that YAML could misread
    (SegmentationClass("off", (1, 2, 3)), SegmentationClass("roof", (4, 5, 6))),
    license="Ask: first\n---\nthen use",
)

SOURCES = {"train": [1, 2], "validation": [3]}


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@dataclass(frozen=True)
class Record:
    number: int

    @property
    def name(self):
        return f"image {self.number}"


class Reader:
    bands = ("red", "green", "blue")

    def header(self, record):
        return SourceHeader(record.name, 8, 12, "1", georeferenced=record.number == 4)

    def read(self, record):
        image = np.full((8, 12, len(self.bands)), record.number, np.uint8)
        label = np.tile(np.array([0, 1], np.uint8), (8, 6))
        place = ("EPSG:25832", (0.5, 0, 3, 0, -0.5, 4)) if record.number == 4 else (None, None)
        return SourceImage(record.name, image, label, None, *place, {"7": record.number})


class FourBandReader(Reader):
    bands = ("near_infrared", "red", "green", "height")


def make(output, sources=None, reader=None, **kwargs):
    sources = {split: [Record(n) for n in numbers] for split, numbers in (sources or SOURCES).items()}
    return prepare_dataset(sources, reader or Reader(), FACTS, output, 8, **kwargs)


def test_a_prepared_folder_loads_with_everything_its_card_says(tmp_path):
    info = make(tmp_path / "out", stride=4)
    splits = load_splits(tmp_path / "out")
    assert splits.info == info
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 4, "validation": 2} == info.num_tiles
    row = splits["train"][2]
    assert (row["source"], row["row"], row["column"]) == ("image 2", 0, 0)
    assert (np.asarray(row["image"]) == 2).all()
    assert row["label"].mode == "L"
    assert np.asarray(row["label"]).tolist() == [[0, 1] * 4] * 8
    assert splits.info.id2label == {0: "off", 1: "roof"}
    assert splits.info.label2id == {"off": 0, "roof": 1}
    assert splits.info.colors == ((1, 2, 3), (4, 5, 6))
    assert (splits.info.name, splits.info.license) == (FACTS.name, FACTS.license)
    assert (splits.info.tile_size, splits.info.stride, splits.info.scale) == (8, 4, 1.0)
    assert splits.info.pixel_shares["train"] == {"off": 0.5, "roof": 0.5}
    assert splits.info.unknown_pixels == {"7": 6}


def test_info_survives_its_card_form(tmp_path):
    info = make(tmp_path / "out")
    assert SegmentationInfo.from_card(info.to_card()) == info
    assert info.facts.classes == FACTS.classes
    full = replace(
        info,
        bands=("near_infrared", "red", "green", "height"),
        band_mean=(0.1, 0.2, 0.3, 0.4),
        band_std=(0.4, 0.3, 0.2, 0.1),
        has_eroded=True,
        georeferenced=True,
        off_palette_pixels={"4_12": 24850},
        left_out={"a": "is cut short"},
        may_be_shared=False,
        terms="Ask: first",
        notes=("6_7 is missing",),
    )
    assert SegmentationInfo.from_card(yaml.safe_load(yaml.safe_dump(full.to_card()))) == full
    assert not full.facts.may_be_shared


def test_card_of_before_there_were_bands_still_loads(tmp_path):
    content = make(tmp_path / "out").to_card()
    for key in ("bands", "band_mean", "band_std", "may_be_shared", "has_eroded", "georeferenced", "prepared_with"):
        del content[key]
    for split in content["splits"].values():
        del split["source_names"]
    info = SegmentationInfo.from_card(content)
    assert (info.bands, info.band_mean, info.may_be_shared) == (("red", "green", "blue"), (), True)


def test_streamed_splits_give_the_same_rows_from_the_files(tmp_path):
    sources = {"train": [1, 4], "validation": [3]}
    info = make(tmp_path / "out", sources, FourBandReader())
    streamed, loaded = load_splits(tmp_path / "out", streaming=True), load_splits(tmp_path / "out")
    assert streamed.info == loaded.info == info
    assert isinstance(streamed["train"], datasets.IterableDataset)
    for split in ("train", "validation"):
        rows = list(streamed[split])
        assert rows == list(loaded[split])
    assert (rows[0]["crs"], rows[0]["transform"]) == (None, None)
    row = list(streamed["train"])[3]
    assert (row["column"], row["crs"], row["transform"]) == (4, "EPSG:25832", [0.5, 0, 5, 0, -0.5, 4])
    assert [np.asarray(band).tolist() for band in row["extra_bands"]] == [[[4] * 8] * 8]


def test_streaming_says_that_a_file_is_missing_or_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr("drd_hf.data.prepare.shards.PIXELS_PER_SHARD", 1)
    make(tmp_path / "out")
    first, second = sorted((tmp_path / "out" / "data").glob("train-*"))
    second.unlink()
    with pytest.raises(UserError, match="train has 2 of its 4 tiles"):
        load_splits(tmp_path / "out", streaming=True)
    second.write_bytes(first.read_bytes()[:-50])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_splits(tmp_path / "out", streaming=True)


def test_splits_can_be_pickled_transformed_and_selected(tmp_path):
    make(tmp_path / "out")
    splits = load_splits(str(tmp_path / "out"))
    copy = pickle.loads(pickle.dumps(splits))
    assert isinstance(copy, SegmentationSplits)
    assert copy.info == splits.info
    assert copy["train"][1]["source"] == splits["train"][1]["source"]

    transformed = splits.with_transform(lambda batch: {"n": [len(source) for source in batch["source"]]})
    assert transformed["train"][0] == {"n": 7}
    assert transformed.info == splits.info
    assert splits["train"].select([2])[0]["source"] == "image 2"


@pytest.mark.parametrize("name", ["a [1]", "x[!a]{b,c}", "50%20 #2 ü?", "*"])
def test_folder_whose_name_looks_like_a_pattern_loads(tmp_path, name):
    # "a [1]" was written, but none of its files was found again.
    make(tmp_path / name)
    make(tmp_path / "a 1", {"train": [5]})
    loaded, streamed = load_splits(tmp_path / name), load_splits(tmp_path / name, streaming=True)
    for split in ("train", "validation"):
        assert [row["source"] for row in loaded[split]] == [row["source"] for row in streamed[split]]
    assert loaded["train"].num_rows == 4
    assert loaded["train"].features == streamed["train"].features


def test_folder_that_was_prepared_again_is_not_read_from_the_cache(tmp_path):
    # `datasets` caches what it loads; a cache that only knew the path would give back the tiles of the first run.
    make(tmp_path / "out", sources={"train": [1, 2]})
    assert np.asarray(load_splits(tmp_path / "out")["train"][0]["image"]).max() == 1
    make(tmp_path / "out", sources={"train": [5, 6]}, overwrite=True)
    assert np.asarray(load_splits(tmp_path / "out")["train"][0]["image"]).max() == 5


@pytest.mark.parametrize("same_time", [False, True])
def test_shards_that_were_replaced_under_the_same_card_are_read_anew(tmp_path, same_time):
    # A damaged shard was loaded, the good one copied over it and loaded again: the tiles were still the damaged ones,
    # because the cache's key came from the card alone.
    make(tmp_path / "out", sources={"train": [1, 2]})
    make(tmp_path / "other", sources={"train": [5, 6]})
    (shard,) = (tmp_path / "out" / "data").glob("train-*")
    (other,) = (tmp_path / "other" / "data").glob("train-*")
    pq.write_table(pq.read_table(other), other, compression="none")  # of another size than `shard`
    assert other.stat().st_size != shard.stat().st_size

    assert np.asarray(load_splits(tmp_path / "out")["train"][0]["image"]).max() == 1
    stat = shard.stat()
    shard.write_bytes(other.read_bytes())
    if same_time:
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert np.asarray(load_splits(tmp_path / "out")["train"][0]["image"]).max() == 5


def test_folder_that_did_not_change_is_cached_once(tmp_path):
    make(tmp_path / "out")
    caches = []
    for _ in range(2):
        rows = load_splits(tmp_path / "out")["train"]
        (tmp_path / "out" / "data" / "notes.txt").write_text("none of the tiles")
        caches.append([file["filename"] for file in rows.cache_files])
    assert caches[0] == caches[1] != []
    assert len(list((tmp_path / "cache").rglob("*train*.arrow"))) == 1


@pytest.mark.parametrize("name", ["missing", "a/b/c", "no such folder", "nobody/no-such-dataset"])
def test_what_is_no_folder_and_no_dataset_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: .*no such folder.*give the output folder of prepare_dataset.py"):
        load_splits(name)


def test_dataset_that_the_hub_does_not_show_is_told_with_what_to_do(hub):  # noqa: F811
    # The Hub answers "401" to whoever is not logged in, also where a name is misspelt.
    code = "from drd_hf.data.splits import load_splits; load_splits('org/misspelt')"
    home = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **home}, capture_output=True, text=True)
    (said,) = [line for line in done.stderr.splitlines() if "errors.UserError:" in line]
    assert "org/misspelt: no such folder, and on the Hub no such dataset or a private one; check the name, or" in said
    assert "`hf auth login`" in said


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (None, "has no dataset card"),
        ("# Just text\n", "no key 'segmentation'"),
        ("---\nlicense: mit\n---\n", "no key 'segmentation'"),
        ("---\na: [\n---\n", "not valid YAML"),
        ("---\nsegmentation:\n  name: x\n---\n", "'segmentation' in its card is damaged"),
    ],
)
def test_folder_without_a_proper_card_is_refused(tmp_path, card, message):
    (tmp_path / "out").mkdir()
    if card is not None:
        (tmp_path / "out" / "README.md").write_text(card)
    with pytest.raises(UserError, match=message) as error:
        load_splits(tmp_path / "out")
    assert "\n" not in str(error.value)


def test_missing_and_damaged_data_files_are_refused(tmp_path):
    make(tmp_path / "out")
    (data,) = (tmp_path / "out" / "data").glob("train-*")
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(UserError, match="the data files cannot be loaded.*prepare it again"):
        load_splits(tmp_path / "out")
    data.unlink()
    with pytest.raises(UserError, match="prepare it again"):
        load_splits(tmp_path / "out")


def test_missing_shard_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("drd_hf.data.prepare.shards.PIXELS_PER_SHARD", 1)
    make(tmp_path / "out")
    shards = sorted((tmp_path / "out" / "data").glob("train-*"))
    assert len(shards) == 2
    shards[1].unlink()
    with pytest.raises(UserError, match="prepare it again|prepare or download it again"):
        load_splits(tmp_path / "out")
