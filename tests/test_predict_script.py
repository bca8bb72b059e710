"""scripts/predict.py as a user runs it: many inputs, wrong ones among them, one process or two."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import from_origin
from transformers import SegformerImageProcessor

from drd_hf.errors import UserError
from drd_hf.inference.files import check_outputs, find_images, name_outputs, share_out

from .conftest import tiny_model

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [str(ROOT / "scripts" / "predict.py")]
TWO_PROCESSES = "-m torch.distributed.run --standalone --nproc_per_node 2".split()


def run(*words, cwd, processes=1):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    launcher = TWO_PROCESSES if processes == 2 else []
    return subprocess.run(
        [sys.executable, *launcher, *COMMAND, *map(str, words)],
        capture_output=True, text=True, cwd=cwd, env=environment,
    )  # fmt: skip


def errors(done):
    return re.findall(r"error: [^\r\n]*", done.stderr)  # a bar may stand before it


def write(path, height, width, bands=3, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (bands, height, width), dtype=np.uint8)
    profile = {"driver": "GTiff", "height": height, "width": width, "count": bands, "dtype": "uint8"}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=from_origin(5e5, 5e6, 1, 1), **profile) as dataset:
        dataset.write(pixels)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    tiny_model("segformer").save_pretrained(folder / "model")
    SegformerImageProcessor().save_pretrained(folder / "model")
    write(folder / "in" / "large.tif", 500, 200)
    write(folder / "in" / "a" / "x.tif", 90, 70, seed=1)
    write(folder / "in" / "b" / "x.tif", 80, 70, seed=2)
    write(folder / "in" / "b" / "bands.tif", 80, 70, bands=2)
    (folder / "in" / "b" / "no_image.tif").write_text("hello")
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (60, 75, 3), dtype=np.uint8)).save(
        folder / "in" / "photo.jpg"
    )
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_all_inputs_but_the_wrong_ones_are_done_the_same_by_one_process_and_by_two(project):
    options = ["--model", "model", "--recursive", "--tile", "64", "--probabilities"]
    first = run("in", *options, "--output", "one", cwd=project)
    assert first.returncode == 2
    assert [line.split(":")[1].strip() for line in errors(first)] == ["in/b/no_image.tif", "in/b/bands.tif", "2 of 6 inputs failed, see above"]  # fmt: skip
    assert "4 predicted, 0 complete before, 2 failed" in first.stdout
    maps = ["a/x", "b/x", "large"]
    assert set(contents(project / "one")) == {
        *(f"{name}{end}" for name in maps for end in (".tif", ".tif.aux.xml", "-probabilities.tif")),
        *("photo.png", "photo-probabilities.tif"),
    }

    second = run("in", *options, "--output", "two", cwd=project, processes=2)
    assert second.returncode != 0 and len(errors(second)) == 3, second.stderr
    assert "4 predicted, 0 complete before, 2 failed" in second.stdout
    assert contents(project / "one") == contents(project / "two")

    again = run("in/a", "in/large.tif", *options, "--output", "one", cwd=project)
    assert "a/x" not in again.stdout and "1 predicted, 1 complete before, 0 failed" in again.stdout, again.stdout
    assert again.returncode == 0 and (project / "one" / "x.tif").exists()  # alone, it needs no folder


def test_wrong_options_are_one_line(project, monkeypatch, capsys):
    monkeypatch.chdir(project)
    for words, message in (
        (["--device", "nowhere"], "device nowhere: not available here"),
        # These were said once for each input, by a run that could not succeed.
        (["--overlap", "nan"], "overlap=nan: give"),
        (["--tile", "0"], "tile=0"),
        (["--bands", "1", "2"], "--bands 1 2: give 3 numbers"),
        (["--dataset", "tiles"], "predicts ['ground', 'building', 'tree'], the dataset has ['land', 'water']"),
    ):
        if "--dataset" in words:
            (project / "tiles").mkdir(exist_ok=True)
            card = {
                "name": "lakes", "classes": [{"name": n, "color": [i, i, i]} for i, n in enumerate(["land", "water"])],
                "ignore_index": 255, "tile_size": 64, "stride": 64, "scale": 1.0,
                "splits": {"train": {"tiles": 1, "sources": 1, "pixel_shares": {"land": 1, "water": 0}, "ignored_share": 0}},
            }  # fmt: skip
            (project / "tiles" / "README.md").write_text(f"---\nsegmentation: {json.dumps(card)}\n---\n")
        monkeypatch.setattr(sys, "argv", [*COMMAND, "in/a/x.tif", "--model", "model", "--output", "wrong", *words])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(COMMAND[0], run_name="__main__")
        said = re.findall(r"error: [^\r\n]*", capsys.readouterr().err)
        assert ended.value.code == 2 and message in said[0] and len(said) == 1, said
        assert not list((project / "wrong").rglob("*.tif"))


def test_folders_and_globs_mean_their_images_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a/x.tif", "a/notes.txt", "a/deep/y.PNG", "a/.x.tif.tmp/map.tif", "a/maps/x.tif", "b/z.jpg"):
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert find_images(["a"]) == ["a/x.tif"]
    assert find_images(["a", "a/x.tif", "./a/x.tif"], recursive=True, leave_out=Path("a/maps")) == ["a/deep/y.PNG", "a/x.tif"]  # fmt: skip
    assert find_images(["*/*.jpg", "**/y.*", "none*.tif", "gone.tif"]) == ["b/z.jpg", "a/deep/y.PNG", "none*.tif", "gone.tif"]  # fmt: skip


def test_no_two_outputs_have_one_name():
    sources = ["in/a/x.tif", "in/b/x.tif", "in/b/X.png", "in/b/x.jpg", "in/y.tif", "in/b/c/y.tif", "z.tif"]
    names = {source: str(name) for source, name in name_outputs(sources).items()}
    assert len({name.lower() for name in names.values()}) == len(sources)
    assert names["z.tif"] == "z" and names["in/y.tif"] == "y" and names["in/b/c/y.tif"] == "b/c/y"
    assert names["in/b/x.jpg"] == "b/x.jpg"


def test_every_raster_is_shared_out_once_and_large_ones_to_all():
    for processes in (1, 2, 3, 8):
        for pixels in ([5], [5, 5], [100, 1, 1, 1], [1] * 10, [9, 8, 7, 6, 5]):
            together, alone = share_out(pixels, processes)
            assert sorted([*together, *sum(alone, [])]) == list(range(len(pixels))) and len(alone) == processes
            loads = [sum(pixels[i] for i in share) for share in alone]
            assert max(loads) * processes <= processes * max(pixels) + sum(pixels)
    assert share_out([100, 1, 1], 2) == ([0], [[1], [2]])
    assert share_out([4, 4], 2) == ([], [[0], [1]])


def test_inputs_whose_outputs_are_one_file_are_refused(project, tmp_path):
    # With --overwrite the probabilities of x.tif and the map of x-probabilities.tif replaced each other.
    write(tmp_path / "x.tif", 40, 40)
    write(tmp_path / "X-Probabilities.tif", 40, 40)
    options = ["--model", project / "model", "--output", "maps", "--probabilities", "--overwrite"]
    done = run("x.tif", "X-Probabilities.tif", *options, cwd=tmp_path)
    assert done.returncode == 2 and len(errors(done)) == 1, done.stderr
    assert "X-Probabilities.tif: would be written for X-Probabilities.tif" in errors(done)[0]
    assert not (tmp_path / "maps").exists()


def test_an_output_that_is_another_input_is_refused(tmp_path):
    a, b = str(tmp_path / "a.tif"), str(tmp_path / "b.tif")
    check_outputs({a: [tmp_path / "maps" / "a.tif"], b: [tmp_path / "maps" / "b.tif"]})
    with pytest.raises(UserError, match="b.tif: would be written for .*a.tif"):
        check_outputs({a: [tmp_path / "b.tif"], b: [tmp_path / "maps" / "b.tif"]})
