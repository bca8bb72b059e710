import json
import re
import runpy
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file
from transformers import (
    SegformerConfig,
    SegformerForSemanticSegmentation,
    SegformerImageProcessor,
    ViTConfig,
    ViTModel,
)

from drd_hf.arguments import parse_arguments
from drd_hf.cards import read_facts, render_model_card
from drd_hf.cards.facts import read_run
from drd_hf.cards.measure import Origins, TrainedModel, ground_sampling_distance, measure_run, training_curves
from drd_hf.data import ISPRS_CLASSES, POTSDAM, SourceHeader, SourceImage, load_splits, prepare_dataset
from drd_hf.data.splits import SegmentationSplits
from drd_hf.data.transforms import undecoded
from drd_hf.errors import UserError
from drd_hf.evaluation import finite_json
from drd_hf.losses import ATLoss, DualRelationLoss
from drd_hf.models import load_student
from drd_hf.plots import CURVE_COLORS
from drd_hf.runs import (
    DataArguments,
    StartArguments,
    changed_settings,
    check_output_dir,
    check_same_architecture,
    check_sizes,
    command_line,
    distillation_settings,
    finish_run,
    train_and_validation,
    train_run,
)
from drd_hf.trainer import DistillationConfig, SegmentationConfig, SegmentationTrainer

from .conftest import LABELS, tiny_model

ROOT = Path(__file__).resolve().parents[1]


def test_the_command_hides_tokens_and_quotes_words():
    # The command goes into the card, and with it went --hub_token.
    argv = [
        "/home/me/drd/scripts/distill.py",
        "--hub_token",
        "hf_SECRET",
        "--hub_token=hf_SECRET",
        "--dataset",
        "my data",
    ]
    assert command_line(argv) == "python scripts/distill.py --hub_token '***' '--hub_token=***' --dataset 'my data'"


def test_settings_hold_no_token_and_no_output_path(tmp_path):
    args = SegmentationConfig(output_dir=str(tmp_path), hub_token="hf_SECRET", learning_rate=0.5, use_cpu=True)
    settings = changed_settings(args, SegmentationConfig)
    assert settings["learning_rate"] == 0.5
    assert "hf_SECRET" not in json.dumps(settings) and str(tmp_path) not in json.dumps(settings)


def arguments(folder, **options):
    return SegmentationConfig(output_dir=str(folder), use_cpu=True, **options)


def write_checkpoint(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "trainer_state.json").write_text('{"global_step": 1}')
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.save({}, folder / name)
    save_file({"weight": torch.zeros(1)}, folder / "model.safetensors")


def test_a_folder_is_checked_without_changing_it(tmp_path):
    # --overwrite deleted the old checkpoints before the other options were even looked at.
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoint-3")
    (run / "checkpoint-10").mkdir()  # killed while it was written
    assert check_output_dir(arguments(run), overwrite=True) is None
    assert (run / "checkpoint-3" / "trainer_state.json").is_file()
    with pytest.raises(UserError, match="is there already"):
        check_output_dir(arguments(run), overwrite=False)
    assert check_output_dir(arguments(run, resume_from_checkpoint="true"), False) == str(run / "checkpoint-3")
    with pytest.raises(UserError, match="not a complete checkpoint"):
        check_output_dir(arguments(run, resume_from_checkpoint=str(run / "checkpoint-10")), False)


def test_resuming_from_elsewhere_does_not_overwrite_a_run(tmp_path):
    write_checkpoint(tmp_path / "a" / "checkpoint-5")
    (tmp_path / "a" / "checkpoint-best").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "run.json").write_text("{}")
    checkpoint = str(tmp_path / "a" / "checkpoint-5")
    with pytest.raises(UserError, match="b is there already"):
        check_output_dir(arguments(tmp_path / "b", resume_from_checkpoint=checkpoint), overwrite=False)
    assert check_output_dir(arguments(tmp_path / "b", resume_from_checkpoint=checkpoint), overwrite=True) == checkpoint
    assert (
        check_output_dir(arguments(tmp_path / "a", resume_from_checkpoint=checkpoint), overwrite=False) == checkpoint
    )
    assert check_output_dir(arguments(tmp_path / "a", resume_from_checkpoint="true"), overwrite=False) == checkpoint


