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


def write_polygons(raster: Path, path: Path, names: Sequence[str]) -> None:
    """Polygons of a finished class map, 4-connected, in the order in which GDAL finds them."""
    geopandas = _geopandas()
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
        written = False
        while (chunk := list(islice(found, CHUNK if driver == "GPKG" else None))) or not written:
            polygons, ids = [polygon for polygon, _ in chunk], [value for _, value in chunk]
            frame = geopandas.GeoDataFrame(
                {"class_id": ids, "class": [names[i] for i in ids]}, geometry=polygons, crs=crs
            )
            frame["area_m2" if crs else "area_px"] = _areas(frame)
            if driver == "GeoJSON":
                frame = frame.to_crs(WGS84)
            frame.to_file(path, driver=driver, layer="classes", engine="pyogrio", mode="a" if written else "w")
            written = True


def _areas(frame):
    """Square metres: on the ellipsoid where coordinates are degrees; square pixels without a reference system."""
    if frame.crs is None:
        return frame.area
    if frame.crs.is_geographic:
        geod = frame.crs.get_geod()
        return [abs(geod.geometry_area_perimeter(polygon)[0]) for polygon in frame.geometry]
    return frame.area * frame.crs.axis_info[0].unit_conversion_factor ** 2


def _geopandas():
    try:
        import geopandas
        import pyogrio  # noqa: F401
    except ImportError as error:
        raise UserError(f"polygons need {error.name}: pip install drd-hf[vector]") from error
    return geopandas
