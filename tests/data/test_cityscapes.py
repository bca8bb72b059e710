import pickle
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from drd_hf.data.cityscapes import find_cityscapes, train_ids
from drd_hf.data.facts import CITYSCAPES
from drd_hf.errors import UserError

from .official import CITYSCAPES_IDS, write_cityscapes


def records(sources):
    return [record for split in sources.values() for record in split]


@pytest.mark.parametrize("layout", ["folders", "zips"])
def test_cityscapes_as_handed_out_is_found_and_decoded_exactly(tmp_path, layout):
    truth = write_cityscapes(tmp_path, layout=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources, reader, facts, notes = find_cityscapes(tmp_path)
    assert {split: len(found) for split, found in sources.items()} == {"train": 4, "validation": 2}
    assert [record.name for record in sources["validation"]] == ["munster_000000_000019", "munster_000001_000019"]
    assert len(facts.classes) == 19 and not facts.may_be_shared and "2016" in facts.citation
    assert any("validation" in note and "papers report" in note for note in notes)
    reader, sources = pickle.loads(pickle.dumps((reader, sources)))
    for record in records(sources):
        header, source = reader.header(record), reader.read(record)
        assert (header.name, header.height, header.width, header.labelled) == (record.name, 32, 64, True)
        np.testing.assert_array_equal(source.image, truth.bands[record.name][..., :3])
        np.testing.assert_array_equal(source.label, truth.labels[record.name])
        assert source.report == {}


def test_the_test_split_comes_on_request_and_without_its_empty_labels(tmp_path):
    write_cityscapes(tmp_path)
    sources, reader, _, notes = find_cityscapes(tmp_path, with_test=True)
    assert len(sources["test"]) == 2
    for record in sources["test"]:
        assert not reader.header(record).labelled and reader.read(record).label is None
    assert any("test has no labels" in note for note in notes)


def test_train_ids_are_those_of_the_benchmark():
    ids = np.arange(256, dtype=np.uint8).reshape(16, 16)
    label, report = train_ids(ids)
    expected = [CITYSCAPES_IDS.index(i) if i in CITYSCAPES_IDS else 255 for i in range(256)]
    assert label.ravel().tolist() == expected
    assert report == {str(i): 1 for i in range(34, 255)}  # 255 is how 8 bits hold -1
    assert len(CITYSCAPES.train_ids) == 34


@pytest.mark.parametrize("dtype", [np.int16, np.int32, np.uint16])
def test_wider_integers_decode_too(dtype):
    ids = np.array([[-1, 7, 33, 34, 255, 300, 0]]).astype(dtype)
    label, report = train_ids(ids)
    assert label.tolist() == [[255, 0, 18, 255, 255, 255, 255]]
    assert report == {"34": 1, "300": 1}


def test_a_label_file_in_16_bits_is_read(tmp_path):
    write_cityscapes(tmp_path)
    path = next(tmp_path.rglob("munster_000000_000019_gtFine_labelIds.png"))
    ids = np.full((32, 64), 26, np.uint16)
    ids[0] = 65535
    Image.fromarray(ids).save(path)
    sources, reader, _, _ = find_cityscapes(tmp_path)
    reader.header(sources["validation"][0])
    label = reader.read(sources["validation"][0]).label
    assert (label[0] == 255).all() and (label[1:] == 13).all()


def test_train_id_files_coarse_labels_and_extra_images_are_not_used(tmp_path):
    write_cityscapes(tmp_path)
    before = find_cityscapes(tmp_path)[0]
    for old in list((tmp_path / "gtFine" / "train").rglob("*_labelIds.png")):
        shutil.copy(old, str(old).replace("labelIds", "labelTrainIds"))
        coarse = tmp_path / "gtCoarse" / old.relative_to(tmp_path / "gtFine")
        coarse.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(old, str(coarse).replace("gtFine", "gtCoarse"))
    extra = tmp_path / "leftImg8bit" / "train_extra" / "bonn"
    extra.mkdir(parents=True)
    shutil.copy(
        next((tmp_path / "leftImg8bit" / "train").rglob("*.png")), extra / "bonn_000000_000019_leftImg8bit.png"
    )
    right = tmp_path / "rightImg8bit" / "train" / "aachen"
    shutil.copytree(tmp_path / "leftImg8bit" / "train" / "aachen", right)
    assert find_cityscapes(tmp_path)[0] == before


def test_a_folder_wins_over_its_zip(tmp_path):
    write_cityscapes(tmp_path, layout="zips")
    write_cityscapes(tmp_path, layout="folders")
    sources, _, _, _ = find_cityscapes(tmp_path)
    assert len(records(sources)) == 6
    assert all(record.image.local_path and record.label.local_path for record in records(sources))


def test_what_is_missing_is_listed_once_with_counts(tmp_path, capsys):
    write_cityscapes(tmp_path)
    next(tmp_path.rglob("aachen_000001_000019_gtFine_labelIds.png")).unlink()
    next(tmp_path.rglob("munster_000000_000019_leftImg8bit.png")).unlink()
    sources, _, _, notes = find_cityscapes(tmp_path)
    assert capsys.readouterr().err == f"{tmp_path}: {notes[-1]}\n"
    assert "train: 1 without label (aachen_000001_000019)" in notes[-1]
    assert "validation: 1 without image (munster_000000_000019)" in notes[-1]
    assert (len(sources["train"]), len(sources["validation"])) == (3, 1)


def test_a_split_with_nothing_in_it_is_an_error(tmp_path):
    write_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "gtFine" / "val")
    with pytest.raises(UserError, match=r"split validation has no image .* in val \(2 images, 0 labels\)"):
        find_cityscapes(tmp_path)
    shutil.rmtree(tmp_path / "leftImg8bit")
    with pytest.raises(UserError, match=r"no image of Cityscapes among .*expected leftImg8bit_trainvaltest\.zip"):
        find_cityscapes(tmp_path)