def test_reports_hold_no_nan():
    assert finite_json({"a": [float("nan"), 1.0], "b": float("inf")}) == {"a": [None, 1.0], "b": None}


def test_other_folders_are_never_overwritten(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="not a run"):
        check_output_dir(arguments(tmp_path), overwrite=True)
    assert check_output_dir(arguments(tmp_path / "new"), overwrite=False) is None


def test_every_config_that_is_named_anywhere_exists():
    texts = [
        *ROOT.glob("scripts/*.py"),
        *ROOT.glob("benchmarks/*.py"),
        *ROOT.glob("scripts/configs/*.yaml"),
        ROOT / "README.md",
    ]
    names = {name for path in texts for name in re.findall(r"configs\}?/([\w./-]+\.(?:yaml|json))", path.read_text())}
    assert len(names) > 5
    missing = [name for name in names if not (ROOT / "scripts" / "configs" / name).is_file()]
    assert not missing


@pytest.mark.parametrize("path", sorted((ROOT / "scripts" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_has_only_known_options(path):
    import importlib.util

    script = "distill" if "_from_" in path.stem else "train_teacher"
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    training = DistillationConfig if script == "distill" else SegmentationConfig
    model, data, args = parse_arguments(
        module.ModelArguments,
        DataArguments,
        training,
        description="test",
        argv=["--config", str(path), "--use_cpu", "true"],
    )
    values = yaml.safe_load(path.read_text())
    assert (data.dataset, args.max_steps) == (values["dataset"], values["max_steps"])


def test_models_of_one_image_size_are_refused_before_the_training(tmp_path):
    # They trained on crops of their size to the end, and failed when they were scored on the tiles.
    info, data = SimpleNamespace(tile_size=128, id2label=LABELS), DataArguments(crop_size=64)
    fixed, free = tiny_model("beit"), tiny_model("segformer")
    fixed.save_pretrained(tmp_path)
    fixed = load_student(str(tmp_path))
    states = torch.get_rng_state(), free.training
    check_sizes(info, data, free, student_alone=free)
    assert torch.equal(torch.get_rng_state(), states[0]) and free.training == states[1]
    with pytest.raises(UserError, match="the student meets tiles of 128: .* takes images of 64x64 pixels only"):
        check_sizes(info, data, fixed)
    with pytest.raises(UserError, match="the student alone meets tiles of 128: "):
        check_sizes(info, data, free, student_alone=fixed)
    with pytest.raises(UserError, match="the teacher meets tiles of 128: "):
        check_sizes(info, data, free, fixed)
    fixed.config.id2label = {0: "other"}  # a teacher of other classes is not scored, and sees crops alone
    check_sizes(info, data, free, fixed)
    with pytest.raises(UserError, match="the student meets crops of 1: SegformerFor"):
        check_sizes(info, DataArguments(crop_size=1), free)


class Towns:
    """Two towns for each split, four tiles each, with both references of ISPRS."""

    bands = ("red", "green", "blue")

    def header(self, record):
        return SourceHeader(f"town{record} <b>|", 128, 128, str(record), eroded=True, georeferenced=True)

    def read(self, record):
        label = np.kron(np.random.default_rng(record).integers(0, 6, (4, 4)), np.ones((32, 32))).astype(np.uint8)
        eroded = label.copy()
        eroded[::32] = eroded[:, ::32] = 255
        place = {"crs": "EPSG:32633", "transform": (0.2, 0, 4e5, 0, -0.2, 5e6)}
        return SourceImage(f"town{record} <b>|", np.repeat(label[..., None] * 40, 3, axis=2), label, eroded, **place)


@pytest.fixture(scope="module")
def tiles(tmp_path_factory):
    output, facts = tmp_path_factory.mktemp("towns") / "tiles", replace(POTSDAM.dataset, license=None)
    sources = {"train": [0], "validation": [1, 2], "test": [3, 4]}
    prepare_dataset(sources, Towns(), facts, output, tile_size=64, stride=64)
    return output


@pytest.fixture(scope="module")
def towns(tiles):
    return load_splits(tiles)


def segformer(width):
    names = {i: c.name for i, c in enumerate(ISPRS_CLASSES)}
    torch.manual_seed(width)
    sizes = {"hidden_sizes": [8 * width] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4}
    config = SegformerConfig(**sizes, decoder_hidden_size=16, id2label=names)
    return TrainedModel(SegformerForSemanticSegmentation(config), SegformerImageProcessor(do_resize=False))


RUN = {
    "steps": 3, "seconds": 1.0, "seed": 0, "command": "python scripts/distill.py", "settings": {"learning_rate": 0.1},
    "hardware": "a GPU", "versions": {"torch": "2"},
    "log": [{"loss": 2.0, "spatial_relation": 0.5, "spatial_relation_weighted": 1.0, "step": 1}, {"eval_mean_iou": 0.5, "step": 2}],
}  # fmt: skip
MODELS = {"model": segformer(1), "teacher": segformer(2), "student_alone": segformer(1)}


def describe(folder, splits, models=MODELS, **origins):
    folder.mkdir(exist_ok=True)
    return measure_run(
        folder, RUN, models, splits, ["validation", "test"], Origins("tiny", "nowhere", **origins), 4, "cpu"
    )


def test_a_run_on_data_that_may_not_be_shared_has_its_scores_by_protocol_and_no_pixel(towns, tmp_path):
    run = tmp_path / "run"
    (run / "examples").mkdir(parents=True)  # of the run before, on other data
    (run / "examples" / "test_1.jpg").write_bytes(b"")
    described = describe(
        run, towns, teacher="someone/teacher", base_model="nvidia/mit-b0", distillation={"relation": 1}
    )
    assert {p.relative_to(run).as_posix() for p in run.rglob("*") if p.is_file()} == {
        "README.md", "run.json", "figures/confusion.png", "figures/curves.png",
    }  # fmt: skip
    card = ModelCard.load(run / "README.md")
    names = {r.metric_name: r.metric_value for r in card.data.eval_results}
    windows = "whole images, blended windows of 64 px that overlap by 25%, each pixel once"
    for reference in ("full", "eroded"):
        for group in ("5_classes", "6_classes"):
            value = described["whole_images"]["model"]["test"][f"isprs/{reference}/{group}/mean_iou"]
            number = group[0]
            key = f"mIoU over {number} classes (test, protocol isprs, {reference} reference, {windows})"
            assert names[key] == value
    tiles = "tiles, each pixel once, full reference, 64 px"
    assert names[f"mIoU (test, {tiles})"] == described["results"]["model"]["test"]["mean_iou"]
    assert f"mIoU (validation, {tiles})" in names and not any("validation, protocol" in name for name in names)
    assert card.data.base_model == ["nvidia/mit-b0", "someone/teacher"]
    assert "A pixel of the training tiles is 5 cm wide" in card.text and "38 true orthophotos" in card.text
    assert "2d-sem-label-potsdam" in card.text and "must not be handed on" in card.text
    assert "| 10⁹ operations |" in card.text and str(tmp_path) not in card.content
    assert (run / "README.md").read_text(encoding="utf-8") == render_model_card(read_facts(run))


def test_examples_are_tiles_of_the_test_split_and_the_widget_names_them(towns, tmp_path):
    run = tmp_path / "run"
    towns.info = replace(towns.info, may_be_shared=True)
    try:
        describe(run, towns)
    finally:
        towns.info = replace(towns.info, may_be_shared=False)
    card = ModelCard.load(run / "README.md")
    assert len(card.data.widget) == 3
    for entry in card.data.widget:
        assert re.fullmatch(r"town[34] <b>\| \(\d+, \d+\)", entry["example_title"])
        with Image.open(run / entry["src"]) as image:
            assert image.size == (64, 64)
    for name in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert (run / name).is_file()
    assert "figures/examples.png" in card.text


def test_a_teacher_of_other_classes_is_profiled_and_not_scored(towns, tmp_path):
    other = segformer(2)
    other.model.config.id2label = {i: f"thing {i}" for i in range(6)}
    run = describe(tmp_path / "run", towns, {"model": MODELS["model"], "teacher": other})
    assert set(run["results"]) == {"model"} and set(run["profile"]) == {"model", "teacher"}


def test_a_teacher_that_takes_crops_alone_does_not_end_the_run(towns, tmp_path):
    # An encoder of one image size had taught on crops of it; a tile has another one.
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    encoder = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=16))
    run = describe(tmp_path / "run", towns, {"model": MODELS["model"], "teacher": TrainedModel(encoder, None)})
    assert set(run["profile"]) == {"model"} and run["card"]["teacher_num_parameters"] > 0


def test_a_run_that_fails_while_it_is_described_is_not_finished(towns, tmp_path, monkeypatch):
    # `run.json` marks a finished run: it must come last, and nothing half-written may be left.
    monkeypatch.setattr("drd_hf.cards.measure.curves_picture", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        describe(tmp_path / "run", towns)
    assert not list((tmp_path / "run").iterdir())


def test_a_split_that_is_named_twice_is_scored_once(towns, tmp_path):
    # The card refused two results of one name, when the training was over.
    one = {"model": MODELS["model"]}
    run = measure_run(tmp_path, RUN, one, towns, ["test", "test"], Origins("tiny", "nowhere"), 4, "cpu")
    assert list(run["results"]["model"]) == ["test"]


def test_a_model_of_other_classes_is_told_to_be_one(towns, tmp_path):
    other = {"model": TrainedModel(tiny_model("segformer"), SegformerImageProcessor(do_resize=False))}
    with pytest.raises(UserError, match="the model predicts .*'ground', 'building', 'tree'.*give its dataset"):
        describe(tmp_path / "run", towns, other)


def trained(folder, splits, dataset, **options):
    """A trainer that has done one step, and the options of the data."""
    data = DataArguments(dataset=str(dataset), crop_size=64, max_class_share=1.0, license="apache-2.0")
    args = SegmentationConfig(
        output_dir=str(folder), use_cpu=True, report_to="none", per_device_train_batch_size=2, max_steps=1,
        disable_tqdm=True, **{"save_strategy": "no"} | options,
    )  # fmt: skip
    of_run = segformer(1)
    trainer = SegmentationTrainer(
        of_run.model, args, processing_class=of_run.processor, **train_and_validation(splits, data)
    )
    train_run(trainer, None)
    return trainer, data


def with_damaged_test_tiles(splits):
    """As a file that cannot be read any more: pictures of the test split that are none."""
    damaged = undecoded(splits["test"]).to_list()
    for row in damaged:
        row["image"] = {"bytes": b"no picture", "path": None}
    damaged = Dataset.from_list(damaged, features=undecoded(splits["test"]).features)
    return SegmentationSplits({**splits, "test": damaged}, splits.info)


def test_a_model_whose_scoring_fails_is_saved_and_scored_later(towns, tiles, tmp_path, capsys, monkeypatch):
    # What had been known of the training was lost with the process: the model had no card, and could not be pushed.
    run = tmp_path / "run"
    trainer, data = trained(run, towns, tiles)
    with pytest.raises(UserError):
        finish_run(trainer, with_damaged_test_tiles(towns), data, StartArguments(), base_model="nvidia/mit-b0")
    assert {path.name for path in run.iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json", "trained.json"
    }  # fmt: skip
    with pytest.raises(UserError, match="is trained and has no scores; make_card.py --run"):
        read_run(run)
    with pytest.raises(UserError, match="run: its model is trained: make_card.py --run .* scores it"):
        check_output_dir(arguments(run, resume_from_checkpoint="true"), overwrite=False)
    command = shlex.split(capsys.readouterr().err.splitlines()[-1])
    assert command[:2] == ["python", "scripts/make_card.py"]

    monkeypatch.setattr(sys, "argv", command[1:])
    runpy.run_path(str(ROOT / command[1]), run_name="__main__")

    assert not (run / "trained.json").exists()
    described = read_run(run)
    assert described["steps"] == 1 and described["log"] == json.loads(json.dumps(trainer.state.log_history))
    card = ModelCard.load(run / "README.md")
    assert "| max_steps | `1` |" in card.text and "num_train_epochs" not in card.text, "which has no effect then"
    assert (card.data.license, card.data.base_model) == ("apache-2.0", ["nvidia/mit-b0"])
    assert {result.dataset_split for result in card.data.eval_results} == {"validation", "test"}


def test_a_model_that_cannot_be_written_is_told_in_one_line(towns, tiles, tmp_path):
    trainer, data = trained(tmp_path / "run", towns, tiles, save_strategy="steps", save_steps=1)
    (tmp_path / "run" / "model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"cannot be saved \(.*\): make room, then .*checkpoint-1 is complete$"):
        finish_run(trainer, towns, data, StartArguments())
    assert (tmp_path / "run" / "checkpoint-1" / "model.safetensors").is_file()


def test_a_folder_that_cannot_be_written_is_refused_before_the_training(towns, tiles, tmp_path):
    # A run without checkpoints writes nothing before its end.
    trainer, _ = trained(tmp_path / "run", towns, tiles)
    (tmp_path / "file").write_text("")
    trainer.args.output_dir = str(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="file/run: cannot be written .*: give another --output_dir"):
        train_run(trainer, None)
    assert trainer.state.global_step == 1


def test_the_card_says_which_checkpoint_the_weights_are_of(towns, tiles, tmp_path):
    # "steps 3" stood in the card of a model whose weights were those of an earlier step.
    best = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    trainer, data = trained(tmp_path / "run", towns, tiles, load_best_model_at_end=True, **best)
    run = finish_run(trainer, towns, data, StartArguments())
    assert run["settings"]["weights"] == "the best of the training, checkpoint-1"
    assert (tmp_path / "run" / "model.safetensors").stat().st_mode == (tmp_path / "run" / "config.json").stat().st_mode


def test_a_student_alone_is_the_same_student(tmp_path):
    check_same_architecture(segformer(1).model, segformer(1).model, "runs/alone")
    with pytest.raises(UserError, match="--student_alone runs/alone is a segformer of .* parameters, the student a"):
        check_same_architecture(segformer(1).model, segformer(2).model, "runs/alone")


def test_settings_of_a_loss_name_a_temperature_only_where_there_is_one():
    # Cosine relations have none, and the card gave them one of 1.0.
    layers = [("a", "b")]
    assert distillation_settings([DualRelationLoss(layers)]) == {
        "spatial_relation weight": 3.0, "channel_relation weight": 3.0, "relation": "cosine",
        "layers (student = teacher)": "a = b",
    }  # fmt: skip
    attention = distillation_settings([DualRelationLoss(layers, relation="attention", temperature=2.0)])
    assert attention["relation"] == "attention" and attention["spatial temperature"] == 2.0
    assert distillation_settings([ATLoss(layers, 5.0)])["at weight"] == 5.0
    assert distillation_settings(None) is None


def test_only_the_losses_of_the_method_have_its_name(towns, tmp_path):
    # Any loss with the word relation in its name was called Dual Relation Distillation.
    run = measure_run(
        tmp_path, RUN, {"model": MODELS["model"]}, towns, ["test"],
        Origins("tiny", "nowhere", teacher="big", distillation={"my_relation weight": 1.0}), 4, "cpu",
    )  # fmt: skip
    assert run["card"]["dual_relation"] is False


def test_the_ground_sampling_distance_follows_the_facts_the_scale_and_the_georeference(towns):
    splits = SimpleNamespace(info=towns.info, values=towns.values)
    assert ground_sampling_distance(splits) == 0.05
    splits.info = replace(towns.info, scale=0.5)
    assert ground_sampling_distance(splits) == 0.1
    splits.info = replace(towns.info, name="my town")
    assert ground_sampling_distance(splits) == pytest.approx(0.2)
    splits.info = replace(towns.info, name="my town", georeferenced=False)
    assert ground_sampling_distance(splits) is None


def test_curves_have_the_terms_as_they_add_up_to_the_loss():
    log = [
        {"loss": 3.0, "task_loss": 1.0, "spatial_relation": 0.5, "spatial_relation_weighted": 2.0, "step": 10},
        {"eval_loss": 1.0, "eval_mean_iou": 0.25, "step": 10},
        {"loss": 2.0, "task_loss": 1.5, "spatial_relation": 0.1, "spatial_relation_weighted": 0.5, "step": 20},
        {"train_runtime": 5.0, "train_loss": 2.5, "step": 20},
    ]
    assert training_curves(log) == {
        "Training loss": {
            "loss": [(10, 3.0), (20, 2.0)],
            "from labels": [(10, 1.0), (20, 1.5)],
            "spatial relation, weighted": [(10, 2.0), (20, 0.5)],
        },
        "Validation mIoU": {"mIoU": [(10, 0.25)]},
    }
    assert training_curves([{"epoch": 1.0}]) == {}
    many = {f"term{i}_weighted": 1.0 for i in range(20)} | {"loss": 20.0, "step": 1}
    assert len(training_curves([many])["Training loss"]) == len(CURVE_COLORS)
