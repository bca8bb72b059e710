import pickle
import shutil
import warnings
import zipfile

import numpy as np
import pytest
from PIL import Image

from drd_hf.data.facts import ISPRS_CLASSES, POTSDAM, VAIHINGEN
from drd_hf.data.isprs import decode_colors, find_isprs
from drd_hf.data.tiles import tile_origins
from drd_hf.errors import UserError

from .official import (
    POTSDAM_TEST,
    POTSDAM_TRAIN,
    VAIHINGEN_TEST,
    VAIHINGEN_TRAIN,
    VAIHINGEN_ZIP,
    write_potsdam,
    write_tiff,
    write_vaihingen,
    zip_folder,
)

COLORS = tuple(c.color for c in ISPRS_CLASSES)
FEW = ("2_10", "2_11", "4_12", "6_7", "7_10", "2_13", "3_13")  # all quirks; enough for every split
BANDS = {
    "RGB": (("red", "green", "blue"), (0, 1, 2)),
    "IRRG": (("near_infrared", "red", "green"), (3, 0, 1)),
    "RGBIR": (("red", "green", "blue", "near_infrared"), (0, 1, 2, 3)),
}
REST = sorted({*POTSDAM_TRAIN, *POTSDAM_TEST} - {*FEW})


def few(source, facts=POTSDAM, **options):
    """`find_isprs` for a source that holds the tiles of `FEW` only."""
    return find_isprs(facts, source, leave_out=[*REST, *options.pop("leave_out", ())], **options)


def names(sources):
    return {split: [record.name for record in records] for split, records in sources.items()}


def records(sources):
    return [record for split in sources.values() for record in split]


