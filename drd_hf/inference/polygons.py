"""Polygons of equal class, as GeoPackage or GeoJSON."""

import warnings
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import rasterio
from rasterio.features import shapes
from rasterio.warp import transform

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.rasters import DAMAGE
from drd_hf.errors import UserError
from drd_hf.inference.maps import RUN_TAG

FORMATS = {".gpkg": "GPKG", ".geojson": "GeoJSON"}
WGS84 = 4326  # what RFC 7946 asks for
CHUNK = 50_000  # polygons that are objects in Python at a time, where the format can be appended to


def check_polygons(path: Path, source: str, crs) -> None:
    """Refuse polygons that could not be written, before anything is predicted."""
    _geopandas()
    if path.suffix.lower() == ".geojson":
        if not crs:
            raise UserError(f"{source}: has no coordinate reference system, GeoJSON needs one: use a .gpkg")
        try:
            transform(crs, f"EPSG:{WGS84}", [0.0], [0.0])
        except DAMAGE as error:
            raise UserError(
                f"{source}: its reference system has no way to WGS 84, which GeoJSON needs: use a .gpkg"
            ) from error


def run_of_polygons(path: Path) -> str | None:
    """The run tag of the map that polygons were made from, as `maps.run_of`."""
    import pyogrio

    try:
        description = (pyogrio.read_info(path)["layer_metadata"] or {}).get("DESCRIPTION", "")
    except (OSError, ValueError, RuntimeError):  # pyogrio's own errors are RuntimeErrors
        return None
    return description.removeprefix(f"{RUN_TAG}=") if description.startswith(f"{RUN_TAG}=") else None


def write_polygons(raster: Path, path: Path, names: Sequence[str], run: str) -> None:
    """Polygons of a finished class map, 4-connected, in the order in which GDAL finds them.

    `run`, the tag of the map, becomes the description of the layer.

    Raises:
        OSError: they cannot be written.
    """
    geopandas = _geopandas()
    import pyogrio
    from shapely.geometry import shape

    driver = FORMATS[path.suffix.lower()]
    path.unlink(missing_ok=True)
    with rasterio.open(raster) as dataset, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="'crs' was not provided")
        found = (
            (shape(geometry), int(value))
            for geometry, value in shapes(rasterio.band(dataset, 1), transform=dataset.transform)
            if value != IGNORE_INDEX
        )
        crs = dataset.crs and dataset.crs.to_wkt()
        written, count = False, 0
        while (chunk := list(islice(found, CHUNK if driver == "GPKG" else None))) or not written:
            polygons, ids = [polygon for polygon, _ in chunk], [value for _, value in chunk]
            frame = geopandas.GeoDataFrame(
                {"class_id": ids, "class": [names[i] for i in ids]}, geometry=polygons, crs=crs
            )
            frame["area_m2" if crs else "area_px"] = _areas(frame, abs(dataset.transform.determinant))
            if driver == "GeoJSON":
                frame = frame.to_crs(WGS84)
            options = {"layer": "classes", "layer_options": {"DESCRIPTION": f"{RUN_TAG}={run}"}, "engine": "pyogrio"}
            try:
                frame.to_file(path, driver=driver, mode="a" if written else "w", **options)
            except RuntimeError as error:  # pyogrio's own errors are RuntimeErrors
                raise OSError(str(error)) from error
            written = True
            count += len(frame)
    try:
        found_again = pyogrio.read_info(path, layer="classes")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    # A GeoPackage that had no room for its spatial index is closed without an error.
    indexed = driver != "GPKG" or found_again["capabilities"]["fast_spatial_filter"]
    if found_again["features"] != count or not indexed:
        raise OSError("what was written cannot be read back")


def _areas(frame, pixel: float):
    """Square metres on the ellipsoid; pixels, each of the area `pixel` in coordinates, without a reference system.

    Few projections keep areas: Web Mercator shows them four times too large at 60 degrees north. A local system, which
    has no place on Earth, is taken as it is.
    """
    from pyproj.exceptions import ProjError

    if frame.crs is None:
        return frame.area / pixel
    geod = frame.crs.get_geod()
    try:
        degrees = frame if frame.crs.is_geographic else frame.to_crs(frame.crs.geodetic_crs or WGS84)
    except ProjError:
        degrees = None
    if geod is None or degrees is None:
        return frame.area * frame.crs.axis_info[0].unit_conversion_factor ** 2
    return [abs(geod.geometry_area_perimeter(polygon)[0]) for polygon in degrees.geometry]


def _geopandas():
    try:
        import geopandas
        import pyogrio  # noqa: F401
    except ImportError as error:
        raise UserError(f"polygons need {error.name}: pip install drd-hf[vector]") from error
    return geopandas
