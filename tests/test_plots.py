import numpy as np
import pytest
from PIL import Image

from drd_hf.errors import UserError
from drd_hf.plots import BAR_COLORS, BLUE, LONGEST_BAR, bars_picture, confusion_picture, error_map, errors_picture

NAMES = ["ground", "building", "tree"]
COLORS = [(200, 200, 200), (0, 0, 255), (0, 255, 0)]


def test_a_perfect_class_has_a_full_cell_and_a_class_that_is_absent_an_empty_row(tmp_path):
    perfect = confusion_picture([[5, 0, 0], [0, 7, 0], [0, 0, 0]], NAMES, "t", tmp_path / "a.png")
    pixels = np.asarray(Image.open(perfect)).reshape(-1, 3)
    full = (pixels == BLUE).all(1).sum()
    half = confusion_picture([[5, 0, 0], [7, 7, 0], [0, 0, 0]], NAMES, "t", tmp_path / "b.png")
    pixels = np.asarray(Image.open(half)).reshape(-1, 3)
    assert full > 2 * 2000 and (pixels == BLUE).all(1).sum() == pytest.approx(full / 2, rel=0.1)
    middle = np.rint((255 + np.array(BLUE)) / 2)  # two cells of one half each
    assert (np.abs(pixels - middle) <= 1).all(1).sum() == pytest.approx(full, rel=0.1)


def test_bars_are_as_long_as_their_scores(tmp_path):
    scores = {"IoU": [1.0, 0.5, float("nan")], "F1": [0.25, 0.0, float("nan")]}
    path = bars_picture(scores, NAMES, COLORS, "a title", tmp_path / "new" / "bars.png")
    pixels = np.asarray(Image.open(path))
    longest = {
        color: max(int((row == color).all(1).sum()) for row in pixels) for color in (BAR_COLORS[0], BAR_COLORS[1])
    }
    assert longest[BAR_COLORS[0]] == pytest.approx(LONGEST_BAR, abs=1)
    assert longest[BAR_COLORS[1]] == pytest.approx(LONGEST_BAR / 4, abs=1)


def test_errors_are_red_and_ignored_pixels_black():
    image = np.full((1, 4, 3), (0, 100, 200), np.uint8)
    reference, prediction = np.array([[0, 1, 2, 255]], np.uint8), np.array([[0, 2, 2, 1]], np.uint8)
    drawn = error_map(image, reference, prediction)
    assert drawn[0, 1].tolist() == [255, 0, 0] and drawn[0, 3].tolist() == [0, 0, 0]
    assert drawn[0, 0].tolist() == drawn[0, 2].tolist() == [177, 177, 177]


def test_a_large_image_is_shown_smaller(tmp_path):
    size = (900, 3000)
    image = np.zeros((*size, 3), np.uint8)
    path = errors_picture(
        image,
        np.zeros(size, np.uint8),
        np.ones(size, np.uint8),
        COLORS,
        dict(enumerate(NAMES)),
        "x",
        tmp_path / "a.png",
    )
    with Image.open(path) as picture:
        assert picture.width < 3000 and picture.width > 4 * picture.height


def test_what_does_not_fit_together_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"matrix of shape \(2, 2\) for 3 class names"):
        confusion_picture([[1, 2], [3, 4]], NAMES, "t", tmp_path / "a.png")
    with pytest.raises(UserError, match="a name, a colour and values for every class"):
        bars_picture({"IoU": [1, 2]}, NAMES, COLORS, "t", tmp_path / "a.png")
    with pytest.raises(UserError, match="a reference of"):
        maps = np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)
        errors_picture(np.zeros((2, 2, 3), np.uint8), *maps, COLORS, dict(enumerate(NAMES)), "x", tmp_path / "a.png")
