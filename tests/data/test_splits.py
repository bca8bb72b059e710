import pickle

import datasets
import numpy as np
import pytest

from drd_hf.data.facts import DatasetFacts, SegmentationClass
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.splits import SegmentationInfo, SegmentationSplits, load_splits
from drd_hf.errors import UserError

FACTS = DatasetFacts(
    "no: yes",  # a name that YAML could misread
    (SegmentationClass("off", (1, 2, 3)), SegmentationClass("roof", (4, 5, 6))),
    license="Ask: first\n---\nthen use",
)


@pytest.fixture(autouse=True)
def isolated_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def reader(record):
    image = np.full((8, 12, 3), record, np.uint8)
    return image, np.tile(np.array([0, 1], np.uint8), (8, 6)), f"image {record}", {"7": record}


def make(output, sources=None, **kwargs):
    return prepare_dataset(sources or {"train": [1, 2], "validation": [3]}, reader, FACTS, output, 8, **kwargs)


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


def test_folder_that_was_prepared_again_is_not_read_from_the_cache(tmp_path):
    # `datasets` caches what it loads; a cache that only knew the path would give back the tiles of the first run.
    make(tmp_path / "out", sources={"train": [1, 2]})
    assert np.asarray(load_splits(tmp_path / "out")["train"][0]["image"]).max() == 1
    make(tmp_path / "out", sources={"train": [5, 6]}, overwrite=True)
    assert np.asarray(load_splits(tmp_path / "out")["train"][0]["image"]).max() == 5


@pytest.mark.parametrize("name", ["missing", "a/b/c", "no such folder", "nobody/no-such-dataset"])
def test_what_is_no_folder_and_no_dataset_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{name}: .*no such folder.*give the output folder of prepare_dataset.py"):
        load_splits(name)


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
    monkeypatch.setattr("drd_hf.data.prepare.TILES_PER_ROW_GROUP", 2)
    monkeypatch.setattr("drd_hf.data.prepare.BYTES_PER_SHARD", 1)
    make(tmp_path / "out")
    shards = sorted((tmp_path / "out" / "data").glob("train-*"))
    assert len(shards) == 2
    shards[1].unlink()
    with pytest.raises(UserError, match="prepare it again|prepare or download it again"):
        load_splits(tmp_path / "out")
