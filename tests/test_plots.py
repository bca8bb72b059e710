import numpy as np
import pytest
from PIL import Image

from drd_hf.errors import UserError
from drd_hf.plots import (
    BAR_COLORS,
    BLUE,
    CURVE_COLORS,
    LONGEST_BAR,
    PANEL,
    bars_picture,
    confusion_picture,
    curves_picture,
    error_map,
    errors_picture,
)

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


def rows_and_columns(path, color):
    """Where the pixels of a colour are in the panel, as shares of its height from below and of its width."""
    pixels = np.asarray(Image.open(path)).astype(int)
    frame = np.argwhere((pixels == (150, 150, 150)).all(2))
    (top, left), (bottom, right) = frame.min(0), frame.max(0)
    inside = np.argwhere((np.abs(pixels[top : bottom + 1, left : right + 1] - color) <= 20).all(2))
    return 1 - inside[:, 0] / (bottom - top), inside[:, 1] / (right - left)


def test_curves_go_through_their_points(tmp_path):
    curves = {"falling": [(0, 8.0), (50, 4.0), (100, 4.0)], "level": [(0, 2.0), (100, 2.0)]}
    path = curves_picture({"Loss": curves}, "step", "a title", tmp_path / "new" / "a.png")  # up to 10
    heights, places = rows_and_columns(path, CURVE_COLORS[0])
    assert heights.max() == pytest.approx(8 / 10, abs=0.02) and heights.min() == pytest.approx(4 / 10, abs=0.02)
    assert np.median(heights[np.abs(places - 0.25) < 0.01]) == pytest.approx(6 / 10, abs=0.02)
    heights, places = rows_and_columns(path, CURVE_COLORS[1])
    assert heights == pytest.approx(np.full(len(heights), 2 / 10), abs=0.02)
    assert (places.min(), places.max()) == pytest.approx((0, 1), abs=0.02)


def test_a_value_that_is_not_finite_is_a_gap_and_a_point_alone_is_seen(tmp_path):
    curve = [(0, 1.0), (30, 1.0), (60, float("nan")), (100, 1.0)]
    _, places = rows_and_columns(curves_picture({"x": {"y": curve}}, "step", "t", tmp_path / "a.png"), CURVE_COLORS[0])
    assert not ((places > 0.32) & (places < 0.98)).any() and (places < 0.32).any() and (places > 0.98).any()


def test_each_panel_has_its_own_scale(tmp_path):
    panels = {"Loss": {"a": [(0, 400.0), (10, 400.0)]}, "mIoU": {"b": [(0, 0.4), (10, 0.4)]}}
    with Image.open(curves_picture(panels, "step", "t", tmp_path / "a.png")) as picture:
        assert picture.height > 2 * PANEL[1]
        lines = (np.asarray(picture) == CURVE_COLORS[0]).all(2).sum(1) > 0.9 * PANEL[0]
        assert 2 <= lines.sum() <= 6  # both are drawn, at the height of their panel


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
    with pytest.raises(UserError, match="curves need points"):
        curves_picture({"Loss": {"loss": []}}, "step", "t", tmp_path / "a.png")
    with pytest.raises(UserError, match="a reference of"):
        maps = np.zeros((2, 2), np.uint8), np.zeros((2, 3), np.uint8)
        errors_picture(np.zeros((2, 2, 3), np.uint8), *maps, COLORS, dict(enumerate(NAMES)), "x", tmp_path / "a.png")
