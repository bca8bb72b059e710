"""The commands of the README, on tiny scenes and models, as a user runs them."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForSemanticSegmentation

from drd_hf import errors, load_image_processor, load_splits
from drd_hf.evaluation import evaluate_sources

ROOT = Path(__file__).resolve().parents[1]
TRAINING = "--max_steps 3 --crop_size 64 --per_device_train_batch_size 4 --logging_steps 1 --use_cpu true --save_strategy no".split()


def run_script(*words, cwd=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script, *options = map(str, words)
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / script), *options],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=environment,
    )


def succeed(*words):
    done = run_script(*words)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def architecture(folder, width):
    path = folder / f"segformer{width}.json"
    sizes = [8 * width, 8 * width, 16 * width, 16 * width]
    heads = {"num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16 * width}
    path.write_text(json.dumps({"model_type": "segformer", "hidden_sizes": sizes, **heads}))
    return path


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """Tiles, a teacher, the student alone and a distilled student, made by the scripts."""
    folder = tmp_path_factory.mktemp("project")
    scenes = "--scenes_train 2 --scenes_validation 1 --scenes_test 1 --scene_size 128 --tile_size 64".split()
    succeed("prepare_dataset.py", "--dataset", "scenes", "--output", folder / "tiles", *scenes)
    data = ["--dataset", folder / "tiles", *TRAINING]
    succeed("train_teacher.py", "--model", architecture(folder, 2), "--output_dir", folder / "teacher", *data)
    succeed("train_teacher.py", "--model", architecture(folder, 1), "--output_dir", folder / "alone", *data)
    succeed(
        "distill.py", "--teacher", folder / "teacher", "--student", architecture(folder, 1), "--license", "apache-2.0",
        "--student_alone", folder / "alone", "--output_dir", folder / "student", *data,
    )  # fmt: skip
    return folder


def test_a_student_folder_is_a_plain_transformers_model(project):
    names = {p.name for p in (project / "student").iterdir()}
    of_model = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert names == of_model | {"README.md", "run.json", "figures", "examples"}
    assert set(load_file(project / "student" / "model.safetensors")) == set(
        load_file(project / "alone" / "model.safetensors")
    )
    config = json.loads((project / "student" / "config.json").read_text())
    assert config["id2label"]["4"] == "car"


def test_student_works_where_drd_hf_is_not_installed(project):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (90, 130, 3), dtype=np.uint8)).save(
        project / "image.png"
    )
    code = f"""
import sys
sys.modules["drd_hf"] = None  # importing it now fails
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
model = AutoModelForSemanticSegmentation.from_pretrained({str(project / "student")!r})
processor = AutoImageProcessor.from_pretrained({str(project / "student")!r})
image = Image.open({str(project / "image.png")!r})
logits = model(**processor(image, return_tensors="pt")).logits
classes = processor.post_process_semantic_segmentation(type("Out", (), {{"logits": logits}})(), target_sizes=[(90, 130)])[0]
results = pipeline("image-segmentation", model={str(project / "student")!r})(image)
names = {{r["label"] for r in results}}
assert names == {{model.config.id2label[int(i)] for i in classes.unique()}}, names
assert all(r["mask"].size == (130, 90) for r in results)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stderr[-3000:]


def test_card_carries_the_measured_numbers(project):
    run = json.loads((project / "student" / "run.json").read_text())
    card = ModelCard.load(project / "student" / "README.md")
    head = card.data.to_dict()
    expected = {"pipeline_tag": "image-segmentation", "library_name": "transformers", "license": "apache-2.0"}
    assert expected.items() <= head.items()
    by_tiles = [r for r in card.data.eval_results if "tiles, each pixel once" in r.metric_name]
    on_card = {(r.dataset_split, r.metric_type): r.metric_value for r in by_tiles}
    for split in ("validation", "test"):
        assert on_card[split, "mean_iou"] == run["results"]["model"][split]["mean_iou"]
    assert f"{run['results']['teacher']['test']['mean_iou']:.4f}" in card.text
    assert str(project) not in card.content, "a card tells nothing about the machine"


def test_evaluate_agrees_with_the_run(project):
    done = succeed(
        "evaluate.py",
        "--model",
        project / "student",
        "--dataset",
        project / "tiles",
        "--windows",
        "tiles",
        "--output",
        project / "scores.json",
        "--device",
        "cpu",
    )
    report = json.loads((project / "scores.json").read_text())
    run = json.loads((project / "student" / "run.json").read_text())
    mean_iou = report["scores"]["isprs-tiles/full/6_classes/mean_iou"]
    assert mean_iou == pytest.approx(run["results"]["model"]["test"]["mean_iou"], abs=1e-6)
    assert np.array(report["confusion_matrices"]["isprs-tiles/full"]).sum() == 128 * 128
    assert "impervious_surface" in done.stdout


def test_interrupted_training_resumes_from_its_checkpoint(project):
    common = ["--teacher", project / "teacher", "--student", architecture(project, 1), "--dataset", project / "tiles"]
    common += [
        *TRAINING,
        "--output_dir",
        project / "resumed",
        "--save_strategy",
        "steps",
        "--save_steps",
        "2",
        "--evaluate_on",
        "validation",
    ]
    succeed("distill.py", *common)
    assert (project / "resumed" / "checkpoint-2" / "projectors.safetensors").is_file()
    refused = run_script("distill.py", *common)
    assert refused.returncode == 2 and "--resume_from_checkpoint true" in refused.stderr
    succeed("distill.py", *common, "--resume_from_checkpoint", "true", "--max_steps", "5")
    run = json.loads((project / "resumed" / "run.json").read_text())
    assert run["steps"] == 5 and [e["step"] for e in run["log"] if "loss" in e] == [1, 2, 3, 4, 5]


