"""Files as ISPRS and Cityscapes hand them out, in any size: names, folders, zips, TIFF structure and known quirks.

Every function returns what it drew, so that a test knows the right answer.
"""

import shutil
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rasterio
from affine import Affine, dumpsw
from PIL import Image
from rasterio.errors import NotGeoreferencedWarning

ISPRS_COLORS = np.array(
    [(255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0), *[(0, 0, 0)] * 250],
    np.uint8,
)
POTSDAM_TRAIN = (
    "2_10 2_11 2_12 3_10 3_11 3_12 4_10 4_11 4_12 5_10 5_11 5_12 6_7 6_8 6_9 6_10 6_11 6_12 "
    "7_7 7_8 7_9 7_10 7_11 7_12".split()
)
POTSDAM_TEST = "2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13".split()
VAIHINGEN_TRAIN = "1 3 5 7 11 13 15 17 21 23 26 28 30 32 34 37".split()
VAIHINGEN_TEST = "2 4 6 8 10 12 14 16 20 22 24 27 29 31 33 35 38".split()
POTSDAM_CRS = "EPSG:32633"
VAIHINGEN_ZIP = "ISPRS_semantic_labeling_Vaihingen"
# Id of each train id, from the table of the Cityscapes scripts.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


@dataclass
class Truth:
    """What was drawn, by name of the tile or image: bands uint8 (H, W, 5) = red, green, blue, near infrared, height;
    labels and eroded labels uint8 (H, W), class indices and 255."""

    bands: dict[str, np.ndarray] = field(default_factory=dict)
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    eroded: dict[str, np.ndarray] = field(default_factory=dict)


def write_potsdam(
    root: Path,
    tiles=(*POTSDAM_TRAIN, *POTSDAM_TEST),
    size: int = 64,
    imagery=("RGB", "IRRG", "RGBIR"),
    height: bool = True,
    labels: bool = True,
    eroded: bool = True,
    participants: bool = True,
    georeference: str = "tfw",
    layout: str = "folders",
    compression: int = zipfile.ZIP_DEFLATED,
) -> Truth:
    """ISPRS Potsdam below `root`.

    Args:
        size: of a tile; 6000 for the real one.
        georeference: "tfw" (beside the images), "internal" or "none".
        layout: "folders" (`2_Ortho_RGB/...`), "double" (`2_Ortho_RGB/2_Ortho_RGB/...`, as graphical tools unpack),
            "zips" (`2_Ortho_RGB.zip` with the folder in it), or "zip of zips" (`Potsdam.zip`).
        compression: of the members of `2_Ortho_RGB.zip` and its like.
    """
    truth = Truth()
    channels = {"RGB": (0, 1, 2), "IRRG": (3, 0, 1), "RGBIR": (0, 1, 2, 3)}
    folders = {"RGB": "2_Ortho_RGB", "IRRG": "3_Ortho_IRRG", "RGBIR": "4_Ortho_RGBIR"}
    tree = root / "unzipped" if "zip" in layout else root
    for tile in tiles:
        row, column = map(int, tile.split("_"))
        rng = np.random.default_rng([row, column])
        bands, label = _scene(rng, size, size, 6)
        truth.bands[tile], truth.labels[tile], truth.eroded[tile] = bands, label, erode(label)
        where = Affine(0.05, 0, 366000 + column * size * 0.05, 0, -0.05, 5808000 - row * size * 0.05)
        for kind in imagery:
            # As handed out: strips without compression; the four bands lie in tiles here.
            path = tree / folders[kind] / f"top_potsdam_{tile}_{kind}.tif"
            options = {"tiled": True, "compress": "deflate"} if kind == "RGBIR" else {}
            if georeference == "internal":
                options |= {"crs": POTSDAM_CRS, "transform": where}
            write_tiff(path, bands[..., channels[kind]], **options)
            if georeference == "tfw":
                path.with_suffix(".tfw").write_text(dumpsw(where))
        if height:
            pixels = bands[..., 4]
            if tile == "3_13":
                pixels = pixels[:, :-1]
            path = tree / "1_DSM_normalisation" / f"dsm_potsdam_{row:02}_{column:02}_normalized_lastools.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path, quality=100)
            with Image.open(path) as decoded:
                bands[..., 4] = np.pad(np.asarray(decoded), ((0, 0), (0, size - decoded.width)), mode="edge")
        colors = ISPRS_COLORS[label]
        if tile == "6_7":
            colors[label == 4] = (252, 255, 0)
        if tile == "4_12":  # every channel off by what a lossy file would be, at most
            noise = rng.integers(0, 100, colors.shape, dtype=np.uint8)
            colors = np.where(colors == 255, 255 - noise, noise)
        if labels:
            write_tiff(tree / "5_Labels_all" / f"top_potsdam_{tile}_label.tif", colors, compress="lzw")
        if participants and tile in POTSDAM_TRAIN:
            write_tiff(tree / "5_Labels_for_participants" / f"top_potsdam_{tile}_label.tif", colors, compress="lzw")
        if eroded:
            colors[truth.eroded[tile] == 255] = 0
            path = tree / "5_Labels_all_noBoundary" / f"top_potsdam_{tile}_label_noBoundary.tif"
            write_tiff(path, colors, compress="lzw")
    if layout == "double":
        for folder in [path for path in tree.iterdir() if path.is_dir()]:
            folder.rename(tree / "moving")
            folder.mkdir()
            (tree / "moving").rename(folder / folder.name)
    if "zip" in layout:
        zips = root / "zips" if layout == "zip of zips" else root
        for folder in sorted(path for path in tree.iterdir() if path.is_dir()):
            zip_folder(folder, zips / f"{folder.name}.zip", f"{folder.name}/", compression)
        shutil.rmtree(tree)
        if layout == "zip of zips":
            zip_folder(zips, root / "Potsdam.zip", "Potsdam/", zipfile.ZIP_STORED)
            shutil.rmtree(zips)
    return truth


