"""Rasters of any size: what the map keeps, what it costs, and what an interrupted or wrong run leaves behind."""

import json
import os
import struct
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio._env import get_gdal_config  # no public name
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from rasterio.transform import from_origin
from torch import nn
from transformers import SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

from drd_hf.errors import UserError
from drd_hf.inference import blended_blocks, predict_image, predict_raster, source_facts, window_grid
from drd_hf.inference.maps import class_colors

from .conftest import tiny_config, tiny_model

pytestmark = pytest.mark.filterwarnings(f"ignore::{NotGeoreferencedWarning.__module__}.NotGeoreferencedWarning")

ROOT = Path(__file__).resolve().parents[1]
PROCESSOR = SegformerImageProcessor()
UTM = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 0.1, 0.1)}


def noise(height, width, bands=3, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (bands, height, width), dtype=np.uint8)


def write(path, pixels, **profile):
    gcps, rpcs, colorinterp = (profile.pop(key, None) for key in ("gcps", "rpcs", "colorinterp"))
    bands, height, width = pixels.shape
    profile = {"driver": "GTiff", "dtype": pixels.dtype, "count": bands, "height": height, "width": width} | profile
    with rasterio.open(path, "w", **profile) as dataset:
        if gcps:
            dataset.gcps = gcps
        if rpcs:
            dataset.rpcs = rpcs
        if colorinterp:
            dataset.colorinterp = colorinterp
        dataset.write(pixels)
    return path


def read(path):
    with rasterio.open(path) as dataset:
        return dataset.read(1)


def in_memory(model, pixels, tile):
    return predict_image(model, PROCESSOR, pixels.transpose(1, 2, 0), tile=tile)


@pytest.fixture
def model():
    return tiny_model("segformer").eval()


class Counting(nn.Module):
    """A model that counts the windows it sees, and can be stopped after some."""

    def __init__(self, model, stop_after=None):
        super().__init__()
        self.model, self.config, self.device, self.dtype = model, model.config, model.device, model.dtype
        self.windows, self.stop_after = 0, stop_after

    def forward(self, pixel_values):
        self.windows += len(pixel_values)
        if self.stop_after and self.windows > self.stop_after:
            raise KeyboardInterrupt
        return self.model(pixel_values=pixel_values)


def test_the_map_of_a_raster_is_that_of_the_image(model, tmp_path):
    pixels = noise(301, 277)
    source = write(tmp_path / "source.tif", pixels, **UTM)
    assert predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", tile=64, progress=False)
    np.testing.assert_array_equal(read(tmp_path / "map.tif"), in_memory(model, pixels, 64))


@pytest.mark.parametrize("layout", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 16}])
def test_a_raster_is_read_in_pieces(layout, model, tmp_path, monkeypatch):
    monkeypatch.setattr("drd_hf.inference.raster.PIECE_BYTES", 5000)
    pixels = noise(100, 150)
    pixels[:, 30:60, 70:120] = 0
    source = write(tmp_path / "source.tif", pixels, nodata=0, **layout)
    predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", tile=64, progress=False)
    expected = np.where(pixels.any(axis=0), in_memory(model, pixels, 64), 255)
    np.testing.assert_array_equal(read(tmp_path / "map.tif"), expected)


def test_the_map_is_a_cog_with_georeference_colours_and_names(model, tmp_path):
    source = write(tmp_path / "source.tif", noise(700, 600), **UTM)
    colors = [(1, 2, 3), (40, 50, 60), (7, 80, 9)]
    predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", tile=256, colors=colors, progress=False)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.profile["tiled"] and dataset.profile["compress"] == "deflate" and dataset.dtypes == ("uint8",)
        assert dataset.crs == UTM["crs"] and dataset.transform == UTM["transform"] and dataset.nodata == 255
        assert [dataset.colormap(1)[i][:3] for i in range(3)] == colors
        assert json.loads(dataset.tags()["CLASSES"]) == ["ground", "building", "tree"]
        assert dataset.overviews(1)
    # rasterio does not show the names of a palette; a VRT does.
    rasterio.shutil.copy(tmp_path / "map.tif", tmp_path / "names.vrt", driver="VRT")
    text = (tmp_path / "names.vrt").read_text()
    assert text.index("<Category>ground<") < text.index("<Category>building<") < text.index("<Category>tree<")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "map.tif",
        "map.tif.aux.xml",
        "names.vrt",
        "source.tif",
    ]


