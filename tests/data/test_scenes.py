import math
import time

import numpy as np
import pytest

from drd_hf.data.facts import ISPRS_CLASSES
from drd_hf.data.scenes import BUILDING, SCENES, Canvas, _majority, _photograph, _shadows, generate_scene
from drd_hf.errors import UserError


@pytest.fixture(scope="module")
def scenes():
    return [generate_scene(seed) for seed in range(12)]


def mean_iou(prediction, reference):
    """Mean over the six classes of |P and R| / |P or R|."""
    ious = [
        ((prediction == k) & (reference == k)).sum() / ((prediction == k) | (reference == k)).sum() for k in range(6)
    ]
    return float(np.mean(ious))


def test_the_facts_name_the_isprs_classes_and_say_that_scenes_are_generated():
    assert SCENES.classes == ISPRS_CLASSES
    assert SCENES.name == "scenes" and SCENES.license == "apache-2.0" and "enerated" in SCENES.description


def test_the_same_seed_gives_the_same_scene(scenes):
    image, label = generate_scene(5)
    np.testing.assert_array_equal(image, scenes[5][0])
    np.testing.assert_array_equal(label, scenes[5][1])


def test_the_global_random_state_is_neither_used_nor_moved():
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    first = generate_scene(3, 64)[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before)
    np.random.seed(1)
    np.testing.assert_array_equal(generate_scene(3, 64)[0], first)


def test_different_seeds_differ_in_layout_and_in_appearance(scenes):
    for (image, label), (next_image, next_label) in zip(scenes, scenes[1:], strict=False):
        assert (label != next_label).mean() > 0.3
        assert np.abs(image.astype(int) - next_image).mean() > 10


@pytest.mark.parametrize("size, shape", [(64, (64, 64)), (16, (16, 16)), ((48, 200), (48, 200)), ([97, 33], (97, 33))])
def test_any_size_gives_uint8_arrays_of_that_size_and_labels_0_to_5(size, shape):
    for seed in range(4):
        image, label = generate_scene(seed, size)
        assert image.shape == (*shape, 3) and image.dtype == np.uint8
        assert label.shape == shape and label.dtype == np.uint8
        assert label.max() <= 5


def test_class_shares_are_like_those_of_isprs(scenes):
    shares = np.array([np.bincount(label.ravel(), minlength=6) / label.size for _, label in scenes])
    bounds = [(0.24, 0.37), (0.18, 0.29), (0.18, 0.30), (0.10, 0.20), (0.01, 0.03), (0.02, 0.06)]
    for share, (low, high), name in zip(shares.mean(0), bounds, SCENES.id2label.values(), strict=True):
        assert low < share < high, name
    assert (shares > 0.003).all(), "every class is in every one of these scenes"


def test_a_classifier_of_colour_alone_fails_on_other_scenes(scenes):
    ensemble = pytest.importorskip("sklearn.ensemble")
    rng = np.random.default_rng(0)

    def pixels(some, count):
        picks = [rng.choice(label.size, count, replace=False) for _, label in some]
        colours = [image.reshape(-1, 3)[pick] for (image, _), pick in zip(some, picks, strict=True)]
        labels = [label.ravel()[pick] for (_, label), pick in zip(some, picks, strict=True)]
        return np.concatenate(colours), np.concatenate(labels)

    classifier = ensemble.HistGradientBoostingClassifier(max_iter=40, max_leaf_nodes=15, random_state=0)
    classifier.fit(*pixels(scenes[:8], 4000))
    colours, labels = pixels(scenes[8:], 8000)
    assert mean_iou(classifier.predict(colours), labels) < 0.40


@pytest.mark.parametrize("tangent", [0.5, 1.0, 2.0])
def test_a_shadow_points_away_from_the_sun_and_is_as_long_as_the_sun_is_low(tangent):
    height = np.zeros((80, 80))
    height[40:44, 40:44] = 8.0
    length = 8.0 / tangent / 0.5  # in pixels of half a metre
    rows, cols = np.nonzero(_shadows(height, azimuth=0.0, tangent=tangent, gsd=0.5))  # the sun is at the right
    assert set(rows) == {40, 41, 42, 43} and cols.max() == 39 and abs(40 - cols.min() - length) <= 2
    rows, cols = np.nonzero(_shadows(height, azimuth=-math.pi / 2, tangent=tangent, gsd=0.5))  # at the top
    assert set(cols) == {40, 41, 42, 43} and rows.min() == 44 and abs(rows.max() - 43 - length) <= 2


