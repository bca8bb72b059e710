import numpy as np
import pytest
from PIL import Image, ImageFont

from drd_hf.data.preview import PreviewTile
from drd_hf.errors import UserError
from drd_hf.pictures import _legend_text, colorize, comparison_picture, contact_sheet, overlay, shortened, wrap_text

COLORS = [(255, 255, 255), (0, 0, 255), (250, 10, 20)]
ID2LABEL = {0: "impervious_surface", 1: "building", 2: "car"}
BLUE, PINK = (0, 0, 255), (255, 0, 255)


def color_count(picture, color):
    return int((np.asarray(picture) == color).all(-1).sum())


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_every_label_gets_the_colour_of_its_class(dtype):
    drawn = colorize(np.array([[0, 1], [2, 255]], dtype), COLORS)
    assert drawn.dtype == np.uint8
    assert drawn.tolist() == [[[255, 255, 255], [0, 0, 255]], [[250, 10, 20], [0, 0, 0]]]


def test_ignored_pixels_get_the_colour_that_is_asked_for():
    assert colorize(np.array([[255]]), COLORS, ignore_color=(1, 2, 3)).tolist() == [[[1, 2, 3]]]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (np.array([[0, 3, 7]]), "contains 3, 7, but there are 3 colours"),
        (np.array([[-1]]), "contains -1"),
        (np.zeros((1, 2, 2), int), "integers"),
        (np.zeros((2, 2)), "float64"),
    ],
)
def test_what_is_no_label_map_is_refused(label, message):
    with pytest.raises(UserError, match=message):
        colorize(label, COLORS)


def test_a_picture_shows_every_cell_and_a_legend(tmp_path):
    image = np.full((32, 32, 3), PINK, np.uint8)
    path = comparison_picture(
        [[image, np.ones((32, 32), np.uint8)]],
        ["image", "reference"],
        COLORS,
        ID2LABEL,
        tmp_path / "new" / "a.png",
        64,
    )
    assert path == tmp_path / "new" / "a.png"
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        assert color_count(picture, PINK) == 64 * 64
        assert 64 * 64 < color_count(picture, BLUE) < 64 * 64 + 400  # the cell, and the swatch of the legend
        assert color_count(picture, COLORS[2]) > 200  # a class that the picture does not show is in the legend too
        assert color_count(picture, (0, 0, 0)) == 0


def test_ignored_is_in_the_legend_only_where_a_label_map_has_ignored_pixels(tmp_path):
    label = np.ones((32, 32), np.uint8)
    label[:16] = 255
    with Image.open(comparison_picture([[label]], ["x"], COLORS, ID2LABEL, tmp_path / "a.png", 64)) as picture:
        assert color_count(picture, (0, 0, 0)) > 64 * 32 + 200
    # dark pixels of an image are no ignored pixels
    dark = np.full((32, 32, 3), 255, np.uint8)
    with Image.open(comparison_picture([[dark]], ["x"], COLORS, ID2LABEL, tmp_path / "b.png", 64)) as picture:
        assert color_count(picture, (0, 0, 0)) == 0


def test_label_maps_are_scaled_without_new_colours_and_keep_their_aspect_ratio(tmp_path):
    label = np.zeros((10, 40), np.uint8)
    label[:, ::2] = 1
    with Image.open(comparison_picture([[label]], ["x"], COLORS, ID2LABEL, tmp_path / "a.png", 60)) as picture:
        cell = np.asarray(picture)[12 + 22 :][:15, 12 : 12 + 60]  # 40 x 10 in a cell of 60 is 60 x 15
    assert {tuple(pixel) for pixel in cell.reshape(-1, 3).tolist()} == {COLORS[0], COLORS[1]}