@pytest.mark.parametrize("layout", ["folders", "double", "zips", "zip of zips"])
def test_potsdam_as_handed_out_is_found_and_decoded_exactly(tmp_path, layout):
    truth = write_potsdam(tmp_path, layout=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources, reader, facts, notes = find_isprs(POTSDAM, tmp_path)
    assert names(sources) == {
        "train": [tile for tile in POTSDAM_TRAIN if tile != "2_10"],
        "validation": ["2_10"],
        "test": POTSDAM_TEST,
    }
    assert facts.name == "ISPRS Potsdam" and not facts.may_be_shared
    assert any("2_10" in note for note in notes) and any("7_10" in note for note in notes)
    reader, sources = pickle.loads(pickle.dumps((reader, sources)))
    for record in records(sources):
        header, source = reader.header(record), reader.read(record)
        assert (header.name, header.height, header.width) == (record.name, 64, 64)
        assert header.labelled and header.eroded and header.georeferenced
        np.testing.assert_array_equal(source.image, truth.bands[record.name][..., :3])
        np.testing.assert_array_equal(source.label, truth.labels[record.name])
        np.testing.assert_array_equal(source.label_eroded, truth.eroded[record.name])
        assert source.report == {}
        row, column = map(int, record.name.split("_"))
        where = (0.05, 0, 366000 + column * 3.2, 0, -0.05, 5808000 - row * 3.2)
        assert source.transform == pytest.approx(where)


def test_the_zip_of_zips_itself_is_a_source(tmp_path):
    write_potsdam(tmp_path, FEW, layout="zip of zips")
    assert len(records(few(tmp_path / "Potsdam.zip")[0])) == len(FEW)


@pytest.mark.parametrize("height", [False, True])
@pytest.mark.parametrize("kind", BANDS)
def test_every_imagery_and_the_height_come_as_named_bands(tmp_path, kind, height):
    truth = write_potsdam(tmp_path, FEW, georeference="internal")
    sources, reader, _, _ = few(tmp_path, bands=kind.lower(), height=height)
    bands, channels = BANDS[kind]
    assert reader.bands == bands + ("height",) * height
    for record in records(sources):
        source = reader.read(record)
        np.testing.assert_array_equal(source.image, truth.bands[record.name][..., channels + (4,) * height])
        assert source.image.flags["C_CONTIGUOUS"] and source.crs == "EPSG:32633"


def test_the_height_of_3_13_lacks_a_column_which_repeats_its_edge(tmp_path):
    write_potsdam(tmp_path, FEW)
    sources, reader, _, _ = few(tmp_path, height=True)
    record = next(record for record in records(sources) if record.name == "3_13")
    with Image.open(record.height.local_path) as image:
        assert image.size == (63, 64)
    height = reader.read(record).image[..., 3]
    np.testing.assert_array_equal(height[:, 63], height[:, 62])


@pytest.mark.parametrize("size", [(62, 64), (64, 63), (65, 64)])
def test_any_other_difference_of_the_height_is_an_error(tmp_path, size):
    write_potsdam(tmp_path, FEW)
    path = next(tmp_path.rglob("dsm_potsdam_02_11_*.jpg"))
    Image.new("L", size).save(path)
    sources, reader, _, _ = few(tmp_path, height=True)
    record = next(record for record in records(sources) if record.name == "2_11")
    for function in (reader.header, reader.read):
        with pytest.raises(UserError, match=rf"dsm_potsdam_02_11.*: is {size[0]}x{size[1]} but its image is 64x64"):
            function(record)


def test_off_palette_labels_are_decoded_and_counted(tmp_path):
    """4_12 is a lossy file and 6_7 has another yellow: exact matching loses them to clutter or ignore in known tools."""
    truth = write_potsdam(tmp_path, FEW)
    sources, reader, _, _ = few(tmp_path)
    counts = {record.name: reader.read(record).off_palette for record in records(sources)}
    assert counts["4_12"] > 0.9 * 64 * 64
    assert counts["6_7"] == (truth.labels["6_7"] == 4).sum() > 0
    assert set(counts.values()) == {0, counts["4_12"], counts["6_7"]}


def definition(pixel):
    """The class of a colour: each channel up to 127 is 0, above it 255."""
    cut = tuple(255 * (int(value) > 127) for value in pixel)
    return COLORS.index(cut) if cut in COLORS else 255


def test_colours_decode_by_a_threshold_at_127():
    values = (0, 1, 126, 127, 128, 129, 254, 255)
    pixels = np.array(np.meshgrid(values, values, values)).T.reshape(-1, 8, 3).astype(np.uint8)
    label, report, off_palette = decode_colors(pixels, COLORS)
    flat = pixels.reshape(-1, 3)
    assert label.ravel().tolist() == [definition(pixel) for pixel in flat]
    assert off_palette == sum(any(value not in (0, 255) for value in pixel) for pixel in flat.tolist())
    assert report == {"0,0,0": 64, "255,0,255": 64}  # 4 x 4 x 4 of the values on each side


@pytest.mark.parametrize("shape", [(1, 1), (1, 300_000), (700, 801), (3, 0)])
def test_decoding_in_blocks_leaves_no_seam(shape):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (*shape, 3), dtype=np.uint8)
    label, report, off_palette = decode_colors(pixels, COLORS)
    table = np.array([definition((255 * r, 255 * g, 255 * b)) for r in (0, 1) for g in (0, 1) for b in (0, 1)])
    corner = (pixels > 127) @ np.array([4, 2, 1])
    np.testing.assert_array_equal(label, table[corner])
    assert off_palette == ((pixels != 0) & (pixels != 255)).any(axis=2).sum()
    assert report == {k: n for k, n in (("0,0,0", (corner == 0).sum()), ("255,0,255", (corner == 5).sum())) if n}


def test_black_is_reported_in_the_full_reference_and_expected_in_the_eroded_one(tmp_path):
    write_potsdam(tmp_path, FEW)
    label = np.full((64, 64, 3), 255, np.uint8)
    label[:2] = 0
    label[2, :5] = (255, 0, 255)
    for path in tmp_path.rglob("top_potsdam_2_11_label*.tif"):
        write_tiff(path, label)
    for reference, report in (("full", {"0,0,0": 128, "255,0,255": 5}), ("eroded", {"255,0,255": 5})):
        sources, reader, _, _ = few(tmp_path, reference=reference)
        source = reader.read(next(record for record in records(sources) if record.name == "2_11"))
        assert source.report == report
        assert (source.label == 255).sum() == 128 + 5 and (source.label[3:] == 0).all()


