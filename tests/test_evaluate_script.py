"""scripts/evaluate.py on an ISPRS dataset with both references, as a user runs it."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor

from drd_hf.data import ISPRS_CLASSES, POTSDAM, find_isprs, load_splits, prepare_dataset
from drd_hf.errors import UserError
from drd_hf.evaluation.report import check_output, staged_folder, write_scores
from drd_hf.inference import predict_image

from .conftest import tiny_config
from .data.official import write_potsdam

ROOT = Path(__file__).resolve().parents[1]
TEST_TILES = ("2_13", "2_14", "3_13")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("project")
    truth = write_potsdam(folder / "raw", ("2_10", "2_11", *TEST_TILES), 100, imagery=("RGB",), height=False)
    sources, reader, facts, notes = find_isprs(POTSDAM, folder / "raw")
    prepare_dataset(sources, reader, facts, folder / "tiles", tile_size=64, stride=48, notes=notes)
    config = tiny_config("segformer")
    config.id2label = {i: c.name for i, c in enumerate(ISPRS_CLASSES)}
    config.label2id = {name: i for i, name in config.id2label.items()}
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(folder / "model")
    SegformerImageProcessor().save_pretrained(folder / "model")
    config.id2label = {i: f"class {i}" for i in range(6)}
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(folder / "other")
    SegformerImageProcessor().save_pretrained(folder / "other")
    return folder, truth


def evaluate(monkeypatch, folder, *words):
    """The script in this process."""
    options = ["--model", folder / "model", "--dataset", folder / "tiles", "--device", "cpu", *words]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, options)])
    runpy.run_path(str(ROOT / "scripts" / "evaluate.py"))["main"]()


def confusion(prediction, label):
    matrix = np.zeros((6, 6), np.int64)
    np.add.at(matrix, (label[label != 255], prediction[label != 255]), 1)
    return matrix


def test_scores_are_those_of_the_images_as_they_were_handed_out(project, monkeypatch, capsys):
    folder, truth = project
    evaluate(monkeypatch, folder, "--output", folder / "scores.json", "--batch_size", 4)
    report = json.loads((folder / "scores.json").read_text())
    model = AutoModelForSemanticSegmentation.from_pretrained(folder / "model")
    full, eroded = np.zeros((6, 6), np.int64), np.zeros((6, 6), np.int64)
    for name in TEST_TILES:
        prediction = predict_image(model, SegformerImageProcessor(), truth.bands[name][..., :3], 64, 0.25)
        full += confusion(prediction, truth.labels[name])
        eroded += confusion(prediction, truth.eroded[name])
    assert report["confusion_matrices"] == {"isprs/full": full.tolist(), "isprs/eroded": eroded.tolist()}
    five = (np.diag(eroded) / (eroded.sum(0) + eroded.sum(1) - np.diag(eroded)))[:5]
    assert report["scores"]["isprs/eroded/5_classes/mean_iou"] == pytest.approx(five[eroded.sum(1)[:5] > 0].mean())
    assert report["scores"]["isprs/full/6_classes/overall_accuracy"] == pytest.approx(np.trace(full) / full.sum())
    assert all(key.startswith("isprs/") for key in report["scores"])
    assert report["counted"] == "whole images, blended windows of 64 px that overlap by 25%, each pixel once"
    printed = capsys.readouterr().out
    value = report["scores"]["isprs/eroded/5_classes/mean_iou"]
    (line,) = [line for line in printed[printed.index("isprs/eroded") :].splitlines() if "mean of 5 classes" in line]
    assert f"{value:.4f}" in line


def test_the_output_folder_has_scores_plots_and_a_picture_of_each_image(project, monkeypatch):
    folder, _ = project
    words = ["--output", folder / "evaluation", "--tta", "flips", "--tile", 96]
    evaluate(monkeypatch, folder, *words)
    names = {str(path.relative_to(folder / "evaluation")) for path in (folder / "evaluation").rglob("*.*")}
    pictures = {path for path in names if path.startswith("sources")}
    plots = {f"{kind}_{reference}.png" for kind in ("confusion", "classes") for reference in ("full", "eroded")}
    assert names - pictures == plots | {"scores.json"}
    assert len(pictures) == 3 and all(any(tile in path for path in pictures) for tile in TEST_TILES)
    for path in (folder / "evaluation").rglob("*.png"):
        Image.open(path).verify()
    report = json.loads((folder / "evaluation" / "scores.json").read_text())
    assert report["protocol"] == "isprs-tta" and all(key.startswith("isprs-tta/") for key in report["scores"])
    assert "flips (4 views)" in report["counted"] and "windows of 96 px" in report["counted"]

    with pytest.raises(UserError, match="is there already: give --overwrite true"):
        evaluate(monkeypatch, folder, *words)
    evaluate(monkeypatch, folder, "--output", folder / "evaluation", "--overwrite", "true", "--pictures", "false")
    assert not (folder / "evaluation" / "sources").exists()
    assert sorted(path.name for path in folder.iterdir() if path.name.startswith(".")) == []


def test_tiles_by_themselves_are_named_so(project, monkeypatch):
    folder, truth = project
    evaluate(monkeypatch, folder, "--windows", "tiles", "--reference", "full", "--output", folder / "by_tiles.json")
    report = json.loads((folder / "by_tiles.json").read_text())
    assert list(report["confusion_matrices"]) == ["isprs-tiles/full"]
    assert report["counted"] == "tiles of 64 px, each pixel once"
    labelled = sum(int((truth.labels[name] != 255).sum()) for name in TEST_TILES)
    assert np.sum(report["confusion_matrices"]["isprs-tiles/full"]) == labelled


def test_two_processes_give_the_scores_and_pictures_of_one(project, monkeypatch):
    folder, _ = project
    evaluate(monkeypatch, folder, "--output", folder / "alone", "--reference", "both")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    launch += ["--rdzv_endpoint", "localhost:0", str(ROOT / "scripts" / "evaluate.py"), "--device", "cpu"]
    launch += ["--model", folder / "model", "--dataset", folder / "tiles", "--output", folder / "together"]
    done = subprocess.run(
        [*map(str, launch), "--streaming", "true"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("mean of 5 classes") == 2, "one process prints"
    files = [
        sorted(p.relative_to(folder / name) for p in (folder / name).rglob("*.*")) for name in ("alone", "together")
    ]
    assert files[0] == files[1] and len(files[0]) == 8
    for path in files[0]:
        assert (folder / "alone" / path).read_bytes() == (folder / "together" / path).read_bytes(), path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "{p}/other"], "other predicts .*class 0.*, the dataset has"),
        (["--protocol", "cityscapes"], "protocol cityscapes is for the classes road.*take protocol plain"),
        (["--protocol", "potsdam"], "unknown protocol 'potsdam'"),
        (["--reference", "half"], "unknown reference 'half'"),
        (["--windows", "patches"], "--windows patches: give blended or tiles"),
        (["--windows", "tiles", "--tta", "flips"], "takes no --tta"),
        (["--tta", "rotations"], "unknown test-time augmentation 'rotations'"),
        (["--tta", "scales", "--tta_scales", "0"], "scales from 0.1 to 10"),
        (["--overlap", "1"], "overlap=1"),
        (["--batch_size", "0"], "--batch_size 0"),
        (["--boundary_distance", "2.5"], "distance 2.5"),
        (["--boundary_distance", "nan"], "distance nan"),
        (["--channels", "0", "1"], "reads 3 bands, --channels names 2"),
        (["--split", "tset"], "no split 'tset', only train, validation, test"),
        (["--output", "{p}/none/x"], "its folder does not exist"),
        (["--output", "{p}/tiles"], "is there and is no evaluation"),
    ],
)
def test_bad_input_is_one_line(project, monkeypatch, words, message):
    folder, _ = project
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError, match=message) as refused:
        evaluate(monkeypatch, folder, *(word.format(p=folder) for word in words))
    assert "\n" not in str(refused.value)
    assert sorted(folder.rglob("*")) == before


def test_a_split_without_labels_is_refused(project, monkeypatch, tmp_path):
    folder, _ = project
    splits = load_splits(folder / "tiles")
    card = (folder / "tiles" / "README.md").read_text()
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text(card)
    for name, split in splits.items():
        unlabelled = split.map(lambda row: {"label": None, "label_eroded": None}, features=split.features)
        unlabelled.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    with pytest.raises(UserError, match="no pixel has a label in the full or the eroded reference, nothing to score"):
        evaluate(monkeypatch, folder, "--dataset", tmp_path)


def test_an_interrupted_evaluation_leaves_the_earlier_one(tmp_path):
    output = tmp_path / "evaluation"
    with staged_folder(output) as folder:
        (folder / "scores.json").write_text("first")
    with pytest.raises(KeyboardInterrupt), staged_folder(output) as folder:
        (folder / "scores.json").write_text("second")
        raise KeyboardInterrupt
    assert (output / "scores.json").read_text() == "first" and list(tmp_path.iterdir()) == [output]
    with pytest.raises(UserError, match="--overwrite true"):
        check_output(output, overwrite=False)
    check_output(output, overwrite=True)
    # What a killed run left does not get into the next one.
    (tmp_path / ".evaluation.unfinished" / "sources").mkdir(parents=True)
    with staged_folder(output) as folder:
        (folder / "scores.json").write_text("third")
    assert [path.name for path in output.iterdir()] == ["scores.json"] and list(tmp_path.iterdir()) == [output]


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    # A full or read-only disk ended in a traceback; here the names are too long for the file system.
    name = "x" * 250
    with pytest.raises(UserError, match="cannot be written"), staged_folder(tmp_path / name):
        pass
    with pytest.raises(UserError, match="cannot be written"):
        write_scores(tmp_path / f"{name}.json", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not os.access("/proc", os.R_OK) or os.access("/proc", os.W_OK), reason="needs a read-only folder")
def test_a_folder_that_is_not_for_writing_is_refused_before_the_evaluation():
    for name in ("scores.json", "evaluation"):
        with pytest.raises(UserError, match="its folder cannot be written"):
            check_output(f"/proc/{name}", overwrite=False)
