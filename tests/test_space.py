"""The Space of a model: what is in its folder, what it says about images, and what happens in a real browser."""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import rasterio
import yaml
from PIL import Image, ImageOps
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_origin
from transformers import SegformerImageProcessor

from drd_hf.errors import UserError
from drd_hf.inference import predict_image
from drd_hf.models import load_image_processor, load_teacher
from drd_hf.space import write_space

from .conftest import ENCODERS, tiny_config, tiny_encoder, tiny_model

pytestmark = pytest.mark.filterwarnings(f"ignore::{NotGeoreferencedWarning.__module__}.NotGeoreferencedWarning")

ROOT = Path(__file__).resolve().parents[1]
# Each would run something if it were taken for markup, a template, Python or YAML.
LABELS = ["</script><img src=x onerror=alert(1)>", '"]\n---\n${alert(2)}', "{{this}} 'tree' & <b>more</b>"]
TITLE = '</title><script>alert(3)</script> "it\'s": {{a}}\n---\nsdk: docker'
COLORS = [(250, 200, 0), (255, 255, 255), (0, 90, 30)]
UTM = {"crs": "EPSG:32640", "transform": from_origin(300000, 2780000, 0.5, 0.5)}


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> Path:
    """A folder like that of a run: a tiny model with labels that attack, and two examples."""
    folder = tmp_path_factory.mktemp("run") / "student"
    config = tiny_config("segformer")
    assert config.num_labels == len(LABELS)
    model = tiny_model("segformer")
    model.config.id2label = dict(enumerate(LABELS))
    model.config.label2id = {name: i for i, name in enumerate(LABELS)}
    model.config.class_colors = [list(color) for color in COLORS]
    model.save_pretrained(folder)
    SegformerImageProcessor(do_resize=False, do_reduce_labels=False).save_pretrained(folder)
    (folder / "examples").mkdir()
    Image.fromarray(scene(150, 210)).save(folder / "examples" / "b.png")
    write_tiff(folder / "examples" / "a.tif", scene(100, 90, seed=1), **UTM)
    return folder


@pytest.fixture(scope="module")
def segmenter(student):
    from drd_hf.space.segment import Segmenter

    return Segmenter(str(student))


