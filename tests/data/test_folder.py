import os

import numpy as np
import pytest
import rasterio
import yaml
from affine import Affine
from PIL import Image

from drd_hf.data.folder import FolderReader, FolderRecord, find_pairs, folder_reader, read_layout
from drd_hf.errors import UserError

COLORS = [[132, 41, 246], [60, 16, 152], [254, 221, 58]]
IGNORED = [155, 155, 155]


def read_pair(record, layout, unknown="error"):
    source = FolderReader(layout, unknown=unknown).read(record)
    assert source.name == record.name
    return source.image, source.label, source.report


def color_layout(**changes):
    content = {
        "images": "*/images/*.jpg",
        "masks": "*/masks/*.png",
        "classes": [{"name": n, "color": c} for n, c in zip(["land", "building", "tree"], COLORS, strict=True)],
        "ignore": [IGNORED],
        "splits": {"train": ["Tile 1/*"], "test": ["Tile 2/*"]},
    }
    return {key: value for key, value in {**content, **changes}.items() if value is not None}


def value_layout(**changes):
    classes = [{"name": "land", "value": 2}, {"name": "building", "value": 700, "color": [1, 2, 3]}]
    return color_layout(classes=classes, ignore=[0], **changes)


def read(tmp_path, content):
    path = tmp_path / "layout.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return read_layout(path)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = array if isinstance(array, Image.Image) else Image.fromarray(np.asarray(array, np.uint8))
    image.save(path)
    return path


def color_mask(label):
    return np.array([*COLORS, IGNORED], np.uint8)[label]


def make_tree(folder, tiles=("Tile 1", "Tile 2"), parts=("a", "b")):
    for tile in tiles:
        for part in parts:
            save(folder / tile / "images" / f"{part}.jpg", np.full((6, 8, 3), 90))
            save(folder / tile / "masks" / f"{part}.png", color_mask(np.zeros((6, 8), int)))
    return folder


def record(tmp_path, mask, image=None):
    image = np.zeros((2, 3, 3)) if image is None else image
    return FolderRecord(save(tmp_path / "i.png", image), save(tmp_path / "m.png", mask), "i.png")


LABEL = np.array([[0, 1, 2], [3, 0, 1]])  # 3 is drawn with the ignored colour


def test_layout_gives_the_facts_of_the_dataset(tmp_path):
    layout = read(
        tmp_path, color_layout(name="Town", license="cc0-1.0", citation="Someone 2020", description="Roofs.")
    )
    facts = layout.facts("folder name")
    assert facts.id2label == {0: "land", 1: "building", 2: "tree"}
    assert [list(c.color) for c in facts.classes] == COLORS
    assert (facts.name, facts.license, facts.citation, facts.description) == (
        "Town",
        "cc0-1.0",
        "Someone 2020",
        "Roofs.",
    )
    assert read(tmp_path, color_layout()).facts("folder name").name == "folder name"
    assert read(tmp_path, color_layout()).license is None


def test_pixels_stay_at_home_if_the_layout_says_so(tmp_path):
    assert read(tmp_path, color_layout()).facts("x").may_be_shared is True
    assert read(tmp_path, color_layout(may_be_shared=False)).facts("x").may_be_shared is False