def test_long_titles_are_wrapped_to_their_column():
    font = ImageFont.load_default(16)
    title = "student distilled with spatial and channel relations"
    lines = wrap_text(title, font, 128)
    assert " ".join(lines) == title
    assert len(lines) > 1 and all(font.getlength(line) <= 128 for line in lines)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "nothing to draw"),
        ([[np.zeros((4, 4), int)]], "row 0 has 1 pictures for 2 titles"),
        ([[np.zeros((4, 4), int), np.zeros((4, 4, 3))]], "row 0, reference: expected.*float64"),
        ([[np.zeros((4, 4), int), np.full((4, 4), 9)]], "row 0, reference: the label map contains 9"),
    ],
)
def test_rows_that_cannot_be_drawn_are_refused_and_nothing_is_written(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        comparison_picture(rows, ["image", "reference"], COLORS, ID2LABEL, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_every_class_needs_a_colour(tmp_path):
    with pytest.raises(UserError, match="2 colours for 3 class names"):
        comparison_picture([[np.zeros((4, 4), int)]], ["x"], COLORS[:2], ID2LABEL, tmp_path / "a.png")


def test_only_the_picture_is_left_in_its_folder(tmp_path):
    for _ in range(2):  # the second one replaces the first
        comparison_picture([[np.zeros((4, 4), int)]], ["x"], COLORS, ID2LABEL, tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_overlay_is_half_image_and_half_colour_and_ignored_pixels_are_grey_stripes():
    image = np.full((16, 16, 3), (100, 40, 0), np.uint8)
    label = np.ones((16, 16), np.uint8)
    label[8:] = 255
    drawn = overlay(image, label, COLORS)
    assert (drawn[:8] == (50, 20, 127)).all()
    greys = {tuple(pixel) for pixel in drawn[8:].reshape(-1, 3).tolist()}
    assert greys == {(60, 60, 60), (170, 170, 170)}


def tile(label, caption="a.tif (0, 0)"):
    return PreviewTile(np.full((32, 32, 3), PINK, np.uint8), label, caption)


def test_a_contact_sheet_shows_every_tile_beside_its_overlay(tmp_path):
    tiles = [tile(np.ones((32, 32), np.uint8)) for _ in range(5)]
    path = contact_sheet(tiles, "two words", COLORS, ID2LABEL, {"building": 0.5}, tmp_path / "new" / "a.png", 64)
    with Image.open(path) as picture:
        assert color_count(picture, PINK) == 5 * 64 * 64
        assert color_count(picture, (127, 0, 255)) == 5 * 64 * 64  # half pink, half blue
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_a_tile_without_labels_stands_beside_an_empty_cell(tmp_path):
    with Image.open(contact_sheet([tile(None)], "x", COLORS, ID2LABEL, {}, tmp_path / "a.png", 64)) as picture:
        assert color_count(picture, PINK) == 64 * 64
        assert color_count(picture, (127, 0, 255)) == 0


def test_ignored_pixels_are_hatched_on_the_sheet_not_in_the_tile(tmp_path):
    # A tile of 1024 pixels is shrunk to its cell; stripes drawn before would be a grey blur.
    large = PreviewTile(np.zeros((512, 512, 3), np.uint8), np.full((512, 512), 255, np.uint8), "x")
    with Image.open(contact_sheet([large], "x", COLORS, ID2LABEL, {}, tmp_path / "a.png", 64)) as picture:
        dark, light = color_count(picture, (60, 60, 60)), color_count(picture, (170, 170, 170))
    assert 64 * 64 < dark + light < 64 * 64 + 500 and 0.3 < dark / (dark + light) < 0.45


def test_shares_stand_in_the_legend():
    shares = {"a": 0.5, "b": 0.0004, "c": 0.0}
    assert [_legend_text(name, shares) for name in "abcd"] == ["a 50.0%", "b <0.1%", "c 0.0%", "d"]


def test_long_captions_keep_the_place_of_the_tile():
    font = ImageFont.load_default(12)
    short = shortened("a/very/long/path/of/an/image/that/does/not/fit.tif (512, 1024)", font, 150)
    assert short.startswith("…") and short.endswith("(512, 1024)") and font.getlength(short) <= 150
    assert shortened("x", font, 150) == "x"


def test_a_sheet_that_cannot_be_drawn_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(UserError, match="no tiles"):
        contact_sheet([], "x", COLORS, ID2LABEL, {}, tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.tif \(0, 0\): the label map contains 9"):
        contact_sheet([tile(np.full((4, 4), 9))], "x", COLORS, ID2LABEL, {}, tmp_path / "a.png")
    assert not list(tmp_path.iterdir())