def test_pixels_without_data_are_255_in_both_labels(tmp_path):
    truth = write_potsdam(tmp_path, FEW)
    pixels = truth.bands["2_11"][..., :3].copy()
    pixels[10:20, 30:50] = 0
    write_tiff(tmp_path / "2_Ortho_RGB" / "top_potsdam_2_11_RGB.tif", pixels, nodata=0)
    sources, reader, _, _ = few(tmp_path)
    source = reader.read(next(record for record in records(sources) if record.name == "2_11"))
    for label, expected in ((source.label, truth.labels["2_11"]), (source.label_eroded, truth.eroded["2_11"])):
        expected = expected.copy()
        expected[10:20, 30:50] = 255
        np.testing.assert_array_equal(label, expected)


def test_pixels_without_data_are_0_in_every_band(tmp_path):
    """They kept their value, such as 17, and their height, so that they counted in the mean and deviation of bands."""
    truth = write_potsdam(tmp_path, FEW)
    pixels = np.maximum(truth.bands["2_11"][..., :3], 18)
    pixels[10:20, 30:50] = 17
    write_tiff(tmp_path / "2_Ortho_RGB" / "top_potsdam_2_11_RGB.tif", pixels, nodata=17)
    sources, reader, _, _ = few(tmp_path, height=True)
    image = reader.read(next(record for record in records(sources) if record.name == "2_11")).image
    expected = np.dstack((pixels, truth.bands["2_11"][..., 4]))
    expected[10:20, 30:50] = 0
    assert (expected > 0).any(axis=2).sum() == 64 * 64 - 200
    np.testing.assert_array_equal(image, expected)


def test_unknown_colours_of_the_eroded_reference_are_reported_without_its_boundaries(tmp_path):
    """Only those of the full reference were."""
    write_potsdam(tmp_path, FEW)
    label = np.full((64, 64, 3), 255, np.uint8)
    label[:2] = 0
    label[2, :5] = (255, 0, 255)
    write_tiff(tmp_path / "5_Labels_all_noBoundary" / "top_potsdam_2_11_label_noBoundary.tif", label)
    sources, reader, _, _ = few(tmp_path)
    source = reader.read(next(record for record in records(sources) if record.name == "2_11"))
    assert source.report == {"255,0,255 in label_eroded": 5}


def cut_short(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])


def test_zips_that_are_cut_short_are_left_out_on_request(tmp_path, capsys):
    """A zip that was cut short stopped the conversion although broken files were to be skipped, and although nothing in
    it was asked for."""
    truth = write_potsdam(tmp_path, FEW, layout="zips")
    for name in ("1_DSM_normalisation.zip", "5_Labels_all_noBoundary.zip"):
        cut_short(tmp_path / name)
    with pytest.raises(UserError, match="1_DSM_normalisation.zip: is damaged or cut short"):
        few(tmp_path)
    sources, reader, _, notes = few(tmp_path, skip_broken=True)
    assert len(records(sources)) == len(FEW)
    for record in records(sources):
        np.testing.assert_array_equal(reader.read(record).label, truth.labels[record.name])
        assert record.label_eroded is None
    told = [note for note in notes if note.startswith("left out, cannot be read: ")]
    assert [note.split()[5] for note in told] == ["1_DSM_normalisation.zip", "5_Labels_all_noBoundary.zip"]
    assert all("(is damaged or cut short" in note for note in told)
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path}: {note}" for note in told]
    with pytest.raises(UserError, match="4 without normalised height"):
        few(tmp_path, skip_broken=True, height=True)