def test_index_layout_may_name_the_colour_to_draw_with(tmp_path):
    layout = read(tmp_path, value_layout())
    assert layout.codes == (2, 700)
    assert layout.classes[1].color == (1, 2, 3)
    assert len({c.color for c in layout.classes}) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "not valid YAML"),
        ("just text", "expected the keys"),
        (color_layout(masks=None), "masks is missing"),
        (color_layout(classes=None), "classes is missing"),
        ({**color_layout(), "clases": 1}, "unknown key 'clases'; nearest: classes"),
        (color_layout(splits={"val": ["a"]}), "unknown split 'val'; nearest: validation"),
        (color_layout(splits={}), "splits is {}"),
        (color_layout(splits={"train": []}), "split train is"),
        (color_layout(splits={"train": [3]}), "split train: 3 is not a pattern"),
        (color_layout(images=["a"]), "images is"),
        (color_layout(images="../other/*.jpg"), "leaves the source folder"),
        (color_layout(images="/data/*.jpg"), "must be relative"),
        (color_layout(masks="C:/data/*.png"), "must be relative"),
        (color_layout(splits={"train": ["../*"]}), "leaves the source folder"),
        (color_layout(classes=[]), "classes must be a list"),
        (color_layout(classes=[{"name": "a"}]), "class a has neither color nor value"),
        (color_layout(classes=[{"name": "a", "colour": [1, 2, 3]}]), "unknown key 'colour'; nearest: color"),
        (color_layout(classes=[{"name": "a", "color": [1, 2, 300]}]), r"class a: \[1, 2, 300\] is not a colour"),
        (color_layout(classes=[{"name": "a", "color": [1, 2]}]), "is not a colour"),
        (color_layout(classes=[{"name": "a", "value": -1}]), "-1 is not a mask value"),
        (color_layout(classes=[{"name": True, "value": 1}]), "class name True is not text"),
        (color_layout(classes=[{"name": "a", "value": 1}, {"name": "b", "color": [1, 2, 3]}]), "class b has no value"),
        (color_layout(classes=[{"name": "a", "value": 1}, {"name": "b", "value": 1}], ignore=[]), "have the value 1"),
        (color_layout(classes=[{"name": "a", "value": 1}, {"name": "a", "value": 2}], ignore=[]), "have the name a"),
        (color_layout(ignore=[COLORS[1]]), "60,16,152 is both a class and in ignore"),
        (color_layout(ignore=[7]), "ignore: 7 is not a colour"),
        (color_layout(ignore=3), "ignore is 3"),
        (color_layout(license=3), "license is 3"),
        (color_layout(may_be_shared="no"), "may_be_shared is 'no'"),
    ],
)
def test_wrong_layout_is_refused_in_one_line_that_names_the_file(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, content)
    assert "layout.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_layout_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.yaml: cannot be read"):
        read_layout(tmp_path / "nowhere.yaml")


def test_images_pair_with_masks_by_folder_and_stem(tmp_path):
    make_tree(tmp_path / "source", tiles=("Tile 1", "Tile 2", "Tile 10"))
    layout = read(tmp_path, color_layout(splits={"train": ["Tile 1/*"], "test": ["Tile 2/*", "Tile 10/*"]}))
    records = find_pairs(layout, tmp_path / "source")
    assert [r.name for r in records["train"]] == ["Tile 1/images/a.jpg", "Tile 1/images/b.jpg"]
    assert [r.name.split("/")[0] for r in records["test"]] == ["Tile 10", "Tile 10", "Tile 2", "Tile 2"]
    for r in records["train"] + records["test"]:
        assert r.mask == r.image.parents[1] / "masks" / f"{r.image.stem}.png"
        assert r.mask.is_file()


@pytest.mark.parametrize(
    ("images", "masks", "image", "mask"),
    [
        ("top/*_RGB.tif", "labels/*_label.tif", "top/p_2_10_RGB.tif", "labels/p_2_10_label.tif"),
        ("top/*", "labels/*", "top/x.v2.jpg", "labels/x.v2.png"),
        ("top/*.*", "labels/*.png", "top/x.jpg", "labels/x.png"),
        ("**/*.jpg", "masks/**/*.png", "a/b/x.jpg", "masks/a/b/x.png"),
        ("*.png", "*_mask.png", "x.png", "x_mask.png"),
        ("area?/*.[jt][pi][gf]", "gt?/*.tif", "area1/x.jpg", "gt1/x.tif"),
    ],
)
def test_patterns_pair_by_what_their_wildcards_match(tmp_path, images, masks, image, mask):
    save(tmp_path / "s" / image, np.zeros((2, 2, 3)))
    save(tmp_path / "s" / mask, np.zeros((2, 2, 3)))
    layout = read(tmp_path, color_layout(images=images, masks=masks, splits={"train": ["*"]}))
    (found,) = find_pairs(layout, tmp_path / "s")["train"]
    assert (found.name, found.mask) == (image, tmp_path / "s" / mask)


def test_hidden_files_are_no_images(tmp_path):
    # Archives made on a Mac hold a "._name.jpg" beside each file; it is not an image.
    source = make_tree(tmp_path / "source")
    (source / "Tile 1" / "images" / "._a.jpg").write_bytes(b"resource fork")
    assert len(find_pairs(read(tmp_path, color_layout()), source)["train"]) == 2


