import io
import struct
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import rasterio
from affine import Affine, dumpsw
from PIL import Image

from drd_hf.data.archives import list_files
from drd_hf.data.rasters import raster_header, read_raster
from drd_hf.errors import UserError

from .official import write_tiff

WHERE = Affine(0.05, 0, 366000.0, 0, -0.05, 5808000.0)
STRUCTURES = {
    "strips": {},
    "strips lzw": {"compress": "lzw"},
    "strips deflate": {"compress": "deflate"},
    "strips jpeg": {"compress": "jpeg"},
    "strips zstd": {"compress": "zstd"},
    "planes": {"interleave": "band"},
    "planes lzw": {"interleave": "band", "compress": "lzw", "predictor": 2},
    "tiles": {"tiled": True},
    "tiles lzw": {"tiled": True, "compress": "lzw"},
    "tiles deflate": {"tiled": True, "compress": "deflate"},
    "tiles jpeg": {"tiled": True, "compress": "jpeg", "photometric": "YCBCR"},
    "BigTIFF": {"BIGTIFF": "YES"},
    "big-endian": {"ENDIANNESS": "BIG"},
    "big-endian BigTIFF": {"ENDIANNESS": "BIG", "BIGTIFF": "YES"},
}


@pytest.fixture(autouse=True)
def _quiet_writer():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        yield


def noise(height=100, width=130, count=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, count), dtype=np.uint8)


def save(path, pixels, **options):
    if path.suffix == ".tif":
        write_tiff(path, pixels, **options)
    else:
        Image.fromarray(pixels if pixels.ndim == 2 or pixels.shape[2] > 1 else pixels[..., 0]).save(path, **options)
    return path