def test_the_note_on_7_10_is_for_datasets_that_have_it(tmp_path):
    """It was said to be used where no file of it was there, and where it was left out as broken."""
    write_potsdam(tmp_path, FEW)
    assert any("7_10 out because its reference has errors" in note for note in few(tmp_path)[3])
    for path in list(tmp_path.rglob("*_7_10_*")):
        path.unlink()
    _, _, _, notes = few(tmp_path)
    assert not any("has errors" in note for note in notes) and any("7_10" in note for note in notes)


def test_counts_in_notes_hold_when_tiles_turn_out_to_be_broken_later(tmp_path):
    """The card said "6 of 38 tiles are complete and used", and below that 2_11 is left out."""
    write_potsdam(tmp_path, FEW)
    next(tmp_path.rglob("top_potsdam_6_7_RGB.tif")).unlink()
    next(tmp_path.rglob("top_potsdam_2_13_label_noBoundary.tif")).unlink()
    _, _, _, notes = few(tmp_path)
    assert not any("used" in note for note in notes)
    assert any("6 of 7 tiles have all files" in note for note in notes)
    assert any("files are there for 5 of 6 tiles" in note for note in notes)


def test_references_are_chosen(tmp_path):
    truth = write_potsdam(tmp_path, FEW)
    for reference, label, beside in (
        ("full", truth.labels, None),
        ("eroded", truth.eroded, None),
        ("both", truth.labels, truth.eroded),
        (None, truth.labels, truth.eroded),
    ):
        sources, reader, _, notes = few(tmp_path, reference=reference)
        for record in records(sources):
            source = reader.read(record)
            np.testing.assert_array_equal(source.label, label[record.name])
            assert (source.label_eroded is None) == (beside is None) == (not reader.header(record).eroded)
        assert any("eroded" in note for note in notes) == (reference != "full")


def test_without_eroded_files_the_full_reference_is_used_alone(tmp_path):
    write_potsdam(tmp_path, FEW, eroded=False)
    sources, _, _, notes = few(tmp_path)
    assert all(record.label_eroded is None for record in records(sources))
    assert "Labels are the full reference." in notes
    for reference in ("both", "eroded"):
        with pytest.raises(UserError, match="split train has no complete tile .*4 without eroded reference"):
            few(tmp_path, reference=reference)


def test_eroded_files_of_some_tiles_only_are_told_and_used(tmp_path):
    write_potsdam(tmp_path, FEW)
    next(tmp_path.rglob("top_potsdam_2_13_label_noBoundary.tif")).unlink()
    sources, _, _, notes = few(tmp_path)
    assert [record.name for record in records(sources) if record.label_eroded is None] == ["2_13"]
    assert any("files are there for 6 of 7 tiles" in note for note in notes)


def test_complete_references_win_over_those_for_participants(tmp_path):
    write_potsdam(tmp_path, FEW)
    deep = tmp_path / "unpacked" / "again"  # neither depth nor the alphabet decides
    deep.mkdir(parents=True)
    (tmp_path / "5_Labels_all").rename(deep / "5_Labels_all")
    sources, _, _, _ = few(tmp_path)
    assert {record.label.path.split("/")[-2] for record in records(sources)} == {"5_Labels_all"}
    shutil.rmtree(deep)
    with pytest.raises(UserError, match=r"split test has no complete tile of .* \(2 without full reference\)"):
        few(tmp_path)
    sources, _, _, _ = few(tmp_path, leave_out=["test"])
    assert {record.label.path.split("/")[0] for record in records(sources)} == {"5_Labels_for_participants"}
    assert set(sources) == {"train", "validation"}


def test_a_folder_wins_over_its_zip(tmp_path):
    write_potsdam(tmp_path, FEW, layout="zips")
    write_potsdam(tmp_path, FEW, layout="double")
    sources, _, _, _ = few(tmp_path)
    assert all(file.local_path is not None for record in records(sources) for file in record.files)


def test_endings_and_names_may_be_in_upper_case(tmp_path):
    write_potsdam(tmp_path, FEW)
    for path in list(tmp_path.rglob("*.tif")):
        path.rename(path.with_name(path.name.upper()))
    assert len(records(few(tmp_path)[0])) == len(FEW)