def test_name_that_is_not_utf8_is_refused(tmp_path):
    # The error came from the writer of the parquet files, after the images had been decoded.
    source = make_tree(tmp_path / "source")
    for kind, ending in (("images", "jpg"), ("masks", "png")):
        name = os.fsencode(source / "Tile 2" / kind) + b"/gr\xf6n." + ending.encode()
        try:
            os.rename(source / "Tile 2" / kind / f"b.{ending}", name)
        except OSError:
            pytest.skip("this file system takes no such name")
    with pytest.raises(UserError, match=r"the name of Tile 2/images/gr\\udcf6n.jpg is not UTF-8; rename"):
        find_pairs(read(tmp_path, color_layout()), source)


def test_image_without_a_mask_is_refused(tmp_path):
    source = make_tree(tmp_path / "source")
    (source / "Tile 2" / "masks" / "b.png").unlink()
    with pytest.raises(UserError, match=r"no mask .* for 1 image\(s\): Tile 2/images/b.jpg"):
        find_pairs(read(tmp_path, color_layout()), source)


def test_mask_without_an_image_is_said(tmp_path, capsys):
    # It was a warning of Python, with the file and line of the code.
    source = make_tree(tmp_path / "source")
    (source / "Tile 2" / "images" / "b.jpg").unlink()
    assert len(find_pairs(read(tmp_path, color_layout()), source)["test"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("Tile 2/masks/b.png; not used")


def test_image_in_no_split_is_refused(tmp_path):
    source = make_tree(tmp_path / "source", tiles=("Tile 1", "Tile 2", "Tile 3"))
    with pytest.raises(UserError, match=r"no split takes 2 image\(s\): Tile 3/images/a.jpg, Tile 3/images/b.jpg"):
        find_pairs(read(tmp_path, color_layout()), source)


def test_image_in_two_splits_is_refused(tmp_path):
    source = make_tree(tmp_path / "source")
    layout = read(tmp_path, color_layout(splits={"train": ["*"], "test": ["Tile 2/images/a*"]}))
    with pytest.raises(UserError, match=r"more than one split takes 1 image\(s\): Tile 2/images/a.jpg"):
        find_pairs(layout, source)


def test_empty_split_is_refused(tmp_path):
    source = make_tree(tmp_path / "source")
    layout = read(tmp_path, color_layout(splits={"train": ["*"], "validation": ["Tile 9/*"]}))
    with pytest.raises(UserError, match=r"split validation \(Tile 9/\*\) has none of the 4 images"):
        find_pairs(layout, source)


def test_no_images_and_no_folder_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no image matches '\*/images/\*.jpg'"):
        find_pairs(read(tmp_path, color_layout()), tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: is not a folder"):
        find_pairs(read(tmp_path, color_layout()), tmp_path / "nowhere")


def test_two_images_for_one_mask_are_refused(tmp_path):
    source = make_tree(tmp_path / "source")
    save(source / "Tile 1" / "images" / "a.png", np.zeros((6, 8, 3)))
    with pytest.raises(UserError, match="a.jpg and Tile 1/images/a.png are both the image of one pair"):
        find_pairs(read(tmp_path, color_layout(images="*/images/*")), source)


def test_patterns_with_different_wildcards_are_refused(tmp_path):
    source = make_tree(tmp_path / "source")
    with pytest.raises(UserError, match="have 2 and 1 wildcards"):
        find_pairs(read(tmp_path, color_layout(masks="masks/*.png")), source)


@pytest.mark.parametrize("linked", ["images", "images/b.jpg"])
def test_link_that_leaves_the_source_folder_is_refused(tmp_path, linked):
    source, outside = make_tree(tmp_path / "source"), make_tree(tmp_path / "outside")
    target = source / "Tile 1" / linked
    target.rename(tmp_path / "moved")
    target.symlink_to(outside / "Tile 1" / linked)
    with pytest.raises(UserError, match="is a link that leaves"):
        find_pairs(read(tmp_path, color_layout()), source)


def test_colour_mask_becomes_labels(tmp_path):
    layout = read(tmp_path, color_layout())
    pixels = np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8)
    image, label, report = read_pair(record(tmp_path, color_mask(LABEL), pixels), layout)
    assert (image == pixels).all()
    assert label.tolist() == [[0, 1, 2], [255, 0, 1]]
    assert (image.dtype, label.dtype, report) == (np.uint8, np.uint8, {})


def test_palette_mask_is_read_by_its_colours(tmp_path):
    # Some masks of the Dubai imagery are palette PNGs whose indices have nothing to do with the classes.
    mask = Image.fromarray(np.array([2, 0, 3, 1], np.uint8)[LABEL], mode="P")
    mask.putpalette([*COLORS[1], *IGNORED, *COLORS[0], *COLORS[2]])  # index 0 is class 1, 1 ignored, 2 is 0, 3 is 2
    found = record(tmp_path, mask)
    assert Image.open(found.mask).mode == "P"
    assert read_pair(found, read(tmp_path, color_layout()))[1].tolist() == [[0, 1, 2], [255, 0, 1]]


def test_alpha_channel_of_a_colour_mask_is_not_read(tmp_path):
    mask = np.dstack([color_mask(LABEL), np.full(LABEL.shape, 128)])
    assert read_pair(record(tmp_path, mask), read(tmp_path, color_layout()))[1].tolist() == [[0, 1, 2], [255, 0, 1]]


@pytest.mark.parametrize(("dtype", "ending"), [(np.uint16, "png"), (np.uint16, "tif"), (np.int32, "tif")])
def test_index_mask_with_large_values_becomes_labels(tmp_path, dtype, ending):
    mask = Image.fromarray(np.array([[2, 700, 0], [2, 2, 700]], dtype))
    found = FolderRecord(save(tmp_path / "i.png", np.zeros((2, 3, 3))), save(tmp_path / f"m.{ending}", mask), "i")
    label = read_pair(found, read(tmp_path, value_layout()))[1]
    assert label.tolist() == [[0, 1, 255], [0, 0, 1]]


def test_index_of_a_palette_mask_is_its_value(tmp_path):
    mask = Image.fromarray(np.array([[2, 0, 2], [0, 0, 0]], np.uint8), mode="P")
    mask.putpalette([9, 9, 9] * 4)
    label = read_pair(record(tmp_path, mask), read(tmp_path, value_layout()))[1]
    assert label.tolist() == [[0, 255, 0], [255, 255, 255]]


def test_unknown_colours_are_named_with_their_pixels_most_frequent_first(tmp_path):
    mask = color_mask(LABEL)
    mask[0, :2], mask[1, 2] = (1, 2, 3), (0, 0, 0)
    found, layout = record(tmp_path, mask), read(tmp_path, color_layout())
    with pytest.raises(UserError, match="m.png: 2 colours .*: 1,2,3: 2, 0,0,0: 1; .* --unknown ignore"):
        read_pair(found, layout)
    _, label, report = read_pair(found, layout, unknown="ignore")
    assert label.tolist() == [[255, 255, 2], [255, 0, 255]]
    assert report == {"1,2,3": 2, "0,0,0": 1}


def test_at_most_ten_unknown_colours_are_listed(tmp_path):
    mask = np.stack([np.arange(24).reshape(4, 6)] * 3, axis=-1)  # 24 greys, one pixel each
    with pytest.raises(UserError, match="24 colours") as error:
        read_pair(record(tmp_path, mask, np.zeros((4, 6, 3))), read(tmp_path, color_layout()))
    assert str(error.value).count(": 1") == 10
    assert "and 14 more" in str(error.value)


def test_unknown_values_of_an_index_mask_are_named(tmp_path):
    found, layout = record(tmp_path, np.array([[2, 9, 9], [2, 2, 0]])), read(tmp_path, value_layout())
    with pytest.raises(UserError, match="1 values .*: 9: 2;"):
        read_pair(found, layout)
    assert read_pair(found, layout, unknown="ignore")[2] == {"9": 2}


def test_wrong_choice_for_unknown_is_refused(tmp_path):
    with pytest.raises(UserError, match="unknown is 'skip'"):
        read_pair(record(tmp_path, color_mask(LABEL)), read(tmp_path, color_layout()), unknown="skip")


@pytest.mark.parametrize("value", [-1, 70000])
def test_index_out_of_range_is_refused_even_when_unknown_values_are_ignored(tmp_path, value):
    found = FolderRecord(
        save(tmp_path / "i.png", np.zeros((2, 3, 3))),
        save(tmp_path / "m.tif", Image.fromarray(np.full((2, 3), value, np.int32))),
        "i.png",
    )
    with pytest.raises(UserError, match=f"m.tif: mask values go from {value} to {value}"):
        read_pair(found, read(tmp_path, value_layout()), unknown="ignore")


def test_mask_of_another_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="m.png: is 3x2 but its image is 4x2 pixels"):
        read_pair(record(tmp_path, color_mask(LABEL), np.zeros((2, 4, 3))), read(tmp_path, color_layout()))


def test_mask_of_the_wrong_kind_is_refused(tmp_path):
    with pytest.raises(UserError, match="m.png: has mode RGB, but the layout gives values"):
        read_pair(record(tmp_path, color_mask(LABEL)), read(tmp_path, value_layout()))
    mask = Image.fromarray(np.zeros((2, 3), np.uint16))
    with pytest.raises(UserError, match="m.png: has mode I;16, but the layout gives colours"):
        read_pair(record(tmp_path, mask), read(tmp_path, color_layout()))


def test_sixteen_bit_image_is_refused_and_not_clipped(tmp_path):
    found = record(tmp_path, color_mask(LABEL), Image.fromarray(np.full((2, 3), 3000, np.uint16)))
    with pytest.raises(UserError, match="i.png: has mode I;16; convert the image to 8-bit RGB"):
        read_pair(found, read(tmp_path, color_layout()))


def with_alpha(mode):
    """An image of 2 x 3 pixels of a mode with the first pixel fully and the second half transparent."""
    if mode in ("RGBA", "LA"):
        pixels = np.full((2, 3, len(mode)), 90, np.uint8)
        pixels[..., -1] = [[0, 128, 255], [255, 255, 255]]
        return Image.fromarray(pixels, mode=mode)
    image = Image.fromarray(np.array([[7, 8, 9], [9, 9, 9]], np.uint8), mode="P")
    image.putpalette([90] * 3 * 10)
    image.info["transparency"] = bytes([255] * 7 + [0, 128, 255])
    return image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_ignored_and_black(tmp_path, mode):
    found = record(tmp_path, color_mask(LABEL), with_alpha(mode))
    image, label, _ = read_pair(found, read(tmp_path, color_layout()))
    assert label.tolist() == [[255, 1, 2], [255, 0, 1]]
    assert image[0, 0].tolist() == [0, 0, 0]
    assert (image.reshape(-1, 3)[1:] == 90).all()


def geotiff(path, pixels, **options):
    height, width, count = pixels.shape
    place = {"crs": "EPSG:25832", "transform": Affine(0.5, 0, 300000, 0, -0.5, 5800000)}
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=count, dtype="uint8", **place, **options
    ) as file:
        file.write(pixels.transpose(2, 0, 1))
    return path