def test_a_shadow_darkens_the_ground_and_leaves_its_label():
    canvas = Canvas(np.random.default_rng(0), 64, 64, 0.4)
    canvas.reflectance[:] = 0.5
    everywhere = (slice(None), slice(None))
    roof = np.zeros((128, 128), bool)
    roof[48:80, 48:80] = True
    canvas.paint(everywhere, roof, BUILDING, (0.5, 0.5, 0.5), 6.0)
    image, label = _photograph(canvas, 0.4), _majority(canvas.label)
    expected = np.full((64, 64), 2)  # low vegetation
    expected[24:40, 24:40] = 1  # building
    np.testing.assert_array_equal(label, expected)
    # Ground and roof are equally grey, so what is clearly darker is shadow; the sun stands at 33 degrees or higher.
    brightness = image.mean(2)
    dark = brightness < 0.8 * np.median(brightness)
    longest = 6 / math.tan(math.radians(33)) / 0.4
    assert 100 < dark.sum() < longest * 16 * math.sqrt(2) * 1.2
    assert not dark[25:39, 25:39].any()


def test_the_label_of_a_pixel_is_the_majority_of_its_four_canvas_pixels():
    canvas_label = np.array([[4, 4, 0, 5], [4, 0, 5, 5], [1, 1, 3, 3], [2, 2, 3, 3]], np.uint8)
    assert _majority(canvas_label).tolist() == [[4, 5], [1, 3]]


def test_cars_cover_the_same_ground_at_every_resolution():
    """The drawn scene is in metres: a car is about 4.5 x 1.8 m, 8 square metres, whatever the pixel."""
    for gsd in (0.2, 0.4):
        size = round(60 / gsd)
        labels = [generate_scene(seed, size, gsd)[1] for seed in range(10)]
        areas = [area * gsd**2 for label in labels for area in free_standing_areas(label, 4)]
        assert len(areas) >= 10 and 6.0 < np.median(areas) < 9.5


def free_standing_areas(label, value):
    """Pixel counts of the connected parts of a class that lie on impervious ground only, away from the border."""
    todo, areas = label == value, []
    while todo.any():
        stack, part = [tuple(np.argwhere(todo)[0])], []
        todo[stack[0]] = False
        whole = True
        while stack:
            row, col = stack.pop()
            part.append((row, col))
            for r, c in ((row - 1, col), (row + 1, col), (row, col - 1), (row, col + 1)):
                if not (0 <= r < label.shape[0] and 0 <= c < label.shape[1]):
                    whole = False
                elif todo[r, c]:
                    todo[r, c] = False
                    stack.append((r, c))
                elif label[r, c] not in (0, value):
                    whole = False
        if whole:
            areas.append(len(part))
    return areas


def test_a_scene_takes_well_under_a_second():
    start = time.process_time()
    generate_scene(20)
    assert time.process_time() - start < 2  # about 0.3 s; room for a slow machine


@pytest.mark.parametrize(
    "arguments, word",
    [
        ({"size": 8}, "size"),
        ({"size": 4096}, "size"),
        ({"size": 64.5}, "size"),
        ({"size": (64, 64, 3)}, "size"),
        ({"size": "64"}, "size"),
        ({"size": True}, "size"),
        ({"gsd": 0}, "gsd"),
        ({"gsd": float("nan")}, "gsd"),
        ({"gsd": "0.4"}, "gsd"),
        ({"gsd": 5}, "gsd"),
        ({"seed": -1}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"seed": None}, "seed"),
    ],
)
def test_a_wrong_argument_is_refused_in_one_line_that_names_it(arguments, word):
    with pytest.raises(UserError) as error:
        generate_scene(**{"seed": 0, **arguments})
    message = str(error.value)
    assert word in message and "\n" not in message