def test_missing_files_are_listed_once_with_counts_and_their_tiles_left_out(tmp_path, capsys):
    """They were told as a Python warning, with the file and line of a source code that users do not know."""
    write_potsdam(tmp_path, FEW)
    next(tmp_path.rglob("top_potsdam_2_11_RGB.tif")).unlink()
    for tile in ("2_13", "6_7"):
        (tmp_path / "5_Labels_all" / f"top_potsdam_{tile}_label.tif").unlink()
    shutil.rmtree(tmp_path / "5_Labels_for_participants")
    sources, _, _, notes = few(tmp_path)
    told = [note for note in notes if "all files" in note]
    assert capsys.readouterr().err == f"{tmp_path}: {told[0]}\n" and len(told) == 1
    assert "4 of 7 tiles have all files" in told[0]
    assert "1 without RGB image: 2_11; 2 without full reference: 6_7 2_13." in told[0]
    assert names(sources) == {"train": ["4_12", "7_10"], "validation": ["2_10"], "test": ["3_13"]}


def test_a_split_with_nothing_in_it_is_an_error_unless_left_out(tmp_path):
    write_potsdam(tmp_path, ("2_10", "2_11"))
    with pytest.raises(
        UserError, match="split test has no complete tile of ISPRS Potsdam .*14 without RGB image and full reference"
    ):
        find_isprs(POTSDAM, tmp_path)
    sources, _, _, _ = find_isprs(POTSDAM, tmp_path, leave_out=["test"])
    assert names(sources) == {"train": ["2_11"], "validation": ["2_10"]}


def test_validation_and_left_out_tiles_are_chosen(tmp_path):
    write_potsdam(tmp_path, FEW)
    sources, _, _, notes = few(tmp_path, validation=["02_11", "6_7"], leave_out=["7_10"])
    assert names(sources) == {"train": ["2_10", "4_12"], "validation": ["2_11", "6_7"], "test": ["2_13", "3_13"]}
    assert not any("has errors" in note for note in notes)
    assert any("Left out on request" in note and "7_10" in note for note in notes)
    assert "validation" not in few(tmp_path, validation=[])[0]


def test_validation_leaves_something_to_train_on(tmp_path):
    """A dataset without train split was written when all train tiles were chosen for validation."""
    write_potsdam(tmp_path, FEW)
    for options in (
        {"validation": POTSDAM_TRAIN},
        {"validation": [tile for tile in POTSDAM_TRAIN if tile != "2_10"], "leave_out": ["2_10"]},
        {"leave_out": [tile for tile in POTSDAM_TRAIN if tile != "2_10"]},
    ):
        with pytest.raises(UserError, match="no train tile is left, only .*; choose fewer validation tiles"):
            find_isprs(POTSDAM, tmp_path, **options)
    assert names(few(tmp_path, leave_out=["train"])[0]) == {"test": ["2_13", "3_13"]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": ["2_9"]}, "tile '2_9' is none of 24 tiles; nearest: .*2_1"),
        ({"validation": ["2_13"]}, "tile '2_13' is none of 24 tiles"),
        ({"leave_out": ["7_14"]}, "tile '7_14' is none of 38 tiles; nearest: .*7_1"),
        ({"leave_out": ["everything"]}, "tile 'everything' is none of 38 tiles"),
        ({"validation": ["2_11"], "leave_out": ["2_11"]}, "tile 2_11 is in both validation and leave_out"),
        ({"bands": "NIR"}, "bands is 'NIR'; ISPRS Potsdam has RGB, IRRG, RGBIR"),
        ({"reference": "half"}, "reference is 'half'; give one of full, eroded, both"),
    ],
)
def test_wrong_options_are_refused(tmp_path, options, message):
    write_potsdam(tmp_path, ("2_10",))
    with pytest.raises(UserError, match=message):
        find_isprs(POTSDAM, tmp_path, **options)