def test_geotiff_keeps_its_bands_and_its_place_and_no_data_is_ignored(tmp_path):
    pixels = np.random.default_rng(0).integers(1, 256, (2, 3, 5), np.uint8)
    pixels[1, 2] = 0
    mask = save(tmp_path / "m.png", color_mask(LABEL))
    found = FolderRecord(geotiff(tmp_path / "i.tif", pixels, nodata=0), mask, "i.tif")
    reader = folder_reader(read(tmp_path, color_layout()), {"train": [found]})
    assert reader.bands == ("red", "green", "blue", "near_infrared", "band_5")
    header, source = reader.header(found), reader.read(found)
    assert (header.name, header.height, header.width, header.georeferenced) == ("i.tif", 2, 3, True)
    assert (source.image == pixels).all()
    assert source.label.tolist() == [[0, 1, 2], [255, 0, 255]]
    assert (source.crs, source.transform) == ("EPSG:25832", (0.5, 0, 300000, 0, -0.5, 5800000))


def test_bands_have_the_names_that_the_layout_gives(tmp_path):
    layout = read(tmp_path, color_layout(bands=["near_infrared", "red", "green"]))
    assert folder_reader(layout, {}).bands == ("near_infrared", "red", "green")


def test_fourth_band_that_is_marked_as_alpha_is_data_where_the_layout_names_it(tmp_path):
    # GDAL marks the fourth band of new files as alpha; the infrared of RGBIR imagery would then decide what has data.
    pixels = np.random.default_rng(0).integers(0, 2, (2, 3, 4), np.uint8)
    mask = save(tmp_path / "m.png", color_mask(LABEL))
    found = FolderRecord(geotiff(tmp_path / "i.tif", pixels, photometric="rgb", alpha="yes"), mask, "i.tif")
    named = read(tmp_path, color_layout(bands=["red", "green", "blue", "near_infrared"]))
    source = folder_reader(named, {"train": [found]}).read(found)
    assert (source.image == pixels).all()
    assert source.label.tolist() == [[0, 1, 2], [255, 0, 1]]
    source = folder_reader(read(tmp_path, color_layout()), {"train": [found]}).read(found)
    assert source.image.shape == (2, 3, 3)
    assert (source.label[pixels[..., 3] == 0] == 255).all()