def test_zips_that_are_cut_short_are_left_out_on_request(tmp_path, capsys):
    """One of them stopped the conversion although broken files were to be skipped."""
    write_cityscapes(tmp_path, layout="zips")
    path = tmp_path / "leftImg8bit_demo.zip"
    path.write_bytes((tmp_path / "leftImg8bit_trainvaltest.zip").read_bytes()[:5000])
    with pytest.raises(UserError, match=r"demo\.zip: is damaged or cut short"):
        find_cityscapes(tmp_path)
    sources, _, _, notes = find_cityscapes(tmp_path, skip_broken=True)
    assert len(records(sources)) == 6
    (told,) = [note for note in notes if note.startswith("left out, cannot be read: leftImg8bit_demo.zip (is damaged")]
    assert capsys.readouterr().err == f"{tmp_path}: {told}\n"


def test_transparent_pixels_are_no_data(tmp_path):
    """Their alpha was dropped, so that whatever lay below it had a label and counted in the mean of bands."""
    truth = write_cityscapes(tmp_path)
    for name, split in (("munster_000000_000019", "val"), ("berlin_000000_000019", "test")):
        path = next((tmp_path / "leftImg8bit" / split).rglob(f"{name}_*.png"))
        pixels = np.dstack((truth.bands[name][..., :3], np.full((32, 64), 255, np.uint8)))
        pixels[4:8, 10:20, 3] = 0
        Image.fromarray(pixels).save(path)
    path = next(tmp_path.rglob("munster_000001_000019_gtFine_labelIds.png"))
    Image.fromarray(np.dstack((np.asarray(Image.open(path)), np.eye(32, 64, dtype=np.uint8) * 255))).save(path)
    sources, reader, _, _ = find_cityscapes(tmp_path, with_test=True)
    for record in (sources["validation"][0], sources["test"][0]):
        image = truth.bands[record.name][..., :3].copy()
        image[4:8, 10:20] = 0
        np.testing.assert_array_equal(reader.read(record).image, image)
        assert reader.header(record).height == 32
    label = truth.labels["munster_000000_000019"].copy()
    label[4:8, 10:20] = 255
    np.testing.assert_array_equal(reader.read(sources["validation"][0]).label, label)
    assert reader.read(sources["test"][0]).label is None
    label = np.where(np.eye(32, 64, dtype=bool), truth.labels["munster_000001_000019"], 255)
    np.testing.assert_array_equal(reader.read(sources["validation"][1]).label, label)


def test_a_label_of_another_size_and_a_truncated_image_are_named(tmp_path):
    write_cityscapes(tmp_path)
    sources, reader, _, _ = find_cityscapes(tmp_path)
    first, second = sources["validation"]
    Image.new("L", (60, 32)).save(first.label.local_path)
    second.image.local_path.write_bytes(second.image.local_path.read_bytes()[:-100])
    first, second = find_cityscapes(tmp_path)[0]["validation"]
    for function in (reader.header, reader.read):
        with pytest.raises(UserError, match=r"labelIds\.png: is 60x32 but its image is 64x32 pixels"):
            function(first)
        with pytest.raises(UserError, match=r"munster_000001_000019_leftImg8bit\.png: is cut short"):
            function(second)