def test_imagery_that_is_not_there_is_named_with_what_is(tmp_path):
    write_potsdam(tmp_path, FEW, imagery=("IRRG", "RGBIR"))
    with pytest.raises(UserError, match=r"no RGB imagery .*found: IRRG \(7 tiles\), RGBIR \(7 tiles\)"):
        few(tmp_path)


def test_a_source_without_any_file_of_the_dataset_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    for facts, example in ((POTSDAM, "top_potsdam_2_10_RGB.tif"), (VAIHINGEN, "top_mosaic_09cm_area1.tif")):
        with pytest.raises(UserError, match=f"no file of {facts.dataset.name} among 1 files; expected .*{example}"):
            find_isprs(facts, tmp_path)


def test_a_label_of_another_size_is_named_before_pixels_are_read(tmp_path):
    write_potsdam(tmp_path, FEW)
    path = tmp_path / "5_Labels_all" / "top_potsdam_2_11_label.tif"
    write_tiff(path, np.zeros((64, 60, 3), np.uint8))
    sources, reader, _, _ = few(tmp_path)
    record = next(record for record in records(sources) if record.name == "2_11")
    for function in (reader.header, reader.read):
        with pytest.raises(UserError, match=r"top_potsdam_2_11_label\.tif: is 60x64 but its image is 64x64 pixels"):
            function(record)


@pytest.mark.parametrize("part", ["2_Ortho_RGB", "5_Labels_all", "5_Labels_all_noBoundary"])
def test_a_truncated_file_is_named(tmp_path, part):
    write_potsdam(tmp_path, FEW)
    path = next((tmp_path / part).glob("*_2_11_*.tif"))
    path.write_bytes(path.read_bytes()[:-1])
    sources, reader, _, _ = few(tmp_path)
    record = next(record for record in records(sources) if record.name == "2_11")
    with pytest.raises(UserError, match=rf"{path.name}: .*cut short"):
        reader.read(record)


def test_the_identity_of_a_tile_changes_with_each_of_its_files(tmp_path):
    write_potsdam(tmp_path, FEW)

    def identity():
        sources, reader, _, _ = few(tmp_path, height=True)
        return reader.header(sources["validation"][0]).identity

    seen = [identity()]
    assert identity() == seen[0]
    for name in ("2_10_RGB.tif", "2_10_label.tif", "2_10_label_noBoundary.tif", "02_10_normalized_lastools.jpg"):
        path = next(path for path in tmp_path.rglob(f"*{name}") if "participants" not in str(path))
        shutil.copyfile(path, tmp_path / "copy")
        path.write_bytes((tmp_path / "copy").read_bytes())
        seen.append(identity())
    (tmp_path / "2_Ortho_RGB" / "top_potsdam_2_10_RGB.tfw").write_text("1\n0\n0\n-1\n0\n0\n")
    seen.append(identity())
    assert len(set(seen)) == 6


@pytest.mark.parametrize("layout", ["folders", "zips"])
def test_vaihingen_as_handed_out_is_found_and_decoded_exactly(tmp_path, layout):
    """Image and label of an area have the same file name, and the eroded labels have an area 9 without an image."""
    truth = write_vaihingen(tmp_path, layout=layout)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sources, reader, facts, _ = find_isprs(VAIHINGEN, tmp_path)
    train = [tile for tile in VAIHINGEN_TRAIN if tile != "30"]
    assert names(sources) == {"train": train, "validation": ["30"], "test": VAIHINGEN_TEST}
    assert reader.bands == ("near_infrared", "red", "green")
    assert "Cramer, 2010" in facts.citation
    for record in records(sources):
        source, header = reader.read(record), reader.header(record)
        assert (header.height, header.width) == source.label.shape == truth.labels[record.name].shape
        np.testing.assert_array_equal(source.image, truth.bands[record.name][..., (3, 0, 1)])
        np.testing.assert_array_equal(source.label, truth.labels[record.name])
        np.testing.assert_array_equal(source.label_eroded, truth.eroded[record.name])
        assert not header.georeferenced