def test_images_of_different_bands_are_refused(tmp_path):
    mask = save(tmp_path / "m.png", color_mask(LABEL))
    found = FolderRecord(
        geotiff(tmp_path / "i.tif", np.ones((2, 3, 4), np.uint8), photometric="minisblack"), mask, "i.tif"
    )
    with pytest.raises(UserError, match=r"i.tif: has 4 bands, but the dataset has 3 \(red, green, blue\)"):
        FolderReader(read(tmp_path, color_layout())).header(found)


def test_header_knows_size_and_changes_with_the_files(tmp_path):
    reader, found = FolderReader(read(tmp_path, color_layout())), record(tmp_path, color_mask(LABEL))
    header = reader.header(found)
    assert (header.name, header.height, header.width, header.labelled, header.georeferenced) == (
        "i.png", 2, 3, True, False,
    )  # fmt: skip
    assert reader.header(found) == header
    for path in (found.image, found.mask):
        os.utime(path, ns=(1, path.stat().st_mtime_ns + 1))
        assert reader.header(found).identity != header.identity
        header = reader.header(found)


def test_header_changes_with_a_world_file(tmp_path):
    # One that changed between a killed conversion and the next start was not seen: half of the tiles kept the old place.
    found = FolderRecord(
        save(tmp_path / "i.tif", np.zeros((2, 3, 3))), save(tmp_path / "m.png", color_mask(LABEL)), "i"
    )
    headers = []
    for place in ("", "1\n0\n0\n-1\n100.5\n199.5\n", "1\n0\n0\n-1\n200.5\n199.5\n"):
        if place:
            (tmp_path / "i.tfw").write_text(place)
        headers.append(FolderReader(read(tmp_path, color_layout())).header(found))
    assert len({header.identity for header in headers}) == 3
    assert [header.georeferenced for header in headers] == [False, True, True]


