"""Imagery of five bands, from tiles to a card, with the scripts as a user runs them."""

import json
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, SegformerImageProcessor

from drd_hf import load_image_processor, load_splits, load_student, load_teacher, predict_image
from drd_hf.data import DatasetFacts, SegmentationClass, SourceHeader, SourceImage, prepare_dataset

from .conftest import LABELS, tiny_encoder, tiny_model

ROOT = Path(__file__).resolve().parents[1]
BANDS = ("red", "green", "blue", "near_infrared", "height")
COLORS = ((200, 200, 200), (0, 0, 255), (0, 160, 0))
FACTS = DatasetFacts("blocks", tuple(SegmentationClass(LABELS[i], color) for i, color in enumerate(COLORS)))
TRAINING = (
    "--crop_size 64 --scale_min 1 --scale_max 1 --per_device_train_batch_size 4 --logging_steps 50 --use_cpu true "
    "--save_strategy no --dataloader_drop_last false --disable_tqdm true"
).split()


@dataclass(frozen=True)
class Blocks:
    """A scene of blocks of 16 pixels. Which class a block has is seen in its height alone."""

    name: str
    seed: int
    size: int = 128
    labelled: bool = True


class BlocksReader:
    bands = BANDS

    def header(self, record: Blocks) -> SourceHeader:
        return SourceHeader(record.name, record.size, record.size, str(record), record.labelled, record.labelled)

    def read(self, record: Blocks) -> SourceImage:
        generator = np.random.default_rng(record.seed)
        label = np.kron(generator.integers(0, 3, (record.size // 16,) * 2), np.ones((16, 16))).astype(np.uint8)
        noise = generator.integers(0, 40, (record.size, record.size, 5))
        image = (noise + np.array([10, 60, 110, 160, 0])).astype(np.uint8)
        image[..., 4] += 80 * label
        eroded = label.copy()
        eroded[::16] = eroded[:, ::16] = 255
        return SourceImage(record.name, image, label if record.labelled else None, eroded if record.labelled else None)


def prepare_blocks(output, **options):
    sources = {
        split: [Blocks(f"{split}{i}", seed=10 * k + i) for i in range(count)]
        for k, (split, count) in enumerate({"train": 3, "validation": 1, "test": 2}.items())
    }
    return prepare_dataset(sources, BlocksReader(), FACTS, output, **({"tile_size": 64} | options))


def run(script, *words):
    """A script in this process: its imports alone would take most of the time."""
    argv, sys.argv = sys.argv, [str(ROOT / "scripts" / script), *map(str, words)]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.argv = argv


def architecture(folder):
    path = folder / "segformer.json"
    values = {"depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2]}
    path.write_text(json.dumps({"model_type": "segformer", "decoder_hidden_size": 32, **values}))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multiband")
    prepare_blocks(folder / "tiles")
    data = ["--dataset", folder / "tiles", *TRAINING]
    start = ["--model", architecture(folder), "--max_steps", 60, "--learning_rate", 0.01]
    run("train_teacher.py", *start, "--output_dir", folder / "teacher", *data)
    alone = ["--model", architecture(folder), "--max_steps", 2, "--student_channels", 0, 1, 2]
    run("train_teacher.py", *alone, "--output_dir", folder / "alone", *data)
    run(
        "distill.py", "--teacher", folder / "teacher", "--student", architecture(folder), "--max_steps", 2,
        "--student_channels", 2, 1, 0, "--student_alone", folder / "alone", "--output_dir", folder / "student", *data,
        "--teacher_dtype", "bfloat16",
    )  # fmt: skip
    # What people start from: a segmenter and an encoder that were trained on photographs.
    tiny_model("segformer").save_pretrained(folder / "photographs")
    SegformerImageProcessor().save_pretrained(folder / "photographs")
    tiny_encoder("vit").save_pretrained(folder / "encoder")
    SegformerImageProcessor(image_mean=[0.5] * 3).save_pretrained(folder / "encoder")
    run(
        "distill.py", "--teacher", folder / "encoder", "--student", folder / "photographs", "--max_steps", 2,
        "--output_dir", folder / "widened", *data, "--save_strategy", "steps", "--save_steps", 2,
    )  # fmt: skip
    return folder


def scores(folder, model, *words, reference="full"):
    return by_name(report_of(folder, model, *words, reference=reference), reference)


def by_name(report, reference="full"):
    assert all(key.startswith(f"plain-tiles/{reference}/3_classes/") for key in report["scores"])
    return {key.rpartition("/")[2]: value for key, value in report["scores"].items()}


def report_of(folder, model, *words, reference):
    report = folder / "report.json"
    run(
        "evaluate.py",
        "--model",
        folder / model,
        "--dataset",
        folder / "tiles",
        "--device",
        "cpu",
        "--windows",
        "tiles",
        "--reference",
        reference,
        "--output",
        report,
        *words,
    )
    return json.loads(report.read_text())


def test_a_model_learns_from_a_band_that_pictures_do_not_have(project):
    # Guessing gives at most 1/3 of the pixels of a scene whose three classes look alike in all other bands.
    assert scores(project, "teacher")["overall_accuracy"] > 0.8


def test_bands_mean_and_deviation_are_in_the_saved_model(project):
    pixels = np.concatenate([BlocksReader().read(Blocks("", seed)).image.reshape(-1, 5) for seed in (0, 1, 2)]) / 255
    five = [0, 1, 2, 3, 4]
    for name, order in (("teacher", five), ("widened", five), ("widened/checkpoint-2", five), ("student", [2, 1, 0])):
        config = json.loads((project / name / "config.json").read_text())
        assert config["bands"] == [BANDS[i] for i in order] and config["num_channels"] == len(order)
        processor = AutoImageProcessor.from_pretrained(project / name)
        np.testing.assert_allclose(processor.image_mean, pixels.mean(0)[order], atol=1e-4)
        np.testing.assert_allclose(processor.image_std, pixels.std(0)[order], atol=1e-4)


def test_evaluate_finds_the_channels_by_the_names_of_the_bands(project):
    for name in ("teacher", "student", "widened"):
        measured = json.loads((project / name / "run.json").read_text())["results"]["model"]["test"]
        assert scores(project, name) == pytest.approx(measured)
    by_hand = scores(project, "student", "--channels", 2, 1, 0)
    assert by_hand == scores(project, "student")


def test_channels_that_contradict_the_bands_of_the_model_are_said(project, capsys):
    # Infrared in the place of red gave low scores without a word.
    scores(project, "student", "--channels", 3, 1, 0)
    line = "warning: the model reads blue, green, red, --channels gives it near_infrared, green, red"
    assert line in capsys.readouterr().err.splitlines()


def test_teacher_and_student_read_their_own_channels(project):
    taught = json.loads((project / "student" / "run.json").read_text())
    assert taught["settings"]["student_channels"] == [2, 1, 0]
    assert taught["settings"]["teacher_channels"] == [0, 1, 2, 3, 4]
    # They are as good in the run of the student as alone, so they got the bands that they know. A teacher in half
    # precision met tiles in float32 after the training, which ended in a RuntimeError: it is scored as it was trained.
    assert taught["settings"]["teacher_dtype"] == "bfloat16"
    for name, folder in (("teacher", "teacher"), ("student_alone", "alone")):
        assert taught["results"][name]["test"] == pytest.approx(scores(project, folder))
    widened = json.loads((project / "widened" / "run.json").read_text())
    assert widened["settings"]["teacher_channels"] == [0, 1, 2]  # red, green, blue for a model of photographs


def test_a_reference_with_eroded_boundaries_is_scored_apart(project):
    full, eroded = (report_of(project, "teacher", reference=name) for name in ("full", "eroded"))
    assert np.sum(full["confusion_matrices"]["plain-tiles/full"]) == 2 * 128 * 128
    assert np.sum(eroded["confusion_matrices"]["plain-tiles/eroded"]) == 2 * (128 - 8) ** 2
    accuracy, eroded_accuracy = by_name(full)["overall_accuracy"], by_name(eroded, "eroded")["overall_accuracy"]
    assert eroded_accuracy != accuracy


def test_plain_transformers_and_predict_image_agree_on_a_geotiff(project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    image = BlocksReader().read(Blocks("", 77)).image
    profile = {"driver": "GTiff", "height": 128, "width": 128, "count": 5, "dtype": "uint8"}
    with rasterio.open("tile.tif", "w", **profile, transform=rasterio.Affine(0.1, 0, 3e5, 0, -0.1, 5e6)) as file:
        file.write(image.transpose(2, 0, 1))
    card = (project / "teacher" / "README.md").read_text()
    code, _ = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    exec(code.replace('"teacher"', repr(str(project / "teacher"))), names)  # the code of the card
    model, processor = load_teacher(str(project / "teacher")), load_image_processor(str(project / "teacher"))
    ours = predict_image(model, processor, image, tile=128)
    assert (names["label"].numpy() == ours).mean() > 0.999  # a tie between two classes may fall the other way


def test_the_card_describes_the_bands(project):
    card = (project / "student" / "README.md").read_text()
    info = load_splits(project / "tiles").info
    rows = [
        f"| {i} | {BANDS[c]} | {info.band_mean[c]:.4f} | {info.band_std[c]:.4f} |" for i, c in enumerate((2, 1, 0), 1)
    ]
    assert "\n".join(rows) in card
    assert "blue, green, red in the place of red, green, blue" in card


def test_five_bands_go_on_from_where_five_bands_ended(project, tmp_path):
    trained = AutoModelForSemanticSegmentation.from_pretrained(project / "teacher")
    again = load_student(str(project / "teacher"), LABELS, bands=BANDS)
    assert all(torch.equal(p, again.get_parameter(name)) for name, p in trained.named_parameters())
    processor = load_image_processor(str(project / "teacher"), bands=BANDS, info=load_splits(project / "tiles").info)
    assert list(processor.image_mean) == list(AutoImageProcessor.from_pretrained(project / "teacher").image_mean)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train_teacher.py", "--model", "{p}/segformer.json", "--student_channels", "0", "5"], "has the channels 0 .red."),
        (["train_teacher.py", "--model", "{p}/segformer.json", "--image_mean", "0.5"], "image_mean .0.5.: give 5 values"),
        (["distill.py", "--teacher", "{p}/encoder", "--student", "{p}/segformer.json", "--teacher_channels", "0"],
         "encoder reads 3 bands, --teacher_channels names 1"),
        # Any model was scored as "student alone", in a column with the parameters of the student.
        (["distill.py", "--teacher", "{p}/encoder", "--student", "{p}/segformer.json", "--student_alone", "{p}/alone"],
         "alone is a segformer of .* parameters, the student a segformer of .*: give the same student"),
    ],
)  # fmt: skip
def test_bands_that_do_not_fit_are_refused_in_one_line(words, message, project, tmp_path, capsys):
    words = [word.format(p=project) for word in words]
    with pytest.raises(SystemExit) as end:
        run(*words, "--dataset", project / "tiles", "--output_dir", tmp_path / "out", "--max_steps", 1, *TRAINING)
    assert end.value.code not in (0, None)
    assert re.search(rf"^error: .*{message}", capsys.readouterr().err, re.MULTILINE)
    assert not (tmp_path / "out").exists()


def test_a_model_whose_bands_the_dataset_lacks_is_refused(project, tmp_path, capsys):
    model = load_student(str(project / "teacher"), LABELS, bands=("near_infrared", "thermal"))
    model.save_pretrained(tmp_path)
    SegformerImageProcessor(image_mean=[0.5] * 2, image_std=[0.2] * 2).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        scores(project, tmp_path)
    error = capsys.readouterr().err.splitlines()[-1]
    assert "reads the bands near_infrared, thermal, and there is no thermal: choose channels with --channels" in error