def test_overviews_hold_classes_and_no_mixtures_of_them(tmp_path):
    pixels = np.zeros((3, 1024, 1024), np.uint8)
    pixels[0], pixels[2, :, 512:], pixels[0, :, 512:] = 255, 255, 0  # class 0 left, class 2 right: a mean would be 1
    predict_raster(
        Brightest(), PROCESSOR, write(tmp_path / "s.tif", pixels, **UTM), tmp_path / "map.tif", progress=False
    )
    with rasterio.open(tmp_path / "map.tif", overview_level=0) as overview:
        assert set(np.unique(overview.read(1))) == {0, 2} and overview.width < 1024


class Brightest(nn.Module):
    """Class k where channel k is the brightest."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self):
        super().__init__()
        self.config = tiny_config("segformer")

    def forward(self, pixel_values):
        return SemanticSegmenterOutput(logits=2 * pixel_values)


@pytest.mark.parametrize("how", ["no-data value", "alpha", "mask"])
def test_pixels_without_data_are_255(how, model, tmp_path):
    pixels = noise(130, 200)
    empty = np.zeros(pixels.shape[1:], bool)
    empty[:70, :90] = empty[100:, 150:] = True
    pixels[:, empty] = 0
    path = tmp_path / "source.tif"
    if how == "alpha":
        colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        write(path, np.concatenate([pixels, np.where(empty[None], 0, 255).astype(np.uint8)]), colorinterp=colorinterp)
    else:
        write(path, pixels, **({"nodata": 0} if how == "no-data value" else {}))
    if how == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "r+") as dataset:
            dataset.write_mask(~empty)
    counting = Counting(model)
    predict_raster(counting, PROCESSOR, path, tmp_path / "map.tif", tile=32, overlap=0.5, progress=False)
    classes = read(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes == 255, empty)
    grid = window_grid(130, 200, 32, 0.5)
    seen = sum(not empty[r : r + 32, c : c + 32].all() for r in grid.rows for c in grid.columns)
    assert counting.windows == seen < len(grid.rows) * len(grid.columns)


def test_windows_without_data_leave_the_others_as_they_are(model, tmp_path):
    pixels = noise(96, 160)
    pixels[:, :, :80] = 0
    predict_raster(
        model, PROCESSOR, write(tmp_path / "s.tif", pixels, nodata=0), tmp_path / "map.tif", tile=32, progress=False
    )
    np.testing.assert_array_equal(read(tmp_path / "map.tif")[:, 80:], in_memory(model, pixels, 32)[:, 80:])


def test_control_points_and_rpcs_are_kept(model, tmp_path):
    points = [GroundControlPoint(r, c, x, y) for r, c, x, y in ((0, 0, 10, 50), (0, 60, 11, 50), (60, 0, 10, 49))]
    rpcs = RPC(
        height_off=1, height_scale=2, lat_off=3, lat_scale=4, long_off=5, long_scale=6, line_off=7, line_scale=8,
        samp_off=9, samp_scale=10, line_num_coeff=[1.0] * 20, line_den_coeff=[2.0] * 20, samp_num_coeff=[3.0] * 20,
        samp_den_coeff=[4.0] * 20,
    )  # fmt: skip
    first = write(tmp_path / "gcps.tif", noise(60, 60), gcps=(points, rasterio.crs.CRS.from_epsg(4326)))
    second = write(tmp_path / "rpcs.tif", noise(60, 60), rpcs=rpcs)
    for source in (first, second):
        assert source_facts(source).georeferenced
        predict_raster(model, PROCESSOR, source, tmp_path / f"map-{source.name}", progress=False)
    with rasterio.open(tmp_path / "map-gcps.tif") as dataset:
        assert [(p.row, p.col, p.x, p.y) for p in dataset.gcps[0]] == [(p.row, p.col, p.x, p.y) for p in points]
        assert dataset.gcps[1].to_epsg() == 4326
    with rasterio.open(tmp_path / "map-rpcs.tif") as dataset:
        assert dataset.rpcs.line_num_coeff == rpcs.line_num_coeff and dataset.rpcs.samp_off == rpcs.samp_off


def test_an_ordinary_image_becomes_a_palette_png(model, tmp_path):
    pixels = noise(90, 130)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(tmp_path / "photo.png")
    assert not source_facts(tmp_path / "photo.png").georeferenced
    predict_raster(model, PROCESSOR, tmp_path / "photo.png", tmp_path / "map.png", tile=64, progress=False)
    with Image.open(tmp_path / "map.png") as image:
        assert image.mode == "P"
        np.testing.assert_array_equal(np.asarray(image), in_memory(model, pixels, 64))
        assert tuple(image.getpalette()[:9]) == tuple(np.ravel(class_colors(["ground", "building", "tree"])))
    assert {path.name for path in tmp_path.iterdir()} == {"photo.png", "map.png"}


def test_palette_images_are_read_as_their_colours(model, tmp_path):
    indices = np.random.default_rng(0).integers(0, 4, (64, 64), dtype=np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    image.save(tmp_path / "palette.png")
    predict_raster(model, PROCESSOR, tmp_path / "palette.png", tmp_path / "map.png", progress=False)
    colors = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]], np.uint8)[indices]
    np.testing.assert_array_equal(read(tmp_path / "map.png"), predict_image(model, PROCESSOR, colors))


def test_probabilities_are_a_band_for_each_class(model, tmp_path):
    pixels = noise(100, 120)
    pixels[:, :50, :50] = 0
    source = write(tmp_path / "source.tif", pixels, nodata=0, **UTM)
    predict_raster(
        model, PROCESSOR, source, tmp_path / "map.tif", tile=128, probabilities=tmp_path / "p.tif", progress=False
    )
    expected = predict_image(model, PROCESSOR, pixels.transpose(1, 2, 0), tile=128, return_probabilities=True)[1]
    with rasterio.open(tmp_path / "p.tif") as dataset:
        assert dataset.descriptions == ("ground", "building", "tree") and dataset.nodata == 255
        values = dataset.read() * np.array(dataset.scales)[:, None, None]
        stored = dataset.read()
    np.testing.assert_array_equal(stored[:, :50, :50], 255)
    inside = np.ones((100, 120), bool)
    inside[:50, :50] = False
    np.testing.assert_allclose(values[:, inside], expected[:, inside], atol=0.00201)


def test_bands_are_chosen_and_the_order_counts(model, tmp_path):
    pixels = noise(64, 64, bands=5)
    source = write(tmp_path / "source.tif", pixels)
    predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", bands=[4, 1, 2], progress=False)
    np.testing.assert_array_equal(read(tmp_path / "map.tif"), in_memory(model, pixels[[3, 0, 1]], 512))
    with pytest.raises(UserError, match=r"source.tif: has 5 bands, the model reads 3.*--bands"):
        predict_raster(model, PROCESSOR, source, tmp_path / "other.tif")


@pytest.mark.parametrize("count", [2, 3, 7])
def test_strips_of_window_rows_give_the_very_same_numbers(count, model):
    pixels = noise(210, 70).transpose(1, 2, 0)
    for overlap in (0, 0.25, 0.7):
        grid = window_grid(210, 70, 32, overlap)

        def blocks(*window_rows, grid=grid):
            whole = np.full((3, 210, 70), np.nan, np.float32)
            for row, column, block, _ in blended_blocks(
                model, PROCESSOR, lambda row, out: np.copyto(out, pixels[row : row + len(out)]), grid, 4, *window_rows
            ):
                whole[:, row : row + block.shape[1], column : column + block.shape[2]] = block
            return whole

        bounds = [len(grid.rows) * i // count for i in range(count + 1)]
        parts = [blocks(*bounds[i : i + 2]) for i in range(count)]
        assert (np.sum([~np.isnan(part) for part in parts], axis=0) == 1).all()
        np.testing.assert_array_equal(np.nansum(parts, axis=0), blocks())


def test_each_row_is_read_once_and_in_order(model):
    asked = []

    def read_rows(row, out):
        asked.extend(range(row, row + len(out)))
        out[:] = 0

    list(blended_blocks(model, PROCESSOR, read_rows, window_grid(150, 70, 32, 0.25)))
    assert asked == list(range(150))


def test_a_second_run_makes_only_what_is_missing(model, tmp_path):
    source, target = write(tmp_path / "source.tif", noise(100, 110), **UTM), tmp_path / "map.tif"
    counting = Counting(model)

    def run(**options):
        counting.windows = 0
        return predict_raster(
            counting, PROCESSOR, source, target, tile=64, progress=False, **options
        ), counting.windows

    assert run() == (True, 9)
    assert run() == (False, 0)
    assert run(probabilities=tmp_path / "p.tif") == (True, 9)
    assert run(probabilities=tmp_path / "p.tif") == (False, 0)
    with pytest.raises(UserError, match="map.tif: was not made from this source by this model.*--overwrite"):
        run(overlap=0.5)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(UserError, match="was not made"):
        run()
    assert run(overwrite=True) == (True, 9)
    assert run() == (False, 0)
    os.utime(source, ns=(1, 1))
    with pytest.raises(UserError, match="was not made"):
        run()


def test_an_interrupted_run_leaves_no_map_and_the_next_one_is_whole(model, tmp_path):
    source, target = write(tmp_path / "source.tif", noise(300, 100), **UTM), tmp_path / "map.tif"
    with pytest.raises(KeyboardInterrupt):
        predict_raster(Counting(model, stop_after=5), PROCESSOR, source, target, tile=64, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source.tif"]
    # A run that is killed cannot tidy up: what it leaves in its folder is neither used nor left there.
    (tmp_path / ".map.tif.tmp").mkdir()
    for name in ("map-0.tif", "map-0.json", "map-1.tif", "map.tif", "final-map.tif"):
        (tmp_path / ".map.tif.tmp" / name).write_bytes(b"rubbish")
    assert predict_raster(model, PROCESSOR, source, target, tile=64, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml", "source.tif"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    # Closing a GeoTIFF on a full disk raises nothing, in rasterio 1.4: the last rows of a map were missing, unsaid.
    resource = pytest.importorskip("resource", reason="needs limits of a process")
    source, target = write(tmp_path / "source.tif", noise(700, 800), **UTM), tmp_path / "map.tif"
    predict_raster(Brightest(), PROCESSOR, source, target, progress=False)
    size = target.stat().st_size
    target.unlink()
    target.with_name("map.tif.aux.xml").unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size // 2, size - 3000, size - 10):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(UserError, match="map.tif: cannot be written, is the disk full?") as error:
                predict_raster(Brightest(), PROCESSOR, source, target, progress=False)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert [path.name for path in tmp_path.iterdir()] == ["source.tif"]


def test_memory_does_not_grow_with_the_height(tmp_path):
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs the peak of a process as Linux counts it")
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from drd_hf.inference import predict_raster
from tests.test_predict_raster import Brightest, PROCESSOR
for name in ("first.tif", "short.tif", "long.tif"):
    Path("/proc/self/clear_refs").write_text("5")
    predict_raster(Brightest(), PROCESSOR, name, "map-" + name, tile=256, progress=False)
    print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""
    tiled = {"tiled": True, "blockxsize": 256, "blockysize": 256, "compress": "deflate"}
    for name, height in (("first.tif", 512), ("short.tif", 512), ("long.tif", 10240)):
        write(tmp_path / name, np.tile(noise(512, 1024), (1, height // 512, 1)), **tiled)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    _, short, long = map(int, done.stdout.split())
    # The long image is 30 MB more, its probabilities are 120 MB; GDAL's cache may take up to 64 MB for either.
    assert (long - short) * 1024 < 72e6


WRONG = {
    "no image": "cannot be read as an image",
    "nothing": "is empty",
    "two bands": r"has 2 bands, the model reads 3: choose them with --bands",
    "16 bits": "has uint16 values, the model reads 8 bits",
    "no data": "has no pixel with data",
    "cut short": "is damaged or cut short",
    "no file": "no such file",
}


@pytest.mark.parametrize("kind", WRONG)
def test_bad_sources_are_one_line_that_names_them(kind, model, tmp_path):
    path = tmp_path / "bad.tif"
    if kind == "no image":
        path.write_text("hello")
    elif kind == "nothing":
        path.touch()
    elif kind == "two bands":
        write(path, noise(64, 64, bands=2))
    elif kind == "16 bits":
        write(path, noise(64, 64).astype(np.uint16))
    elif kind == "no data":
        write(path, np.full((3, 64, 64), 7, np.uint8), nodata=7)
    elif kind == "cut short":
        write(path, noise(640, 640), tiled=True, blockxsize=64, blockysize=64)
        path.write_bytes(path.read_bytes()[:-200000])
    with pytest.raises(UserError, match=f"bad.tif: {WRONG[kind]}") as error:
        predict_raster(model, PROCESSOR, path, tmp_path / "map.tif", tile=64, progress=False)
    assert "\n" not in str(error.value)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.tif"}


def test_outputs_that_cannot_be_are_refused_before_anything_is_read(model, tmp_path):
    source = write(tmp_path / "source.tif", noise(64, 64))
    for target, message in (
        ("source.tif", "is the source itself"),
        ("map.jpg", "ends in .png or .tif or .tiff"),
        ("nowhere/map.tif", "its folder does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            predict_raster(model, PROCESSOR, source, tmp_path / target, overwrite=True)
    with pytest.raises(UserError, match="named for two outputs"):
        predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", probabilities=tmp_path / "map.tif")
    with pytest.raises(UserError, match="2 colours for 3 classes"):
        predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", colors=[(0, 0, 0)] * 2)


def test_polygons_without_their_library_are_refused_with_the_remedy(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "geopandas", None)  # importing it now fails
    source, counting = write(tmp_path / "source.tif", noise(64, 64), **UTM), Counting(model)
    with pytest.raises(UserError, match=r"polygons need geopandas: pip install drd-hf\[vector\]"):
        predict_raster(counting, PROCESSOR, source, tmp_path / "map.tif", vector=tmp_path / "p.gpkg")
    assert counting.windows == 0


@pytest.mark.parametrize("ending", ["gpkg", "geojson"])
def test_polygons_cover_the_map_with_class_and_area(ending, tmp_path, monkeypatch):
    geopandas = pytest.importorskip("geopandas", reason="needs the extra `vector`")
    monkeypatch.setattr("drd_hf.inference.polygons.CHUNK", 1)  # a GeoPackage is appended to
    pixels = np.zeros((3, 80, 100), np.uint8)
    pixels[0] = 200
    pixels[:, 20:50, 10:40] = [[[0]], [[200]], [[0]]]  # class 1: 30 x 30 pixels of 0.1 m
    pixels[:, 70:] = 0  # no data
    source = write(tmp_path / "source.tif", pixels, nodata=0, **UTM)
    with rasterio.open(source, "r+") as dataset:
        dataset.write_mask(pixels.any(axis=0))
    target = tmp_path / f"polygons.{ending}"
    predict_raster(Brightest(), PROCESSOR, source, tmp_path / "map.tif", vector=target, progress=False)
    frame = geopandas.read_file(target)
    scale = 0.9996**2  # of areas at the central meridian of UTM
    areas = frame.groupby("class")["area_m2"].sum()
    assert areas["building"] == pytest.approx(9.0 / scale) and areas["ground"] == pytest.approx((70.0 - 9.0) / scale)
    assert set(zip(frame["class_id"], frame["class"], strict=True)) == {(0, "ground"), (1, "building")}
    assert frame.crs.to_epsg() == (32633 if ending == "gpkg" else 4326)
    west, south, east, north = frame.to_crs(UTM["crs"]).total_bounds
    np.testing.assert_allclose([west, south, east, north], [500000, 4999993, 500010, 5000000], atol=0.01)
    assert not predict_raster(Brightest(), PROCESSOR, source, tmp_path / "map.tif", vector=target, progress=False)
    target.unlink()
    assert predict_raster(Brightest(), PROCESSOR, source, tmp_path / "map.tif", vector=target, progress=False)
    assert target.exists()


def test_areas_are_square_metres_on_the_ellipsoid_or_pixels(tmp_path):
    geopandas = pytest.importorskip("geopandas", reason="needs the extra `vector`")
    degrees = {"crs": "EPSG:4326", "transform": from_origin(10, 50, 1e-5, 1e-5)}
    feet = {"crs": "EPSG:2263", "transform": from_origin(987000, 200000, 0.1, 0.1)}
    # Areas in Web Mercator were its own, four times too large at 60 degrees north; there a degree is 55.80 km from west
    # to east and 111.41 km from south to north, which the map shows as 111.32 and 222.64 km. Pixels of a raster with a
    # transform alone were square units of it.
    mercator = {"crs": "EPSG:3857", "transform": from_origin(1e6, 8399737.9, 1, 1)}
    local = {"crs": 'LOCAL_CS["arena",UNIT["metre",1]]', "transform": from_origin(5, 5, 0.1, 0.1)}
    red = np.full((3, 50, 80), 9, np.uint8)
    red[0] = 200
    # At 50 degrees north a degree of WGS 84 is 111.23 km long from south to north, 71.70 km from west to east.
    for name, profile, column, area in (
        ("degrees", degrees, "area_m2", 50 * 80 * 1.1123 * 0.7170),
        ("feet", feet, "area_m2", 50 * 80 * 0.01 * (1200 / 3937) ** 2),  # US survey feet, in New York
        ("mercator", mercator, "area_m2", 50 * 80 * (55.80 / 111.32) * (111.41 / 222.64)),
        ("local", local, "area_m2", 50 * 80 * 0.01),
        ("pixels", {}, "area_px", 50 * 80),
        ("half pixels", {"transform": from_origin(7, 7, 0.5, 0.5)}, "area_px", 50 * 80),
    ):
        source, target = write(tmp_path / f"{name}.tif", red, **profile), tmp_path / f"{name}.gpkg"
        predict_raster(Brightest(), PROCESSOR, source, tmp_path / f"map-{name}.tif", vector=target, progress=False)
        frame = geopandas.read_file(target)
        assert len(frame) == 1 and frame[column][0] == pytest.approx(area, rel=1e-3)


def test_geojson_without_a_way_to_wgs84_is_refused(model, tmp_path):
    pytest.importorskip("geopandas", reason="needs the extra `vector`")
    local = {"crs": 'LOCAL_CS["arena",UNIT["metre",1]]', "transform": from_origin(5, 5, 1, 1)}
    for profile, message in (({}, "has no coordinate reference system"), (local, "has no way to WGS 84")):
        source = write(tmp_path / "source.tif", noise(64, 64), **profile)
        with pytest.raises(UserError, match=f"source.tif: .*{message}"):
            predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", vector=tmp_path / "p.geojson")


def test_classes_of_known_datasets_have_their_colours():
    assert class_colors(["building", "car"]) == ((0, 0, 255), (255, 255, 0))  # ISPRS
    assert class_colors(["road", "sky"]) == ((128, 64, 128), (70, 130, 180))  # Cityscapes
    others = class_colors([f"class {i}" for i in range(20)])
    assert len(set(others)) == 20


class Waiting(Counting):
    """A model that says at its first window that it has begun, and waits until it may go on."""

    def __init__(self, model, begun, go_on):
        super().__init__(model)
        self.begun, self.go_on = begun, go_on

    def forward(self, pixel_values):
        self.begun.set()
        assert self.go_on.wait(60)
        return super().forward(pixel_values)


def test_a_raster_is_made_by_one_process_at_a_time(model, tmp_path):
    # Two processes with one output removed each other's unfinished files: both failed, and nothing was left.
    source, target = write(tmp_path / "source.tif", noise(64, 64), **UTM), tmp_path / "map.tif"
    begun, go_on = threading.Event(), threading.Event()
    arguments = {"processor": PROCESSOR, "source": source, "destination": target, "progress": False}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(predict_raster, Waiting(model, begun, go_on), fingerprint="same", **arguments)
        try:
            assert begun.wait(60)
            with pytest.raises(UserError, match="map.tif: is being made by another process"):
                predict_raster(model, fingerprint="same", **arguments)
        finally:
            go_on.set()
        assert first.result()
    assert not predict_raster(model, fingerprint="same", **arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml", "source.tif"]


@pytest.mark.parametrize("ending", ["gpkg", "geojson"])
def test_a_full_disk_while_polygons_are_written_is_an_error_and_leaves_none(ending, tmp_path):
    # The errors of pyogrio are no OSErrors: a full disk ended in a traceback, and the inputs after it were not done.
    resource = pytest.importorskip("resource", reason="needs limits of a process")
    pytest.importorskip("geopandas", reason="needs the extra `vector`")
    arguments = {"source": write(tmp_path / "source.tif", noise(200, 200), **UTM), "destination": tmp_path / "map.tif"}
    arguments |= {"processor": PROCESSOR, "progress": False}
    predict_raster(Brightest(), **arguments)
    target = tmp_path / f"polygons.{ending}"
    predict_raster(Brightest(), **arguments, vector=target)
    size = target.stat().st_size
    target.unlink()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (size // 50, size // 2, size - 5000, size - 100):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
            with pytest.raises(UserError, match=f"polygons.{ending}: cannot be written, is the disk full") as error:
                predict_raster(Brightest(), **arguments, vector=target)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "\n" not in str(error.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "map.tif.aux.xml", "source.tif"]


@pytest.mark.parametrize("shared", ["probabilities", "vector"])
def test_no_output_is_made_by_two_processes(shared, model, tmp_path):
    # Only the map had a lock: runs with two maps and one path for the rest wrote that over each other.
    if shared == "vector":
        pytest.importorskip("geopandas", reason="needs the extra `vector`")
    source = write(tmp_path / "source.tif", noise(64, 64), **UTM)
    path = tmp_path / {"probabilities": "p.tif", "vector": "p.gpkg"}[shared]
    begun, go_on = threading.Event(), threading.Event()
    arguments = {"processor": PROCESSOR, "source": source, "progress": False, "fingerprint": "same", shared: path}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(
            predict_raster, Waiting(model, begun, go_on), destination=tmp_path / "first.tif", **arguments
        )
        try:
            assert begun.wait(60)
            with pytest.raises(UserError, match=f"{path.name}: is being made by another process"):
                predict_raster(model, destination=tmp_path / "a_second.tif", **arguments)
        finally:
            go_on.set()
        assert first.result()
    names = ["first.tif", "first.tif.aux.xml", path.name, "source.tif"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_gdals_cache_holds_megabytes_and_is_given_back(model, tmp_path):
    # rasterio takes GDAL_CACHEMAX in bytes, GDAL itself in megabytes: with 64 every block was decoded two or three times.
    source, sizes = write(tmp_path / "source.tif", noise(64, 64), **UTM), []
    before = get_gdal_config("GDAL_CACHEMAX")

    class Asking(Counting):
        def forward(self, pixel_values):
            sizes.append(get_gdal_config("GDAL_CACHEMAX"))
            return super().forward(pixel_values)

    predict_raster(Asking(model), PROCESSOR, source, tmp_path / "map.tif", tile=64, progress=False)
    assert sizes and all(2**24 <= size < 2**27 for size in sizes)
    assert get_gdal_config("GDAL_CACHEMAX") == before


def test_a_reference_system_that_is_unknown_is_refused(model, tmp_path):
    # GDAL put a local system in its place, and the map lay nowhere.
    source = write(tmp_path / "source.tif", noise(64, 64), **UTM)
    key = struct.pack("<HHHH", 3072, 0, 1, 32633)  # ProjectedCSTypeGeoKey
    content = source.read_bytes()
    assert content.count(key) == 1
    source.write_bytes(content.replace(key, struct.pack("<HHHH", 3072, 0, 1, 29999)))
    with pytest.raises(UserError, match="source.tif: has the reference system EPSG:29999, which PROJ does not know"):
        predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["source.tif"]


class WithoutNumbers(Counting):
    """A model that overflows in the last of its windows."""

    def __init__(self, model, windows, value):
        super().__init__(model)
        self.last, self.value = windows, value

    def forward(self, pixel_values):
        answer = super().forward(pixel_values)
        if self.windows >= self.last:
            answer.logits[-1, 0, 0, 0] = self.value
        return answer


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_answers_that_are_no_numbers_are_refused(value, model, tmp_path):
    # In half precision logits of some models overflow: the map was class 0 everywhere, without a word.
    source = write(tmp_path / "source.tif", noise(100, 110), **UTM)
    with pytest.raises(UserError, match="source.tif: the model answers with NaN or infinity.*float32"):
        predict_raster(
            WithoutNumbers(model, 9, value), PROCESSOR, source, tmp_path / "map.tif", tile=64, progress=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["source.tif"]


@pytest.mark.parametrize("ending", ["gpkg", "geojson"])
def test_polygons_belong_to_the_map_that_they_were_made_from(ending, model, tmp_path):
    # Which was older told: in a copy of finished outputs polygons may be the older file, and all of it was refused.
    pytest.importorskip("geopandas", reason="needs the extra `vector`")
    source, target = write(tmp_path / "source.tif", noise(64, 64), **UTM), tmp_path / "map.tif"
    vector = tmp_path / f"map.{ending}"

    def run(**options):
        return predict_raster(model, PROCESSOR, source, target, vector=vector, progress=False, **options)

    assert run()
    os.utime(vector, ns=(1, 1))
    assert not run()
    assert predict_raster(model, PROCESSOR, source, target, overlap=0.5, overwrite=True, progress=False)
    with pytest.raises(UserError, match=f"map.{ending}: was not made from the map"):
        run(overlap=0.5)
    assert run(overlap=0.5, overwrite=True) and not run(overlap=0.5)


def test_files_of_fewer_than_8_bits_are_refused(model, tmp_path):
    # 0 to 15 was taken for black: GDAL says uint8 of 4 bits.
    source = write(tmp_path / "source.tif", noise(64, 64) // 16, nbits=4)
    with pytest.raises(UserError, match="source.tif: has 4 bits a band, the model reads 8: convert it"):
        predict_raster(model, PROCESSOR, source, tmp_path / "map.tif", progress=False)