def test_header_refuses_what_can_be_seen_without_decoding(tmp_path):
    reader = FolderReader(read(tmp_path, color_layout()))
    with pytest.raises(UserError, match="m.png: is 3x2 but its image is 4x2 pixels"):
        reader.header(record(tmp_path, color_mask(LABEL), np.zeros((2, 4, 3))))
    with pytest.raises(UserError, match="m.png: has mode I;16"):
        reader.header(record(tmp_path, Image.fromarray(np.zeros((2, 3), np.uint16))))
    (tmp_path / "i.png").write_text("hello")
    with pytest.raises(UserError, match="i.png: cannot be read"):
        reader.header(FolderRecord(tmp_path / "i.png", tmp_path / "m.png", "i"))


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
@pytest.mark.parametrize("which", ["image", "mask"])
def test_truncated_file_is_refused_by_name(tmp_path, which, ending):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    found = FolderRecord(save(tmp_path / f"i.{ending}", noise), save(tmp_path / f"m.{ending}", noise), "i")
    broken = getattr(found, which)
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    with pytest.raises(UserError, match=f"{broken.name}: (cannot be read as an image|is cut short)"):
        read_pair(found, read(tmp_path, color_layout()))


def test_file_that_is_no_image_is_refused_by_name(tmp_path):
    found = record(tmp_path, color_mask(LABEL))
    found.image.write_text("hello")
    with pytest.raises(UserError, match="i.png: cannot be read as an image"):
        read_pair(found, read(tmp_path, color_layout()))


def test_pillows_limit_stops_no_orthophoto_and_stays_as_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2)  # 6 pixels are three times the limit: an error in plain Pillow
    found = record(tmp_path, color_mask(LABEL))
    with pytest.raises(Image.DecompressionBombError):
        Image.open(found.image)
    assert read_pair(found, read(tmp_path, color_layout()))[1].shape == (2, 3)
    assert Image.MAX_IMAGE_PIXELS == 2
    found.image.write_text("hello")
    with pytest.raises(UserError):
        read_pair(found, read(tmp_path, color_layout()))
    assert Image.MAX_IMAGE_PIXELS == 2