def scene(height, width, seed=0, bands=3):
    """Blobs of 10 pixels, so that the classes of a model without training form areas."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 10 + 1, width // 10 + 1, bands), dtype=np.uint8)
    return coarse.repeat(10, 0).repeat(10, 1)[:height, :width]


def write_tiff(path, pixels, **profile):
    height, width, bands = pixels.shape
    profile = {"driver": "GTiff", "dtype": pixels.dtype, "count": bands, "height": height, "width": width} | profile
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(pixels.transpose(2, 0, 1))
    return path


def expected(student, pixels):
    return predict_image(load_teacher(student), load_image_processor(student), pixels)


def test_the_folder_is_a_complete_space(student, tmp_path):
    files = write_space(tmp_path / "space", student, title="Town", license="apache-2.0")
    names = {str(path.relative_to(tmp_path / "space")) for path in files}
    assert names == {str(p.relative_to(tmp_path / "space")) for p in (tmp_path / "space").rglob("*") if p.is_file()}
    assert {"app.py", "requirements.txt", "README.md", "LICENSE", "space.json"} <= names
    assert {"examples/01.tif", "examples/02.png", "drd_hf/inference/raster.py", "drd_hf/space/style.css"} <= names
    assert (tmp_path / "space" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert not [name for name in names if name.startswith(("drd_hf/trainer", "drd_hf/hub", "drd_hf/cards"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["space"]


def test_the_card_of_a_space_names_the_model_and_how_it_starts(tmp_path):
    write_space(tmp_path / "space", "org/drd-student", license="mit")
    _, header, body = re.split(r"^---\n", (tmp_path / "space" / "README.md").read_text(), maxsplit=2, flags=re.M)
    card = yaml.safe_load(header)
    assert card["sdk"] == "gradio" and re.fullmatch(r"\d+\.\d+\.\d+", card["sdk_version"])
    assert (card["app_file"], card["models"], card["license"]) == ("app.py", ["org/drd-student"], "mit")
    assert card["title"] == "drd-student" and len(card["short_description"]) <= 60  # the Hub's limit
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}  # all that the Hub knows
    assert {card["colorFrom"], card["colorTo"]} <= colors
    assert "https://huggingface.co/org/drd-student" in body
    write_space(tmp_path / "other", "org/drd-student")
    assert "license:" not in (tmp_path / "other" / "README.md").read_text()


def test_a_title_cannot_leave_its_place_in_the_card(student, tmp_path):
    write_space(tmp_path / "space", student, title=TITLE)
    _, header, body = re.split(r"^---\n", (tmp_path / "space" / "README.md").read_text(), maxsplit=2, flags=re.M)
    card = yaml.safe_load(header)
    assert card["title"] == " ".join(TITLE.split()) and card["sdk"] == "gradio"
    assert "script" not in body and str(student.parent) not in header + body
    app = (tmp_path / "space" / "app.py").read_text()
    assert app == (ROOT / "drd_hf/space/templates/app.py").read_text()


def test_requirements_are_those_of_the_package(tmp_path):
    """A Space installs what its sources import, and nothing older than the package supports."""
    space = tmp_path / "space"
    write_space(space, "org/student")

    def floors(text):
        return dict(re.findall(r"^ *([\w-]+)(>=[\d.]+)$", text, re.M))

    required, supported = floors((space / "requirements.txt").read_text()), floors((ROOT / "setup.cfg").read_text())
    assert required.items() <= supported.items()
    imported = set()
    for path in (space / "drd_hf").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:  # at the top of a module: others are optional
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.split(".")[0])
    names = {"PIL": "pillow", "yaml": "PyYAML", "huggingface_hub": "huggingface-hub"}
    needed = {names.get(name, name) for name in imported - set(sys.stdlib_module_names) - {"drd_hf"}}
    assert needed <= set(required), needed - set(required)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("no such", {}, "neither a folder nor a Hub id"),
        ("org/student", {"examples": ["{tmp}/text.png"]}, "is no PNG, JPEG or TIFF image"),
        ("org/student", {"examples": ["{tmp}/missing.png"]}, "is no PNG, JPEG or TIFF image"),
        ("{tmp}/empty", {}, "has no config.json"),
    ],
)
def test_what_makes_no_space_is_refused_and_leaves_nothing(model, options, message, tmp_path):
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.iterdir())
    options = {key: [value.format(tmp=tmp_path) for value in values] for key, values in options.items()}
    with pytest.raises(UserError, match=message):
        write_space(tmp_path / "space", model.format(tmp=tmp_path), **options)
    assert sorted(tmp_path.iterdir()) == before


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something already"):
        write_space(tmp_path / "space", "org/student")
    assert [path.name for path in (tmp_path / "space").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("ending", ["png", "jpg", "tif"])
def test_the_map_is_that_of_predict_image(ending, student, segmenter, tmp_path):
    """Also where the image is larger than one window."""
    pixels = scene(530, 600)
    path = tmp_path / f"town.{ending}"
    Image.fromarray(pixels).save(path)
    with rasterio.open(path) as dataset:
        pixels = dataset.read().transpose(1, 2, 0)  # of a JPEG others than were saved
    (tmp_path / "out").mkdir()
    result = segmenter(path, tmp_path / "out")
    classes = np.asarray(Image.open(result.file))
    assert result.file.name == f"town-classes.{'tif' if ending == 'tif' else 'png'}"
    assert Image.open(result.file).mode == "P"
    assert np.array_equal(classes, expected(student, pixels)) and len(np.unique(classes)) > 1
    assert result.shares == pytest.approx([(classes == i).mean() for i in range(3)])
    assert (result.height, result.width, result.crs, result.no_data) == (530, 600, None, 0)


def test_a_geotiff_stays_a_geotiff(student, segmenter, tmp_path):
    pixels = scene(120, 80)
    pixels[:30] = 0  # no data
    path = write_tiff(tmp_path / "ortho.tif", pixels, nodata=0, **UTM)
    result = segmenter(path, tmp_path)
    with rasterio.open(result.file) as dataset:
        assert (dataset.crs, dataset.transform) == (rasterio.CRS.from_epsg(32640), UTM["transform"])
        assert [dataset.colormap(1)[i][:3] for i in range(3)] == COLORS
        classes = dataset.read(1)
    assert (classes[:30] == 255).all() and (classes[30:] < 3).all()
    assert result.crs == "EPSG:32640" and result.no_data == pytest.approx(0.25)
    assert sum(result.shares) == pytest.approx(1)


def test_where_there_is_no_data_the_page_shows_the_image(segmenter, tmp_path):
    """A palette as short as the list of classes made a PNG of 4 bits or fewer: 255 became a class, and its colour
    covered what has no data.
    """
    pixels = np.dstack([scene(60, 80), np.full((60, 80), 255, np.uint8)])
    pixels[:20, :, 3] = 0
    Image.fromarray(pixels).save(tmp_path / "cut_out.png")
    result = segmenter(tmp_path / "cut_out.png", tmp_path)
    shown = np.asarray(Image.open(io.BytesIO(result.classes)).convert("RGBA"))
    assert (shown[:20, :, 3] == 0).all() and (shown[20:, :, 3] == 255).all()
    assert {tuple(color) for color in shown[20:].reshape(-1, 4)[:, :3].tolist()} <= set(COLORS)
    assert result.no_data == pytest.approx(1 / 3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_shown_upright(orientation, tmp_path):
    """A phone or drone stores how it was held beside the pixels: page, map and example came out on their side, unlike
    what viewers and the pipeline of transformers show.
    """
    from drd_hf.space.images import copy_upright, opened, reading, thumbnail

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(scene(40, 60)).save(tmp_path / "photo.jpg", exif=exif, quality=100, subsampling=0)
    with Image.open(tmp_path / "photo.jpg") as photo:
        wanted = np.asarray(ImageOps.exif_transpose(photo)).astype(int)
    with reading(), opened(tmp_path / "photo.jpg") as dataset:
        copy_upright(dataset, tmp_path / "copy.tif")
    with rasterio.open(tmp_path / "copy.tif") as dataset:
        copy = dataset.read().transpose(1, 2, 0)
    assert copy.shape == wanted.shape and abs(copy - wanted).max() <= 2  # decoders differ
    assert np.abs(np.asarray(thumbnail(tmp_path / "photo.jpg")) - wanted).max() <= 2


def test_a_photograph_on_its_side_gives_an_upright_map(student, segmenter, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scene(40, 60)).save(tmp_path / "photo.jpg", exif=exif)
    (tmp_path / "out").mkdir()
    result = segmenter(tmp_path / "photo.jpg", tmp_path / "out")
    with rasterio.open(tmp_path / "photo.jpg") as dataset:
        upright = np.rot90(dataset.read().transpose(1, 2, 0), -1)  # clockwise
    assert (result.height, result.width) == (60, 40)
    assert np.array_equal(np.asarray(Image.open(result.file)), expected(student, np.ascontiguousarray(upright)))


def test_the_page_shows_large_images_small(segmenter, tmp_path, monkeypatch):
    monkeypatch.setattr("drd_hf.space.images.PREVIEW", 100)
    path = tmp_path / "wide.png"
    Image.fromarray(scene(60, 300)).save(path)
    result = segmenter(path, tmp_path)
    sizes = {Image.open(io.BytesIO(content)).size for content in (result.image, result.classes)}
    assert sizes == {(100, 20)}


def test_images_that_cannot_be_segmented_are_one_clear_sentence(segmenter, tmp_path):
    pixels = scene(64, 64)
    text = tmp_path / "text.png"
    text.write_text("no image")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "grey.png")
    write_tiff(tmp_path / "four.tif", scene(64, 64, bands=4), photometric="minisblack")
    write_tiff(tmp_path / "deep.tif", pixels.astype(np.uint16))
    Image.fromarray(scene(640, 640)).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    write_tiff(tmp_path / "empty.tif", np.zeros_like(pixels), nodata=0)
    profile = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 7000, "width": 7000}
    with rasterio.open(tmp_path / "huge.tif", "w", sparse_ok=True, tiled=True, compress="deflate", **profile):
        pass
    (tmp_path / "out").mkdir()
    for name, message in {
        "text.png": "This is no PNG, JPEG or TIFF image",
        "grey.png": r"has 1 band, the model reads 3 bands \(red, green, blue\)",
        "four.tif": "has 4 bands, the model reads 3 bands",
        "deep.tif": "has uint16 values, the model reads 8 bits",
        "cut.jpg": "damaged or cut short",
        "empty.tif": "The image: has no pixel with data",
        "huge.tif": "49 million, and 40 million are the limit",
    }.items():
        with pytest.raises(UserError, match=message) as error:
            segmenter(tmp_path / name, tmp_path / "out")
        assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)
    assert not list((tmp_path / "out").iterdir())


def test_a_model_that_cannot_segment_is_refused(tmp_path):
    from drd_hf.space.segment import Segmenter

    tiny_encoder(next(iter(ENCODERS))).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a Space needs a semantic segmentation model"):
        Segmenter(str(tmp_path))


def test_an_upload_cannot_name_other_files(segmenter, tmp_path):
    """GDAL takes the XML of a virtual raster for an image, whatever its ending, and reads what it names: files of the
    server, or addresses in its network.
    """
    secret = write_tiff(tmp_path / "secret.tif", scene(64, 64))
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{i}"><SimpleSource><SourceFilename>{secret}</SourceFilename>'
        f"<SourceBand>{i}</SourceBand></SimpleSource></VRTRasterBand>"
        for i in (1, 2, 3)
    )
    upload = tmp_path / "image.png"
    upload.write_text(f'<VRTDataset rasterXSize="64" rasterYSize="64">{bands}</VRTDataset>')
    with rasterio.open(upload) as dataset:
        assert dataset.read(1).any()  # the attack works where nothing stops it
    with pytest.raises(UserError, match="This is no PNG, JPEG or TIFF image"):
        segmenter(upload, tmp_path)


def test_text_of_users_stays_text_on_the_page():
    from drd_hf.space import page

    texts = [page.legend(LABELS, COLORS, [0.5, 0.3, 0.2]), page.header(TITLE, LABELS[0], False, 1, LABELS[1])]
    texts += [page.problem(LABELS[0]), page.note(LABELS[0], 1, 1)]
    for text in texts:
        assert not re.search(r"<(script|img|b)\b", text)
        for tag in re.findall(r"<[^>]*>", text):
            assert "alert" not in re.sub(r'"[^"]*"', "", tag)


def test_legend_shares_are_sorted_and_rounded():
    from drd_hf.space import page

    text = page.legend(["road", "tree", "pond"], COLORS, [0.25, 0.7496, 0.0004])
    assert re.findall(r'class="name"[^>]*>(\w+)<', text) == ["tree", "road", "pond"]
    assert re.findall(r'class="share">([^<]*)<', text) == ["75.0%", "25.0%", "&lt;0.1%"]


# ------------------------------------------------------------------------------------------------ the running app


@pytest.fixture(scope="module")
def space(student, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("spaces") / "space"
    write_space(folder, student, title=TITLE)
    return folder


@pytest.fixture(scope="module")
def server(space, tmp_path_factory):
    """Address of a Space that runs as on the Hub: `python app.py`, with no other drd_hf than its own."""
    pytest.importorskip("gradio", reason="needs gradio: pip install drd-hf[space]")
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = tmp_path_factory.mktemp("tmp")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"GRADIO_SERVER_PORT": str(port), "HF_HUB_OFFLINE": "1", "TMPDIR": str(files)}
    with open(files.parent / "log.txt", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, "app.py"], cwd=space, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 120
            while time.monotonic() < deadline:
                assert process.poll() is None, Path(log.name).read_text()
                with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                    break
                time.sleep(0.2)
            yield f"http://127.0.0.1:{port}/"
            process.send_signal(signal.SIGTERM)
            process.wait(30)
            assert not list(files.glob("drd-space-*")), "files of users are left behind"
            assert "Traceback" not in Path(log.name).read_text()
        finally:
            process.kill()
            process.wait()


def test_programs_can_ask_a_space(space, student, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs gradio: pip install drd-hf[space]")
    from gradio.route_utils import delete_files_created_by_app
    from gradio_client import Client, handle_file

    from drd_hf.space.app import build

    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "files"))
    pixels = scene(90, 70, seed=2)
    path = write_tiff(tmp_path / "ortho.tif", pixels, **UTM)
    app = build(space)
    try:
        _, address, _ = app.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
        client = Client(address, verbose=False, download_files=tmp_path / "downloads")
        view, legend, download, _ = client.predict(handle_file(path), api_name="/segment")
        (tmp_path / "text.png").write_text("no image")
        refused, _, _, _ = client.predict(handle_file(tmp_path / "text.png"), api_name="/segment")
        files = [path for path in (tmp_path / "files").rglob("*") if path.suffix in (".tif", ".png")]
        delete_files_created_by_app(app, age=None)  # what happens on schedule to those that are old enough
    finally:
        app.close()
    assert {path.name for path in files} == {"ortho.tif", "ortho-classes.tif", "text.png"}
    assert not any(path.exists() for path in files)
    with rasterio.open(download["value"]) as dataset:
        assert dataset.crs == UTM["crs"] and np.array_equal(dataset.read(1), expected(student, pixels))
    assert "70 × 90 pixels · EPSG:32640" in view and "onerror" in legend and "<img" not in legend
    assert "This is no PNG, JPEG or TIFF image" in refused


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """A page on the Space; at the end, nothing may have gone to other hosts, and nothing may have gone wrong."""
    context = browser.new_context(accept_downloads=True, viewport={"width": 1300, "height": 900})
    page, requests, wrong = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("dialog", lambda dialog: (wrong.append(f"dialog {dialog.message}"), dialog.dismiss()))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.set_default_timeout(60_000)
    page.goto(server)
    page.wait_for_selector(".drd-examples img")
    yield page, requests
    context.close()
    assert not wrong
    assert not [url for url in requests if not url.startswith((server, "data:", "blob:"))]


def calls(requests):
    return [url for url in requests if "/gradio_api/" in url and ("/queue/" in url or "/run/" in url)]


@pytest.mark.slow
def test_a_visitor_picks_an_example_and_takes_its_map_home(visit, student, tmp_path):
    page, requests = visit
    shown = page.locator(".legend .name").all_text_contents()
    assert shown == [" ".join(label.split()) for label in LABELS]
    assert page.locator("h1").text_content() == " ".join(TITLE.split())
    assert page.locator("img[src=x]").count() == 0

    page.locator(".drd-examples .thumbnail-item").nth(1).click()
    page.wait_for_selector("img.classes")
    sizes = page.evaluate(
        "[...document.querySelectorAll('.stack img')].map(i => [i.complete, i.naturalWidth, i.naturalHeight])"
    )
    assert sizes == [[True, 210, 150]] * 2
    boxes = [page.locator(f".stack img.{name}").bounding_box() for name in ("image", "classes")]
    assert boxes[0] == boxes[1]

    wanted = expected(student, scene(150, 210))
    shares = [float(text[:-1]) for text in page.locator(".legend .share").all_text_contents()]
    assert shares == pytest.approx(sorted(((wanted == i).mean() * 100 for i in range(3)), reverse=True), abs=0.06)

    with page.expect_download() as download:
        page.locator("a, button").filter(has_text="Download PNG").last.click()
    download.value.save_as(tmp_path / "map.png")
    with Image.open(tmp_path / "map.png") as saved:
        assert saved.mode == "P" and np.array_equal(np.asarray(saved), wanted)
        assert saved.getpalette()[: 3 * len(COLORS)] == [value for color in COLORS for value in color]


@pytest.mark.slow
def test_the_opacity_changes_without_another_prediction(visit):
    page, requests = visit
    page.locator(".drd-examples .thumbnail-item").nth(1).click()
    page.wait_for_selector("img.classes")
    page.wait_for_timeout(500)
    before, made = len(calls(requests)), page.locator("img.classes").screenshot()
    assert before > 0
    opacity = "getComputedStyle(document.querySelector('img.classes')).opacity"
    assert page.evaluate(opacity) == "0.6"
    slider = page.locator("input[type=range]")
    slider.focus()
    for _ in range(60):
        slider.press("ArrowLeft")
    page.wait_for_timeout(500)
    assert page.evaluate(opacity) == "0"
    assert len(calls(requests)) == before
    assert page.locator("img.classes").screenshot() != made


@pytest.mark.slow
def test_a_visitor_uploads_a_geotiff_and_then_no_image(visit, student, tmp_path):
    page, _ = visit
    pixels = scene(110, 130, seed=3)
    path = write_tiff(tmp_path / "ortho.tif", pixels, **UTM)
    page.locator("input[type=file]").first.set_input_files(path)
    page.wait_for_selector("figcaption:has-text('ortho.tif')")
    assert page.locator("figcaption").text_content() == "ortho.tif · 130 × 110 pixels · EPSG:32640"
    with page.expect_download() as download:
        page.locator("a, button").filter(has_text="Download GeoTIFF").last.click()
    download.value.save_as(tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.crs, dataset.transform) == (rasterio.CRS.from_epsg(32640), UTM["transform"])
        assert np.array_equal(dataset.read(1), expected(student, pixels))

    (tmp_path / "text.png").write_text("no image")
    page.wait_for_selector(".drd-upload input[type=file]", state="attached")
    page.locator(".drd-upload input[type=file]").set_input_files(tmp_path / "text.png")
    page.wait_for_selector("[role=alert]:has-text('This is no PNG, JPEG or TIFF image')")
    assert page.locator("img.classes").count() == 0
    assert page.locator("a, button").filter(has_text="Download GeoTIFF").count() == 0
    page.locator(".drd-examples .thumbnail-item").nth(0).click()
    page.wait_for_selector("figcaption:has-text('Example 1 · 90 × 100 pixels · EPSG:32640')")


@pytest.mark.slow
def test_nothing_is_cut_off_on_a_phone(visit):
    page, _ = visit
    page.set_viewport_size({"width": 360, "height": 740})
    page.locator(".drd-examples .thumbnail-item").nth(1).click()
    page.wait_for_selector("img.classes")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for selector in ("h1", ".stack", ".legend", "input[type=range]"):
        box = page.locator(selector).first.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360, selector


def test_the_command_writes_a_space_or_says_what_is_wrong(student, tmp_path):
    def run(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "drd_hf.space", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
        )

    assert run(student, "--output", tmp_path / "space").returncode == 0
    assert json.loads((tmp_path / "space" / "space.json").read_text())["title"] == "student"
    again = run(student, "--output", tmp_path / "space")
    assert again.returncode and again.stderr.startswith("error: ") and len(again.stderr.splitlines()) == 1