def test_vaihingen_with_one_folder_for_each_kind_is_found(tmp_path):
    write_vaihingen(tmp_path / "all", ("1", "30", "2"))
    main = tmp_path / "all" / VAIHINGEN_ZIP
    for old, new in ((main / "top", "top"), (tmp_path / "all" / f"{VAIHINGEN_ZIP}_ground_truth_COMPLETE", "gts")):
        shutil.copytree(old, tmp_path / "mine" / new)
    sources, _, _, _ = find_isprs(VAIHINGEN, tmp_path / "mine", validation=["area30"])
    assert names(sources) == {"train": ["1"], "validation": ["30"], "test": ["2"]}


def vaihingen_parts(tmp_path, tiles=("1", "30", "2")):
    """Vaihingen's zips, the folder of the first one unpacked, and what is in them."""
    truth = write_vaihingen(tmp_path / "all", tiles)
    shutil.copytree(tmp_path / "all" / VAIHINGEN_ZIP, tmp_path / "mine")
    return truth, tmp_path / "mine", tmp_path / "all" / f"{VAIHINGEN_ZIP}_ground_truth_COMPLETE"


def check_vaihingen(source, truth, **options):
    sources, reader, _, _ = find_isprs(VAIHINGEN, source, **options)
    for record in records(sources):
        read = reader.read(record)
        np.testing.assert_array_equal(read.image, truth.bands[record.name][..., (3, 0, 1)])
        np.testing.assert_array_equal(read.label, truth.labels[record.name])
    return names(sources)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize(
    "folder", ["complete", "train_masks", "annotations", "ann_dir", "labels-png", "Ground Truth", "A GTS"]
)
def test_labels_are_never_taken_for_images(tmp_path, folder, zipped):
    """The complete labels of Vaihingen have the names of its images and come in a zip without folders. Unpacked into
    `complete/` they became the images, silently: the tiles of the dataset held the five colours of labels."""
    truth, source, full = vaihingen_parts(tmp_path)
    if zipped:  # folders won over zips, whatever was in them
        zip_folder(source, tmp_path / f"{VAIHINGEN_ZIP}.zip")
        source = tmp_path
        shutil.rmtree(tmp_path / "mine")
        full = full.rename(tmp_path / "full")
        shutil.rmtree(tmp_path / "all")
    full.rename(source / folder)
    assert check_vaihingen(source, truth) == {"train": ["1"], "validation": ["30"], "test": ["2"]}


def test_of_a_folder_that_says_nothing_nothing_is_taken_where_another_says_it_holds_images(tmp_path):
    truth, source, full = vaihingen_parts(tmp_path)
    full.rename(source / "a")
    assert check_vaihingen(source, truth, leave_out=["test"]) == {"train": ["1"], "validation": ["30"]}


def test_images_and_labels_in_folders_that_say_nothing_are_refused(tmp_path):
    truth, source, full = vaihingen_parts(tmp_path)
    (source / "top").rename(source / "b")
    shutil.copytree(full, source / "a")
    with pytest.raises(UserError, match=r"a/top_mosaic_\S+ and \S+b/top_mosaic_\S+: differ, .* such as top and gts"):
        find_isprs(VAIHINGEN, source, leave_out=["test"])
    (source / "b").rename(source / "images")
    (source / "a").rename(source / "masks")
    assert check_vaihingen(source, truth) == {"train": ["1"], "validation": ["30"], "test": ["2"]}


def test_the_same_image_twice_is_no_question(tmp_path):
    """Once on disk and once in a zip, or copied at another time: identities differ, contents do not."""
    truth, source, full = vaihingen_parts(tmp_path)
    full.rename(source / "gts")
    (source / "top").rename(source / "a")
    zip_folder(source / "a", source / "b.zip")
    shutil.copytree(source / "a", source / "c", copy_function=shutil.copyfile)
    assert check_vaihingen(source, truth) == {"train": ["1"], "validation": ["30"], "test": ["2"]}