def write_vaihingen(
    root: Path, tiles=(*VAIHINGEN_TRAIN, *VAIHINGEN_TEST), scale: float = 1 / 32, layout: str = "folders"
) -> Truth:
    """ISPRS Vaihingen below `root`: the main zip with images and train labels, complete and eroded labels.

    Sizes are those of area 1 (1919x2569), made different from tile to tile. Layouts: "folders" or "zips". The
    eroded labels have an area 9, of which there is no image.
    """
    truth = Truth()
    tree = root / "unzipped" if layout == "zips" else root
    main, full, eroded = (
        tree / name
        for name in (
            VAIHINGEN_ZIP,
            f"{VAIHINGEN_ZIP}_ground_truth_COMPLETE",
            f"{VAIHINGEN_ZIP}_ground_truth_eroded_COMPLETE",
        )
    )
    for tile in (*tiles, "9"):
        rng = np.random.default_rng(int(tile))
        bands, label = _scene(rng, round((2569 + int(tile)) * scale), round((1919 - int(tile)) * scale), 6)
        name = f"top_mosaic_09cm_area{tile}"
        colors = ISPRS_COLORS[label]
        eroded_label = erode(label)
        eroded_colors = ISPRS_COLORS[eroded_label]
        write_tiff(eroded / f"{name}_noBoundary.tif", eroded_colors)
        if tile == "9":
            continue
        truth.bands[tile], truth.labels[tile], truth.eroded[tile] = bands, label, eroded_label
        write_tiff(main / "top" / f"{name}.tif", bands[..., (3, 0, 1)])
        write_tiff(main / "dsm" / f"dsm_09cm_matching_area{tile}.tif", bands[..., 4:].astype(np.float32))
        write_tiff(full / f"{name}.tif", colors)
        if tile in VAIHINGEN_TRAIN:
            write_tiff(main / "gts_for_participants" / f"{name}.tif", colors)
            write_tiff(main / "gts_eroded_for_participants" / f"{name}_noBoundary.tif", eroded_colors)
    if layout == "zips":
        for folder in (main, full, eroded):
            zip_folder(folder, root / f"{folder.name}.zip")
        shutil.rmtree(tree)
    return truth


