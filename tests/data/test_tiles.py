import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from drd_hf.data.tiles import covered_before, cut_tiles, rescale, scaled_size, tile_origins
from drd_hf.errors import UserError


@st.composite
def grids(draw):
    """Height, width, tile size and a stride of at most the tile size, overlap of more than two tiles included."""
    tile_size = draw(st.integers(1, 12))
    return draw(st.integers(1, 40)), draw(st.integers(1, 40)), tile_size, draw(st.integers(1, tile_size))


def draw_image(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), np.uint8), rng.integers(0, 5, (height, width), np.uint8)


@given(st.integers(1, 300), st.integers(1, 50), st.integers(1, 50))
def test_tiles_reach_every_pixel_and_stay_inside(length, tile_size, stride):
    stride = min(stride, tile_size)
    origins = tile_origins(length, tile_size, stride)
    covered = set()
    for origin in origins:
        covered |= set(range(origin, origin + tile_size))
    assert covered == set(range(max(length, tile_size)))
    assert origins == sorted(set(origins))
    assert all(origin % stride == 0 for origin in origins[:-1])


def test_last_tile_is_shifted_inward():
    assert tile_origins(1000, 512, 512) == [0, 488]
    assert tile_origins(1024, 512, 512) == [0, 512]
    assert tile_origins(100, 512, 512) == [0]


@pytest.mark.parametrize(("tile_size", "stride"), [(0, 1), (-4, 1), (512, 0), (512, 513)])
def test_wrong_sizes_are_refused(tile_size, stride):
    with pytest.raises(UserError, match="tile_size is|stride is"):
        tile_origins(1000, tile_size, stride)


@settings(max_examples=50, deadline=None)
@given(grids())
def test_tiles_hold_the_pixels_of_their_place(grid):
    height, width, tile_size, stride = grid
    image, label = draw_image(height, width)
    for row, column, image_tile, label_tile in cut_tiles(image, label, tile_size, stride):
        assert image_tile.shape == (tile_size, tile_size, 3)
        inside = image[row : row + tile_size, column : column + tile_size]
        h, w = inside.shape[:2]
        assert (image_tile[:h, :w] == inside).all()
        assert (label_tile[:h, :w] == label[row : row + tile_size, column : column + tile_size]).all()
        assert (label_tile[h:] == 255).all()
        assert (label_tile[:, w:] == 255).all()


def test_small_image_is_continued_by_its_reflection():
    image = np.repeat(np.arange(3, dtype=np.uint8)[None, :, None], 3, axis=2)  # one row: 0 1 2
    label = np.zeros((1, 3), np.uint8)
    ((row, column, image_tile, label_tile),) = cut_tiles(image, label, 5, 5)
    assert (row, column) == (0, 0)
    assert image_tile[0, :, 0].tolist() == [0, 1, 2, 1, 0]
    assert label_tile.tolist() == [[0, 0, 0, 255, 255]] + [[255] * 5] * 4


def test_tiles_without_a_labelled_pixel_are_left_out():
    image, label = draw_image(8, 8)
    label[:] = 255
    label[6, 1] = 0
    assert [(row, column) for row, column, *_ in cut_tiles(image, label, 4, 4)] == [(4, 0)]


def test_without_a_label_all_tiles_are_kept():
    image, _ = draw_image(9, 8)
    found = list(cut_tiles(image, None, 4, 4))
    assert [(row, column) for row, column, *_ in found] == [(r, c) for r in (0, 4, 5) for c in (0, 4)]
    assert all(label is None for *_, label in found)


def test_image_and_label_of_different_size_are_refused():
    image, label = draw_image(8, 8)
    with pytest.raises(UserError, match="do not fit"):
        list(cut_tiles(image, label[:7], 4, 4))


@settings(max_examples=100, deadline=None)
@given(grids(), st.floats(0, 1), st.integers(0, 1000))
def test_owned_parts_of_tiles_count_every_labelled_pixel_once(grid, ignored, seed):
    height, width, tile_size, stride = grid
    image, label = draw_image(height, width, seed)
    # Ignore whole blocks, so that some tiles, and some rows of tiles, are left out.
    rng = np.random.default_rng(seed)
    blocks = rng.random((height // 5 + 1, width // 5 + 1)) < ignored
    label[np.kron(blocks, np.ones((5, 5), bool))[:height, :width]] = 255

    tiles = {(row, column): tile for row, column, _, tile in cut_tiles(image, label, tile_size, stride)}
    tops = covered_before([row for row, _ in tiles], tile_size)
    lefts = covered_before([column for _, column in tiles], tile_size)
    times = np.zeros((height + tile_size, width + tile_size), int)
    for (row, column), tile in tiles.items():
        owned = tile.copy()
        owned[: tops[row]] = 255
        owned[:, : lefts[column]] = 255
        times[row : row + tile_size, column : column + tile_size] += owned != 255
    assert (times[:height, :width] == (label != 255)).all()
    assert times.sum() == (label != 255).sum()


@settings(max_examples=50, deadline=None)
@given(grids())
def test_a_pixel_belongs_to_the_first_tile_that_covers_it(grid):
    height, width, tile_size, stride = grid
    image, label = draw_image(height, width)
    places = [(row, column) for row, column, *_ in cut_tiles(image, label, tile_size, stride)]
    tops = covered_before([row for row, _ in places], tile_size)
    lefts = covered_before([column for _, column in places], tile_size)
    owner = {}
    for row, column in sorted(places):  # by definition: smallest row, then smallest column
        for y in range(row, row + tile_size):
            for x in range(column, column + tile_size):
                owner.setdefault((y, x), (row, column))
    for row, column in places:
        for y in range(row, row + tile_size):
            for x in range(column, column + tile_size):
                is_owned = y - row >= tops[row] and x - column >= lefts[column]
                assert is_owned == (owner[y, x] == (row, column))


def test_rescale_by_a_half_averages_pixels_and_invents_no_label():
    image, label = draw_image(8, 12)
    small_image, small_label = rescale(image, 0.5), rescale(label, 0.5)
    assert small_image.shape[:2] == small_label.shape == scaled_size(8, 12, 0.5)
    means = image.reshape(4, 2, 6, 2, 3).mean((1, 3))
    assert np.abs(small_image - means).max() <= 1  # rounded once along each axis
    blocks = label.reshape(4, 2, 6, 2)
    assert (blocks == small_label[:, None, :, None]).any((1, 3)).all()


def test_scale_of_one_changes_nothing():
    image, label = draw_image(5, 7)
    assert (rescale(image, 1.0) == image).all()
    assert (rescale(label, 1.0) == label).all()


@pytest.mark.parametrize("scale", [0.5, 2])
def test_bands_are_rescaled_each_for_itself(scale):
    # Pillow takes four bands for RGBA and gives pixels whose fourth band is 0 no weight.
    image = np.random.default_rng(0).integers(0, 256, (8, 12, 4), np.uint8)
    image[..., 3] = 0
    assert (rescale(image, scale)[..., :3] == rescale(np.ascontiguousarray(image[..., :3]), scale)).all()
    assert (rescale(image, scale)[..., 3] == 0).all()


@pytest.mark.parametrize("scale", [0, -1, 17, float("nan")])
def test_scale_that_makes_no_sense_is_refused(scale):
    with pytest.raises(UserError, match="scale is"):
        rescale(draw_image(4, 4)[0], scale)
