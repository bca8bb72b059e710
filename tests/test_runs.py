import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from drd_hf.arguments import parse_arguments
from drd_hf.errors import UserError
from drd_hf.evaluation import finite_json
from drd_hf.models import load_student
from drd_hf.runs import DataArguments, changed_settings, check_output_dir, check_sizes, command_line
from drd_hf.trainer import DistillationConfig, SegmentationConfig

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