def test_a_label_that_stands_where_the_image_belongs_is_refused_when_it_is_read(tmp_path):
    _, source, full = vaihingen_parts(tmp_path)
    shutil.rmtree(source / "top")
    full.rename(source / "a")
    sources, reader, _, _ = find_isprs(VAIHINGEN, source, leave_out=["test"])
    with pytest.raises(UserError, match=r"a/top_mosaic_09cm_area1\.tif: is no image, it holds only colours of labels"):
        reader.read(sources["train"][0])


@pytest.mark.parametrize(
    "folder", ["Vaihingen_images_and_ground_truth", "ground_truth_and_more", "top_and_gts/labels"]
)
def test_the_nearest_folder_tells_what_a_file_is(tmp_path, folder):
    """Below a folder with "ground_truth" in its name no image was found."""
    truth, source, full = vaihingen_parts(tmp_path)
    full.rename(source / "gts")
    (tmp_path / "outer" / folder).parent.mkdir(parents=True)
    source.rename(tmp_path / "outer" / folder)
    assert check_vaihingen(tmp_path / "outer", truth) == {"train": ["1"], "validation": ["30"], "test": ["2"]}


def test_eroded_labels_are_never_taken_for_the_full_ones(tmp_path):
    """Some copies of the eroded labels lost the ending of their names."""
    truth = write_vaihingen(tmp_path, ("1", "30", "2"))
    (tmp_path / "A_ground_truth_eroded").mkdir()
    for path in (tmp_path / f"{VAIHINGEN_ZIP}_ground_truth_eroded_COMPLETE").glob("*.tif"):
        shutil.copy(path, tmp_path / "A_ground_truth_eroded" / path.name.replace("_noBoundary", ""))
    sources, reader, _, _ = find_isprs(VAIHINGEN, tmp_path)
    for record in records(sources):
        np.testing.assert_array_equal(reader.read(record).label, truth.labels[record.name])


def test_vaihingen_has_no_8_bit_height(tmp_path):
    write_vaihingen(tmp_path, ("1", "30", "2"))
    with pytest.raises(UserError, match="has no normalised height"):
        find_isprs(VAIHINGEN, tmp_path, height=True)


@pytest.mark.parametrize(
    ("stride", "tile", "train", "test"), [(512, 144, 24 * 144, 14 * 144), (256, 529, 24 * 529, 14 * 529)]
)
def test_the_official_split_has_the_known_number_of_patches(stride, tile, train, test):
    """3456/2016 and 12,696/7,406 are what mmsegmentation users count for Potsdam at 6000x6000."""
    origins = tile_origins(6000, 512, stride)
    assert len(origins) ** 2 == tile and origins[-1] == 6000 - 512
    assert (len(POTSDAM.train) * tile, len(POTSDAM.test) * tile) == (train, test)
    assert (train, test) in ((3456, 2016), (12_696, 7_406))


def test_facts_of_the_splits():
    assert (len(POTSDAM.train), len(POTSDAM.test)) == (24, 14)
    assert (len(VAIHINGEN.train), len(VAIHINGEN.test)) == (16, 17)
    assert list(POTSDAM.train + POTSDAM.test) == POTSDAM_TRAIN + POTSDAM_TEST
    assert list(VAIHINGEN.train + VAIHINGEN.test) == VAIHINGEN_TRAIN + VAIHINGEN_TEST


@pytest.mark.slow
def test_a_tile_of_full_size_decodes_exactly_from_zips(tmp_path):
    tiles = ("2_10", "4_12", "3_13")
    truth = write_potsdam(
        tmp_path, tiles, 6000, ("RGBIR",), participants=False, layout="zip of zips", compression=zipfile.ZIP_STORED
    )
    sources, reader, _, _ = find_isprs(POTSDAM, tmp_path, bands="RGBIR", height=True)
    for record in records(sources):
        source = reader.read(record)
        np.testing.assert_array_equal(source.image, truth.bands[record.name])
        np.testing.assert_array_equal(source.label, truth.labels[record.name])
        np.testing.assert_array_equal(source.label_eroded, truth.eroded[record.name])