def test_two_processes_score_whole_images_together_as_one_does(project):
    # The main process alone scored the trained model, and waited for ever to add up its counts with the others.
    output = project / "two_ranks"
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", ROOT / "scripts" / "distill.py"]
    launch += ["--teacher", project / "teacher", "--student", architecture(project, 1), "--score_teacher", "false"]
    launch += ["--dataset", project / "tiles", "--output_dir", output, "--evaluate_on", "train"]
    options = [*TRAINING, "--per_device_train_batch_size", "2", "--learning_rate", "0.05"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, launch), *options], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    run = json.loads((output / "run.json").read_text())
    assert run["settings"]["world_size"] == 2 and not (output / "trained.json").exists()

    splits = load_splits(project / "tiles")
    assert splits.info.num_sources["train"] == 2, "an image for each process"
    model = AutoModelForSemanticSegmentation.from_pretrained(output)
    one = evaluate_sources(model, load_image_processor(output), splits["train"], splits.info, batch_size=8)
    scores = {k.rpartition("/")[2]: v for k, v in run["whole_images"]["model"]["train"].items() if "mean" not in k}
    expected = {name: value for name, value in one.metrics["full"].compute().items() if name in scores}
    assert len(expected) > 6
    for name, value in expected.items():
        assert value == pytest.approx(scores[name], abs=1e-4, nan_ok=True) or scores[name] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train_teacher.py", "--dataset", "{p}/tiles"], "--model is missing"),
        (["train_teacher.py", "--model", "{p}/segformer1.json", "--dataset", "{p}/none", "--output_dir", "{p}/x"], "no such folder"),
        (["train_teacher.py", "--model", "{p}/none", "--dataset", "{p}/tiles", "--output_dir", "{p}/x"], "no such model folder"),
        (["train_teacher.py", "--model", "{p}/segformer1.json", "--dataset", "{p}/tiles", "--output_dir", "{p}/student"], "--overwrite"),
        (["train_teacher.py", "--model", "{p}/segformer1.json", "--dataset", "{p}/tiles", "--output_dir", "{p}/tiles", "--overwrite", "true"], "not a run"),
        (["distill.py", "--teacher", "{p}/teacher", "--student", "{p}/segformer1.json", "--dataset", "{p}/tiles", "--output_dir", "{p}/x", "--feature_layers", "nothing"], "nearest names"),
        (["distill.py", "--teacher", "{p}/teacher", "--student", "{p}/segformer1.json", "--dataset", "{p}/tiles", "--output_dir", "{p}/x", "--evaluate_on", "tset"], "no split 'tset'"),
        (["distill.py", "--teacher", "{p}/teacher", "--student", "{p}/segformer1.json", "--dataset", "{p}/tiles", "--output_dir", "{p}/student", "--resume_from_checkpoint", "true"], "no checkpoint to resume"),
        (["distill.py", "--teacher", "{p}/teacher", "--student", "{p}/segformer1.json", "--dataset", "{p}/tiles", "--output_dir", "{p}/x", "--student_alone", "{p}/none"], "none: no such model folder"),
        (["evaluate.py", "--model", "{p}/student", "--dataset", "{p}/tiles", "--output", "{p}/none/x.json"], "its folder does not exist"),
        (["evaluate.py", "--model", "{p}/student", "--dataset", "{p}/tiles", "--device", "gpu"], "device gpu"),
        (["evaluate.py", "--model", "{p}/tiles", "--dataset", "{p}/tiles"], "not a model folder"),
        (["evaluate.py", "--model", "{p}/student", "--dataset", "{p}/tiles", "--split", "tset"], "no split 'tset'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_a_status(project, words, message, monkeypatch, capsys):
    script, *options = (word.format(p=project) for word in words)
    monkeypatch.setattr(sys, "argv", [script, *options])
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(SystemExit) as ended:
        errors.run_script(importlib.import_module(f"scripts.{Path(script).stem}").main)
    assert ended.value.code == 2
    assert_one_error(capsys.readouterr().err, message)
    assert not (project / "x").exists() or not list((project / "x").glob("*.safetensors"))


def test_the_process_of_a_script_ends_with_the_status_of_its_error(project):
    done = run_script("evaluate.py", "--model", project / "student", "--dataset", project / "tiles", "--split", "tset")
    assert done.returncode == 2
    assert_one_error(done.stderr, "no split 'tset'")


def assert_one_error(output: str, message: str):
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0], output[-2000:]
    assert "Traceback" not in output


@pytest.mark.parametrize("script", ["prepare_dataset.py", "train_teacher.py", "distill.py", "evaluate.py", "demo.py"])
def test_every_script_explains_its_options(script):
    done = succeed(script, "--help")
    assert "usage" in done.stdout and len(done.stdout) > 500


@pytest.mark.slow
def test_demo_makes_table_pictures_and_card(tmp_path):
    succeed("demo.py", "--output", tmp_path / "demo", "--max_steps", "4")
    assert "distilled student" in (tmp_path / "demo" / "results.md").read_text()
    assert Image.open(tmp_path / "demo" / "comparison.png").size[0] > 500
    assert (tmp_path / "demo" / "student" / "README.md").is_file()