def write_cityscapes(
    root: Path, cities: dict[str, dict[str, int]] | None = None, size: int = 32, layout: str = "folders"
) -> Truth:
    """Cityscapes below `root`: images, labelIds, and the files beside them that nobody needs here.

    Args:
        cities: for train, val and test the number of images of each city.
        size: height of an image, which is twice as wide; 1024 for the real one.
        layout: "folders" or "zips".
    """
    cities = cities or {"train": {"aachen": 3, "ulm": 1}, "val": {"munster": 2}, "test": {"berlin": 2}}
    truth = Truth()
    tree = root / "unzipped" if layout == "zips" else root
    for split, counts in cities.items():
        for city, count in counts.items():
            for number in range(count):
                name = f"{city}_{number:06}_000019"
                rng = np.random.default_rng([len(city), number])
                bands, label = _scene(rng, size, 2 * size, 20)
                ids = np.array([*CITYSCAPES_IDS, 4], np.uint8)[label]  # the class after the last is "static"
                label[label == 19] = 255
                ids[0, :2], label[0, :2] = (0, 255), 255  # unlabelled, and licence plate: -1 in 8 bits
                if split == "test":
                    ids[:] = 3  # out of roi: the labels stay with the makers
                truth.bands[name], truth.labels[name] = bands, label
                _save_png(tree / "leftImg8bit" / split / city / f"{name}_leftImg8bit.png", bands[..., :3])
                for ending, pixels in (
                    ("labelIds", ids),
                    ("instanceIds", ids.astype(np.uint16)),
                    ("color", bands[..., :3]),
                ):
                    _save_png(tree / "gtFine" / split / city / f"{name}_gtFine_{ending}.png", pixels)
                (tree / "gtFine" / split / city / f"{name}_gtFine_polygons.json").write_text("{}")
    for folder in ("leftImg8bit", "gtFine"):
        (tree / "README").write_text("The Cityscapes Dataset")
        if layout == "zips":
            zip_folder(tree / folder, root / f"{folder}_trainvaltest.zip", f"{folder}/", extra=tree / "README")
    if layout == "zips":
        shutil.rmtree(tree)
    return truth


def write_tiff(path: Path, pixels: np.ndarray, tiled: bool = False, **options) -> None:
    """A TIFF of pixels (H, W, C) as pixel-interleaved strips of a few rows, or as tiles of 64."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width, count = pixels.shape
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64} if tiled else {"blockysize": min(8, height)}
    options = {"photometric": "RGB"} | options if count == 3 else options
    options = {"driver": "GTiff", "interleave": "pixel", **blocks, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", height=height, width=width, count=count, dtype=pixels.dtype, **options
        ) as dataset:
            dataset.write(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def zip_folder(
    folder: Path, path: Path, prefix: str = "", compression: int = zipfile.ZIP_DEFLATED, extra: Path | None = None
) -> None:
    """A zip of the files below a folder, with folder entries and the rubbish that macOS adds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", compression, compresslevel=1) as archive:
        if prefix:
            archive.writestr(prefix, b"")
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
        archive.writestr(f"__MACOSX/{prefix}._{folder.name}.tif", b"rubbish")
        if extra is not None:
            archive.write(extra, extra.name)


def erode(label: np.ndarray, radius: int = 3) -> np.ndarray:
    """A label with 255 at every pixel that has another class within `radius` rows or columns."""
    padded = np.pad(label, radius, mode="edge")
    near = np.zeros(label.shape, bool)
    for shift in range(-radius, radius + 1):
        for rows, columns in ((shift, 0), (0, shift)):
            top, left = radius + rows, radius + columns
            near |= padded[top : top + label.shape[0], left : left + label.shape[1]] != label
    return np.where(near, np.uint8(255), label)


def _scene(rng: np.random.Generator, height: int, width: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Five noisy bands and a label of rectangles in which every class occurs."""
    step = max(height // 6, 1)
    rows, columns = -(-height // step), -(-width // step)
    cells = rng.permutation(np.arange(rows * columns) % classes).astype(np.uint8).reshape(rows, columns)
    label = np.ascontiguousarray(cells.repeat(step, 0).repeat(step, 1)[:height, :width])
    means = rng.integers(40, 200, (classes, 5), dtype=np.uint8)
    return means[label] + rng.integers(0, 40, (height, width, 5), dtype=np.uint8), label


def _save_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