def zipped(path, folder, compression=zipfile.ZIP_DEFLATED):
    """The files of a folder as records of zip members."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return {file.name: file for file in list_files(path)}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_pixels_do_not_depend_on_the_structure_of_a_tiff(tmp_path, structure):
    pixels = noise()
    path = save(tmp_path / "a.tif", pixels, **STRUCTURES[structure])
    raster = read_raster(path)
    assert raster.pixels.dtype == np.uint8 and raster.pixels.flags["C_CONTIGUOUS"]
    assert raster.valid is None and raster.transform is None and raster.crs is None
    if "jpeg" in structure:
        assert raster.pixels.shape == pixels.shape
    else:
        np.testing.assert_array_equal(raster.pixels, pixels)
    header = raster_header(path)
    assert (header.height, header.width, header.count, header.dtype) == (100, 130, 3, "uint8")


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_any_number_of_bands_is_read(tmp_path, count):
    pixels = noise(count=count)
    path = save(tmp_path / "a.tif", pixels, photometric="minisblack", alpha="NO")
    np.testing.assert_array_equal(read_raster(path).pixels, pixels)
    np.testing.assert_array_equal(read_raster(path, (count, 1)).pixels, pixels[..., [count - 1, 0]])
    assert raster_header(path).count == count


@pytest.mark.parametrize("count", [1, 3])
def test_png_and_jpeg_are_read(tmp_path, count):
    pixels = noise(count=count)
    np.testing.assert_array_equal(read_raster(save(tmp_path / "a.png", pixels)).pixels, pixels)
    path = save(tmp_path / "a.jpg", pixels)
    with Image.open(path) as image:
        expected = np.asarray(image).reshape(pixels.shape)
    np.testing.assert_array_equal(read_raster(path).pixels, expected)
    np.testing.assert_array_equal(read_raster(path, (count,)).pixels, expected[..., count - 1 :])
    for file in ("a.png", "a.jpg"):
        header = raster_header(tmp_path / file)
        assert (header.height, header.width, header.count) == (100, 130, count)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_member_of_a_zip_reads_like_the_file(tmp_path, compression):
    folder = tmp_path / "files"
    pixels = noise()
    for name in ("a.tif", "a.png", "a.jpg"):
        folder.mkdir(exist_ok=True)
        save(folder / name, pixels)
    members = zipped(tmp_path / "a.zip", folder, compression)
    for name in ("a.tif", "a.png", "a.jpg"):
        record = members[name]
        assert raster_header(record) == raster_header(folder / name)
        np.testing.assert_array_equal(read_raster(record).pixels, read_raster(folder / name).pixels)


def test_invalid_pixels_come_from_no_data_value_alpha_and_mask(tmp_path):
    pixels = noise() // 2 + 1
    hole = np.zeros((100, 130), bool)
    hole[20:40, 50:90] = True

    no_data = pixels.copy()
    no_data[hole] = 0
    no_data[0, 0, 0] = 0  # a zero in one band is a value
    raster = read_raster(save(tmp_path / "no_data.tif", no_data, nodata=0))
    np.testing.assert_array_equal(raster.valid, ~hole)

    alpha = np.dstack([pixels, np.where(hole, 0, 200).astype(np.uint8)])
    for path in (save(tmp_path / "alpha.tif", alpha, photometric="RGB", alpha="YES"), save(tmp_path / "a.png", alpha)):
        raster = read_raster(path)
        np.testing.assert_array_equal(raster.pixels, pixels)
        np.testing.assert_array_equal(raster.valid, ~hole)
        assert raster_header(path).count == 3 and raster_header(path).alpha

    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        path = save(tmp_path / "mask.tif", pixels)
        with rasterio.open(path, "r+") as dataset:
            dataset.write_mask(~hole)
    np.testing.assert_array_equal(read_raster(path).valid, ~hole)


def test_an_alpha_band_without_holes_needs_no_mask(tmp_path):
    pixels = np.dstack([noise(), np.full((100, 130), 255, np.uint8)])
    assert read_raster(save(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES")).valid is None


def test_a_fourth_band_that_is_asked_for_is_data_even_if_marked_as_alpha(tmp_path):
    """Some tools mark every fourth band as alpha, near infrared too; its zeros must not make pixels invalid."""
    pixels = noise(count=4)
    pixels[:50, :, 3] = 0
    raster = read_raster(save(tmp_path / "a.tif", pixels, photometric="RGB", alpha="YES"), (1, 2, 3, 4))
    np.testing.assert_array_equal(raster.pixels, pixels)
    assert raster.valid is None


def test_a_palette_becomes_colours_unless_indices_are_asked_for(tmp_path):
    indices = noise(count=1) % 3
    colors = np.array([(0, 0, 255), (255, 255, 0), (9, 8, 7)], np.uint8)
    save(tmp_path / "a.tif", indices, photometric="palette")
    with rasterio.open(tmp_path / "a.tif", "r+") as dataset:
        dataset.write_colormap(1, {i: (*color, 255) for i, color in enumerate(colors.tolist())})
    image = Image.fromarray(indices[..., 0]).convert("P")
    image.putpalette(colors.ravel().tolist())
    image.putdata(indices.ravel().tolist())
    image.save(tmp_path / "a.png")
    for path in (tmp_path / "a.tif", tmp_path / "a.png"):
        np.testing.assert_array_equal(read_raster(path).pixels, colors[indices[..., 0]])
        np.testing.assert_array_equal(read_raster(path, (1,)).pixels, indices)
        assert raster_header(path).count == 3


def test_georeference_of_the_file_is_kept(tmp_path):
    path = save(tmp_path / "a.tif", noise(), crs="EPSG:32633", transform=WHERE)
    for found in (raster_header(path), read_raster(path)):
        assert found.crs == "EPSG:32633"
        assert found.transform == pytest.approx(tuple(WHERE)[:6])


def test_a_crs_without_a_number_is_given_as_wkt(tmp_path):
    crs = rasterio.crs.CRS.from_proj4("+proj=tmerc +lat_0=1 +lon_0=2 +k=0.9 +x_0=3 +y_0=4 +ellps=bessel")
    found = raster_header(save(tmp_path / "a.tif", noise(), crs=crs, transform=WHERE)).crs
    assert rasterio.crs.CRS.from_wkt(found) == crs


@pytest.mark.parametrize(
    ("image", "world"), [("a.tif", "a.tfw"), ("a.tif", "a.TFW"), ("a.png", "a.pgw"), ("a.jpg", "a.wld")]
)
def test_a_world_file_beside_the_image_gives_the_corner_of_the_first_pixel(tmp_path, image, world):
    folder = tmp_path / "files"
    folder.mkdir()
    path = save(folder / image, noise())
    # A world file holds the centre of the first pixel.
    (folder / world).write_text("0.05\n0\n0\n-0.05\n366000.025\n5807999.975\n")
    member = zipped(tmp_path / "a.zip", folder)[image]
    for source in (path, member):
        assert raster_header(source).transform == pytest.approx((0.05, 0, 366000.0, 0, -0.05, 5808000.0))
        assert read_raster(source).transform == raster_header(source).transform


def test_the_files_own_georeference_wins_over_a_world_file(tmp_path):
    path = save(tmp_path / "a.tif", noise(), crs="EPSG:32633", transform=WHERE)
    path.with_suffix(".tfw").write_text(dumpsw(Affine.translation(7, 7)))
    assert raster_header(path).transform == pytest.approx(tuple(WHERE)[:6])


def test_a_broken_world_file_is_named(tmp_path):
    path = save(tmp_path / "a.tif", noise())
    path.with_suffix(".tfw").write_text("0.05\n0\n")
    with pytest.raises(UserError, match=r"a\.tfw: is no world file"):
        raster_header(path)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_values_that_are_not_8_bit_are_refused(tmp_path, dtype):
    path = save(tmp_path / "a.tif", noise().astype(dtype))
    for function in (raster_header, read_raster):
        with pytest.raises(UserError, match=rf"a\.tif: has {dtype} values; convert it to 8 bits"):
            function(path)


def test_values_of_fewer_bits_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", noise() % 16, nbits=4)
    with pytest.raises(UserError, match=r"a\.tif: has 4 bits a band; convert it to 8 bits"):
        read_raster(path)


def test_other_integers_are_read_where_they_are_allowed(tmp_path):
    pixels = noise(count=1).astype(np.int32) - 1
    raster = read_raster(save(tmp_path / "a.tif", pixels), integers=True)
    assert raster.pixels.dtype == np.int32
    np.testing.assert_array_equal(raster.pixels, pixels)


def test_a_band_that_is_not_there_is_an_error(tmp_path):
    for name in ("a.tif", "a.jpg"):
        with pytest.raises(UserError, match="has no band 4, it has 3"):
            read_raster(save(tmp_path / name, noise()), (1, 4))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_tiff_that_is_cut_anywhere_is_an_error(tmp_path, structure):
    """Decoders hand out zeros or the strip before for what is missing, some with a warning, some without."""
    data = save(tmp_path / "whole.tif", noise(), **STRUCTURES[structure]).read_bytes()
    assert_cuts_are_errors(tmp_path / "cut.tif", data)


@pytest.mark.parametrize("structure", [name for name in STRUCTURES if name != "big-endian BigTIFF"])
def test_missing_strips_and_tiles_are_seen_from_the_header(tmp_path, structure):
    """Hours of conversion should not pass before the last image turns out to be cut short."""
    data = save(tmp_path / "whole.tif", noise(), **STRUCTURES[structure]).read_bytes()
    (tmp_path / "cut.tif").write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"cut\.tif: is cut short, strips or tiles lie behind its end"):
        raster_header(tmp_path / "cut.tif")


@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"])
def test_a_tiff_with_its_directory_at_the_end_that_is_cut_anywhere_is_an_error(tmp_path, compression):
    data = save(tmp_path / "whole.png", noise())
    with Image.open(data) as image:
        file = io.BytesIO()
        image.save(file, "TIFF", compression=compression)
    assert_cuts_are_errors(tmp_path / "cut.tif", file.getvalue())


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_png_or_jpeg_that_is_cut_anywhere_is_an_error(tmp_path, name):
    data = save(tmp_path / name, noise()).read_bytes()
    assert_cuts_are_errors(tmp_path / f"cut-{name}", data)


def assert_cuts_are_errors(path, data):
    size = len(data)
    for cut in {0, 3, 5, 10, 20, 50, 200, 500, size // 4, size // 2, size - 200, size - 20, *range(size - 5, size)}:
        path.write_bytes(data[:cut])
        with pytest.raises(UserError, match=r"cut[^/]*: .*; (get it again|convert it to one of them)$") as caught:
            read_raster(path)
        assert "\n" not in str(caught.value), cut


def test_a_tiff_whose_writer_was_killed_is_an_error(tmp_path):
    """A writer that dies leaves strips with no offset and no bytes, which GDAL reads as zeros without a word."""
    path = save(tmp_path / "a.tif", np.zeros((100, 130, 3), np.uint8), SPARSE_OK=True)
    for function in (raster_header, read_raster):
        with pytest.raises(UserError, match="were never written"):
            function(path)


def test_a_sparse_tiff_with_a_no_data_value_has_no_data_there(tmp_path):
    pixels = np.zeros((128, 128, 3), np.uint8)
    pixels[:64, :64] = 7
    raster = read_raster(save(tmp_path / "a.tif", pixels, SPARSE_OK=True, tiled=True, nodata=0))
    np.testing.assert_array_equal(raster.valid, pixels[..., 0] > 0)


def test_a_damaged_strip_is_an_error_that_names_the_file(tmp_path):
    path = save(tmp_path / "a.tif", noise(), compress="deflate")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 50] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tif: is damaged"):
        read_raster(path)


def test_a_damaged_member_of_a_zip_is_an_error(tmp_path):
    """Strips without compression have no checksum of their own; the zip has one."""
    folder = tmp_path / "files"
    save(folder / "a.tif", noise())
    zipped(tmp_path / "a.zip", folder, zipfile.ZIP_STORED)
    data = bytearray((tmp_path / "a.zip").read_bytes())
    data[20_000] ^= 1
    (tmp_path / "a.zip").write_bytes(data)
    (record,) = list_files(tmp_path / "a.zip")
    with pytest.raises(UserError, match=r"a\.zip/a\.tif: is damaged"):
        read_raster(record)


def claims(path, tags, body=b"\0" * 100):
    """A small TIFF with these tags: (number, type, value), type 3 of 2 and 4 of 4 bytes."""
    entries = b"".join(struct.pack("<HHII", number, kind, 1, value) for number, kind, value in sorted(tags))
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + body)
    return path


@pytest.mark.parametrize(("side", "compression"), [(40_000, 1), (20_000, 1), (20_000, 5), (30_000, 50000)])
def test_absurd_sizes_are_refused_from_the_header(tmp_path, side, compression):
    tags = [(256, 4, side), (257, 4, side), (258, 3, 8), (259, 3, compression), (262, 3, 1)]
    tags += [(273, 4, 140), (277, 3, 1), (278, 4, side), (279, 4, 50)]
    path = claims(tmp_path / "a.tif", tags)
    for function in (raster_header, read_raster):
        with pytest.raises(UserError, match=rf"a\.tif: claims {side}x{side} pixels"):
            function(path)


def test_absurd_sizes_of_png_and_jpeg_are_refused_from_the_header(tmp_path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(png)
    jpeg = save(tmp_path / "a.jpg", noise()).read_bytes()
    frame = jpeg.index(b"\xff\xc0") + 5
    (tmp_path / "a.jpg").write_bytes(jpeg[:frame] + struct.pack(">HH", 60_000, 60_000) + jpeg[frame + 4 :])
    for name, size in (("a.png", "50000x50000"), ("a.jpg", "60000x60000")):
        with pytest.raises(UserError, match=f"{name}: claims {size} pixels"):
            read_raster(tmp_path / name)


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.tif").write_text('<VRTDataset rasterXSize="1" rasterYSize="1"></VRTDataset>')
    with pytest.raises(UserError, match=r"a\.tif: is no TIFF, PNG or JPEG file"):
        read_raster(tmp_path / "a.tif")
    with pytest.raises(UserError, match=r"b\.tif: cannot be read"):
        raster_header(tmp_path / "b.tif")


def test_names_that_look_like_addresses_are_only_names(tmp_path):
    folder = tmp_path / "zip+https:"
    path = save(folder / "vsicurl!x?y=1#z é.tif", noise())
    np.testing.assert_array_equal(read_raster(path).pixels, noise())
