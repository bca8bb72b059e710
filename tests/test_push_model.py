"""Models on a local server that speaks the Hub's protocol: pushed by the unmodified client, used by strangers."""

import hashlib
import json
import re
import runpy
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor

from drd_hf import DistillationConfig, SegmentationConfig, SegmentationTrainer
from drd_hf.cards import Example, MeasuredResult, ModelCardFacts, facts_to_json, write_model_card
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.scenes import SCENES, SceneReader, scene_records
from drd_hf.data.splits import read_info
from drd_hf.errors import UserError
from drd_hf.hub import model_files, push_model

from .conftest import LABELS, RandomTiles, tiny_config, tiny_model
from .hub_server import READ_TOKEN, TOKEN, Client, as_a_stranger, holds_a_token, hub  # noqa: F401  (hub is a fixture)

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
COLORS = [[230, 230, 230], [200, 40, 40], [0, 128, 0]]
PUBLISHED = {"README.md", "config.json", "examples/first.png", "model.safetensors", "preprocessor_config.json"}
# Answers a question a line: options of `push_model` or `check_model_push`, or words of a script.
PUSHER = """
import contextlib, io, json, logging, runpy, sys
from drd_hf.errors import UserError
from drd_hf.hub import check_model_push, client, push_model
client.PAUSE = 0.05
logging.basicConfig(level=logging.DEBUG)

def push(**options):
    pushed = push_model(**options)
    return [pushed.url, pushed.sizes]

def script(words):
    sys.argv = words
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            assert end.code == 2, end.code
            raise UserError(err.getvalue().splitlines()[-1]) from None  # below the progress bars
        finally:
            sys.stderr.write(err.getvalue())
    return out.getvalue()

for line in sys.stdin:
    question, options = json.loads(line)
    try:
        answer = {"said": {"push": push, "check": check_model_push, "script": script}[question](**options)}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer), flush=True)
"""
# What a stranger does with a model: the plain classes and the pipeline, on an image of another size.
STRANGER = """
import json
import numpy as np
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModelForSemanticSegmentation, pipeline
name, size = sys.argv[1], json.loads(sys.argv[2])
model = AutoModelForSemanticSegmentation.from_pretrained(name)
AutoImageProcessor.from_pretrained(name)
tile = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), np.uint8))
segments = pipeline("image-segmentation", model=name)(tile)
try:
    AutoConfig.from_pretrained("org/secret")
    secret = "seen"
except OSError:
    secret = "not seen"
print(json.dumps({
    "secret": secret,
    "sum": sum(p.double().sum().item() for p in model.parameters()),
    "id2label": model.config.id2label,
    "colors": model.config.class_colors,
    "segments": [
        [s["label"], s["score"], s["mask"].mode, s["mask"].size, dict(zip(*map(np.ndarray.tolist, np.unique(s["mask"], return_counts=True))))]
        for s in segments
    ],
}))
"""


def facts_of(name: str, **changes) -> ModelCardFacts:
    metrics = {"mean_iou": 0.51, "overall_accuracy": 0.8, "iou_building": 0.4}
    facts = ModelCardFacts(
        model_name=name,
        architecture="SegformerForSemanticSegmentation",
        num_parameters=1234,
        id2label=LABELS,
        colors=COLORS,
        results=[MeasuredResult("scenes", "test", "tiles, each pixel once, 64 px", metrics)],
        dataset_name="scenes",
        examples=[Example("examples/first.png", "A tile")],
    )
    return replace(facts, **changes)


def finished_run(folder: Path, seed: int = 0, **changes) -> Path:
    """What a training script leaves: the model, its card, its record, and much that is nobody's business."""
    model = tiny_model("segformer", seed=seed)
    model.config.class_colors = COLORS
    model.save_pretrained(folder)
    SegformerImageProcessor(do_resize=False).save_pretrained(folder)
    facts = facts_of(folder.name, **changes)
    write_model_card(folder, facts)
    (folder / "run.json").write_text(json.dumps({"card": facts_to_json(facts), "dataset": str(folder)}))
    for name in ("examples/first.png", "examples/of_somebody_else.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(np.full((64, 64, 3), 90 + seed, np.uint8)).save(folder / name)
    for name in ("checkpoint-2", "teacher", "logs", "figures"):
        (folder / name).mkdir()
    save_file({"0.projector.weight": torch.ones(2, 2)}, folder / "projectors.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "teacher" / "model.safetensors")
    for name in (
        ".env",
        "training_args.bin",
        "optimizer.pt",
        "checkpoint-2/optimizer.pt",
        "logs/events",
        "figures/a.txt",
    ):
        (folder / name).write_bytes(b"SECRET=1")
    return folder


def change_weights(folder: Path, **changes) -> None:
    """Add tensors to the weights, and take those away whose value is None."""
    tensors = load_file(folder / "model.safetensors") | changes
    tensors = {name.replace("__", "."): tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


@pytest.fixture(scope="module")
def pusher(hub, tmp_path_factory):  # noqa: F811
    pusher = Client(hub, tmp_path_factory.mktemp("pusher"), PUSHER)
    yield pusher
    pusher.close()


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory) -> Path:
    return finished_run(tmp_path_factory.mktemp("runs") / "student")


@pytest.fixture
def run(shared_run, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(shared_run, tmp_path / "student"))


def test_the_model_arrives_in_one_commit_and_nothing_else_does(hub, pusher, run):  # noqa: F811
    url, sizes = pusher.said("push", folder=str(run), repo_id="org/everything")

    repo = hub.repos["models/org/everything"]
    assert url == f"{hub.endpoint}/org/everything"
    assert len(repo.commits) == 2  # the first is the Hub's own
    files = without_attributes(repo.files)
    assert set(files) == PUBLISHED
    assert {path: len(content) for path, content in files.items()} == sizes
    for path in PUBLISHED - {"README.md"}:
        assert files[path] == (run / path).read_bytes()
    assert "model.safetensors" in repo.commits[-1].lfs
    assert not repo.private
    assert not [path for path, content in files.items() if str(run.parent).encode() in content]


def test_card_is_that_of_the_repository(hub, pusher, run):  # noqa: F811
    pusher.said("push", folder=str(run), repo_id="org/named")

    card = ModelCard(hub.repos["models/org/named"].files["README.md"].decode())
    assert card.data.model_name == "org/named"
    assert {result.metric_type: result.metric_value for result in card.data.eval_results}["mean_iou"] == 0.51
    assert '"org/named"' in card.text
    assert not re.search(r"\bstudent\"", card.text)


def test_card_edited_by_hand_is_pushed_as_it_is(hub, pusher, run):  # noqa: F811
    card = (run / "README.md").read_text().replace("# student", "# The best of all students")
    (run / "README.md").write_text(card)

    for _ in range(2):  # its name is not that of the repository, and the second version still knows the first
        pusher.said("push", folder=str(run), repo_id="org/edited")
        (run / "examples" / "first.png").write_bytes((run / "examples" / "of_somebody_else.png").read_bytes() + b" ")

    assert len(hub.repos["models/org/edited"].commits) == 3
    assert hub.repos["models/org/edited"].files["README.md"].decode() == card
    assert "counts as edited by hand" in pusher.log.read_text()


def test_card_of_an_older_version_is_not_taken_for_one_that_was_edited(tmp_path):
    # Words of the card had changed with the package: the old card was pushed, its code with the name of a folder here.
    run = finished_run(tmp_path / "student")
    (run / "README.md").write_text((run / "README.md").read_text() + "\nWords of an older version.\n")
    assert b"org/renewed" not in model_files(run, "org/renewed")["README.md"]
    record = json.loads((run / "run.json").read_text())
    record["card_sha256"] = hashlib.sha256((run / "README.md").read_bytes()).hexdigest()
    (run / "run.json").write_text(json.dumps(record))
    card = ModelCard(model_files(run, "org/renewed")["README.md"].decode())
    assert card.data.model_name == "org/renewed" and "older version" not in card.content


def test_licence_that_is_given_later_goes_along_with_the_name_of_the_repository(tmp_path, monkeypatch):
    # make_card.py changed the card and not the record: the card counted as edited by hand, with the name of a folder.
    run = finished_run(tmp_path / "student")
    words = ["make_card.py", "--run", str(run), "--license", "apache-2.0", "--name", "My student"]
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(SCRIPTS / "make_card.py"), run_name="__main__")
    assert ModelCard.load(run / "README.md").data.model_name == "My student"
    card = ModelCard(model_files(run, "org/licensed")["README.md"].decode())
    assert (card.data.license, card.data.model_name) == ("apache-2.0", "org/licensed")
    assert json.loads((run / "run.json").read_text())["dataset"] == str(run), "what else is known stays"


def test_only_pictures_that_the_card_shows_go_along(run):
    for name in ("a.png", "b.jpg", "c.txt", "d.png"):
        (run / "figures" / name).write_bytes(b"picture")
    with (run / "README.md").open("a") as card:
        card.write("\n![](figures/a.png) ![](./figures/b.jpg) figures/c.txt ![](https://example.org/figures/d.png)\n")
    assert set(push_model(run, "org/dry", dry_run=True).sizes) == PUBLISHED | {"figures/a.png", "figures/b.jpg"}


def test_dry_run_lists_the_files_without_network_and_token(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    pushed = push_model(run, "org/dry", dry_run=True)
    assert set(pushed.sizes) == PUBLISHED
    assert pushed.sizes["model.safetensors"] == (run / "model.safetensors").stat().st_size
    assert pushed.url.endswith("/org/dry")


def damage_config(run: Path, **changes) -> None:
    path = run / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def damage_card(run: Path, old: str, new: str) -> None:
    path = run / "README.md"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize("damage, expected", [
    (shutil.rmtree, "there is no such folder; give the output folder of distill.py"),
    (lambda run: (run / "run.json").unlink(), "holds no finished run"),
    (lambda run: (run / "run.json").write_text("{"), "is damaged"),
    (lambda run: (run / "model.safetensors").unlink(), "has no model.safetensors, the run is not finished"),
    (lambda run: (run / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
    (lambda run: (run / "examples" / "first.png").unlink(), "its card shows examples/first.png, which is not there"),
    (lambda run: (run / "model.safetensors").write_bytes(b"cut"), "cannot be loaded"),
    (lambda run: change_weights(run, teacher_model__head__weight=torch.ones(2)), "1 tensors are not the model's own, the first is teacher_model.head.weight"),
    (lambda run: change_weights(run, losses__0__projector__weight=torch.ones(2)), "the first is losses.0.projector.weight"),
    (lambda run: change_weights(run, **{"decode_head.classifier.bias": None}), "1 tensors are missing or do not fit, the first is decode_head.classifier.bias"),
    (lambda run: change_weights(run, **{"decode_head.classifier.bias": torch.ones(7)}), "1 tensors are missing or do not fit"),
    (lambda run: damage_config(run, start={"name": "/home/me/secret project"}), "name is '/home/me/secret project', a path of this machine"),
    (lambda run: damage_config(run, starts=["~/secret"]), "starts is '~/secret', a path of this machine"),
    (lambda run: damage_card(run, "model-index:", "results:"), "has no results (model-index)"),
    (lambda run: damage_card(run, "---\n", "---\n["), "its metadata cannot be read"),
])  # fmt: skip
def test_what_is_no_finished_model_alone_is_refused_before_the_hub_is_asked(run, damage, expected):
    damage(run)
    with pytest.raises(UserError) as refusal:  # this process is offline: asking would be another refusal
        push_model(run, "org/refused", token=TOKEN)
    assert expected in str(refusal.value) and str(run) in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


def test_run_without_scores_is_refused(tmp_path):
    with pytest.raises(UserError, match="was not scored; a model is pushed with its scores"):
        push_model(finished_run(tmp_path / "run", results=()), "org/unscored", token=TOKEN)


def test_names_of_classes_may_look_like_paths(tmp_path):
    run = finished_run(tmp_path / "run", id2label={0: "/", 1: "~/building", 2: "tree"})
    damage_config(run, id2label={"0": "/", "1": "~/building", "2": "tree"})
    assert set(push_model(run, "org/odd", dry_run=True).sizes) == PUBLISHED


def test_no_token_and_no_network_are_told(run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match="^org/new: no token for the Hub; run `hf auth login`"):
        push_model(run, "org/new")
    with pytest.raises(UserError, match="^org/new: the Hub is not asked while HF_HUB_OFFLINE is set"):
        push_model(run, "org/new", token=TOKEN)


def test_new_version_replaces_the_old_one_and_its_pictures(hub, pusher, run, tmp_path):  # noqa: F811
    pusher.said("push", folder=str(run), repo_id="org/versions")
    hub.repos["models/org/versions"].files["NOTES.md"] = b"by hand"
    better = finished_run(tmp_path / "better", seed=1, examples=[Example("examples/second.png", "Another tile")])
    shutil.copy(better / "examples" / "first.png", better / "examples" / "second.png")

    pusher.said("push", folder=str(better), repo_id="org/versions")

    repo = hub.repos["models/org/versions"]
    assert len(repo.commits) == 3
    assert set(without_attributes(repo.files)) == PUBLISHED - {"examples/first.png"} | {
        "examples/second.png",
        "NOTES.md",
    }
    assert repo.files["model.safetensors"] == (better / "model.safetensors").read_bytes()


@pytest.mark.parametrize("card", [
    None, b"# no head", b"---\nmodel-index: 3\n---\n", b"---\nmodel-index:\n- name: org/other\n  results: [1]\n---\n",
])  # fmt: skip
def test_repository_of_something_else_is_replaced_only_if_asked(hub, pusher, run, card):  # noqa: F811
    repo_id = f"org/taken-{len(card or b'')}"
    pusher.said("push", folder=str(run), repo_id=repo_id)
    repo = hub.repos[f"models/{repo_id}"]
    files = repo.files
    files |= {"pytorch_model.bin": b"old", "model-00001-of-00002.safetensors": b"old", "README.md": card or b""}
    if card is None:
        del files["README.md"]

    assert pusher.refused("push", folder=str(run), repo_id=repo_id).startswith(f"{repo_id}: holds something else")
    assert pusher.refused("check", repo_id=repo_id).startswith(f"{repo_id}: holds something else")
    assert len(repo.commits) == 2

    pusher.said("push", folder=str(run), repo_id=repo_id, overwrite=True)
    assert set(without_attributes(repo.files)) == PUBLISHED  # no weights that would be read instead


def test_private_is_private_and_does_not_go_into_what_is_public(hub, pusher, run):  # noqa: F811
    pusher.said("push", folder=str(run), repo_id="org/hidden", private=True)
    assert hub.repos["models/org/hidden"].private
    pusher.said("push", folder=str(run), repo_id="org/open")
    assert "the repository is public" in pusher.refused("push", folder=str(run), repo_id="org/open", private=True)


@pytest.mark.parametrize("method, path, how", [
    ("PUT", "/upload/", "cut"),
    ("PUT", "/upload/", 503),
    ("POST", "/info/lfs/objects/batch", 502),
    ("POST", "/preupload/", "cut"),
    ("POST", "/commit/", 504),
    ("POST", "/commit/", "lost"),
    ("POST", "/repos/create", "lost"),
])  # fmt: skip
def test_failure_that_passes_leaves_one_whole_commit(hub, pusher, run, method, path, how):  # noqa: F811
    repo_id = f"org/shaky-{method}{path.replace('/', '-')}-{how}".rstrip("-").replace("--", "-")
    change_weights(run, **{"decode_head.classifier.bias": torch.rand(3)})  # what no test has uploaded before
    hub.fail(method, path, how)

    pusher.said("push", folder=str(run), repo_id=repo_id)

    assert all(failure.times == 0 for failure in hub.failures)
    assert len(hub.repos[f"models/{repo_id}"].commits) == 2
    assert set(without_attributes(hub.repos[f"models/{repo_id}"].files)) == PUBLISHED


@pytest.mark.parametrize("method, path, how", [
    ("POST", "/commit/", "cut"),
    ("POST", "/commit/", 503),
    pytest.param("PUT", "/upload/", "cut", marks=pytest.mark.slow),  # the client has a minute of patience of its own
])  # fmt: skip
def test_failure_that_stays_leaves_the_old_version_whole(hub, pusher, run, method, path, how):  # noqa: F811
    repo_id = f"org/stays-{path.strip('/')}-{how}"
    pusher.said("push", folder=str(run), repo_id=repo_id)
    before = dict(hub.repos[f"models/{repo_id}"].files)
    change_weights(run, **{"decode_head.classifier.bias": torch.rand(3)})
    hub.fail(method, path, how, times=100)
    try:
        message = pusher.refused("push", folder=str(run), repo_id=repo_id)
    finally:
        hub.failures.clear()
    assert message.startswith(f"{repo_id}: {hub.endpoint} does not answer as it should")
    assert hub.repos[f"models/{repo_id}"].files == before
    pusher.said("push", folder=str(run), repo_id=repo_id)
    assert len(hub.repos[f"models/{repo_id}"].commits) == 3


@pytest.mark.parametrize("repo_id, options, expected", [
    ("org/new", {"token": READ_TOKEN}, "org/new: the token may not do this (You don't have the rights"),
    ("stranger/new", {}, "stranger/new: the token may not do this"),
    ("org/new", {"token": "hf_" + "unknown" * 5}, "org/new: the Hub does not know the token"),
    ("org/new", {"token": f"{TOKEN} and more"}, "org/new: the token holds spaces"),
    ("new", {}, "'new' does not say whose repository it is; give ORG/NAME"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_clear_line(hub, pusher, run, repo_id, options, expected):  # noqa: F811
    assert pusher.refused("push", folder=str(run), repo_id=repo_id, **options).startswith(expected)
    assert f"models/{repo_id}" not in hub.repos


def test_conflict_is_told(hub, pusher, run):  # noqa: F811
    hub.fail("POST", "org/conflict/commit/", 409)
    message = pusher.refused("push", folder=str(run), repo_id="org/conflict")
    assert message.startswith("org/conflict: the repository has changed meanwhile") and message.endswith("push again")


def test_a_stranger_uses_the_model_and_does_not_see_a_private_one(hub, pusher, tmp_path):  # noqa: F811
    run = finished_run(tmp_path / "run", seed=3)
    pusher.said("push", folder=str(run), repo_id="org/drd-student-potsdam")
    pusher.said("push", folder=str(run), repo_id="org/secret", private=True)
    home = tmp_path / "stranger"
    home.mkdir()
    width, height = 117, 83

    found = as_a_stranger(hub, home, STRANGER, "org/drd-student-potsdam", json.dumps([width, height]))

    assert found["sum"] == pytest.approx(
        sum(t.double().sum().item() for t in tiny_model("segformer", seed=3).parameters())
    )
    assert found["id2label"] == {str(i): name for i, name in LABELS.items()}
    assert found["colors"] == COLORS
    assert found["secret"] == "not seen"
    counted = 0
    for label, score, mode, size, counts in found["segments"]:
        assert label in LABELS.values()
        assert score is None or 0 <= score <= 1
        assert mode == "L" and size == [width, height]
        assert set(counts) <= {"0", "255"}
        counted += counts["255"]
    assert counted == width * height  # every pixel is in one mask


def test_script_lists_and_pushes(hub, pusher, run):  # noqa: F811
    command = [str(SCRIPTS / "push_to_hub.py"), "--model", str(run), "--repo_id", "org/scripted", "--private"]

    listed = pusher.said("script", words=[*command, "--dry_run"])
    assert set(re.findall(r"^ +[\d,]+  (.+)$", listed, re.M)) == PUBLISHED
    assert "models/org/scripted" not in hub.repos

    said = pusher.said("script", words=command)
    assert said.endswith(f"pushed to {hub.endpoint}/org/scripted\n")
    assert hub.repos["models/org/scripted"].private
    message = pusher.refused("script", words=[*command[:-1], "--public"])
    assert message.startswith("error: org/scripted: the repository is private")


def test_script_pushes_a_space_that_names_the_model(hub, pusher, run):  # noqa: F811
    command = [str(SCRIPTS / "push_to_hub.py"), "--model", str(run), "--repo_id", "org/shown", "--space"]

    said = pusher.said("script", words=[*command, "org/shown-app"])

    assert said.endswith(f"pushed to {hub.endpoint}/spaces/org/shown-app\n")
    space = hub.repos["spaces/org/shown-app"]
    assert space.sdk == "gradio" and len(space.commits) == 2
    assert {"app.py", "requirements.txt", "README.md"} <= set(space.files)
    # Every picture in the folder of the examples went along, whoever had put it there.
    assert [path for path in space.files if path.startswith("examples/")] == ["examples/01.png"]
    card = ModelCard(space.files["README.md"].decode(), ignore_metadata_errors=True).data.to_dict()
    assert card["models"] == ["org/shown"] and card["sdk"] == "gradio"
    assert not [path for path, content in space.files.items() if str(run.parent).encode() in content]
    pusher.said("script", words=[*command, "org/shown-app"])  # the same again is the same

    pusher.said("script", words=[*command[:-1]])
    other = {"README.md": b"---\nsdk: gradio\nmodels: [org/other]\n---\n"}
    space.commits.append(replace(space.commits[-1], id="e" * 40, files=space.files | other))
    models = len(hub.repos["models/org/shown"].commits)
    message = pusher.refused("script", words=[*command, "org/shown-app"])
    assert message.startswith("error: org/shown-app: holds something else already")
    assert len(hub.repos["models/org/shown"].commits) == models


def test_script_writes_the_space_only(run, tmp_path, pusher, hub):  # noqa: F811
    command = [str(SCRIPTS / "push_to_hub.py"), "--model", str(run), "--repo_id", "org/local"]
    said = pusher.said("script", words=[*command, "--space_dir", str(tmp_path / "space")])
    assert "python" in said and (tmp_path / "space" / "app.py").is_file()
    assert "models/org/local" not in hub.repos and "spaces/org/local" not in hub.repos


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "scenes"
    prepare_dataset(scene_records({"train": 1, "validation": 1}), SceneReader(128), SCENES, output, tile_size=64)
    return output


@pytest.fixture
def distil(scenes, shared_run, tmp_path) -> list[str]:
    """Command of a distillation with checkpoints, projectors and a token."""
    for name, width in (("teacher", 2), ("student", 1)):
        tiny_config("segformer", width).to_json_file(tmp_path / f"{name}.json", use_diff=False)
    options = {
        "teacher": tmp_path / "teacher", "student": tmp_path / "student.json", "dataset": scenes, "output_dir": tmp_path / "out",
        "crop_size": 64, "max_steps": 2, "save_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 2,
        "evaluate_on": "validation", "use_cpu": "true", "report_to": "none", "push_to_hub": "true", "hub_token": TOKEN,
    }  # fmt: skip
    return [
        str(SCRIPTS / "distill.py"),
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]


def teacher_in(folder: Path, scenes: Path) -> None:
    torch.manual_seed(0)
    info = read_info(scenes)
    config = tiny_config("segformer", 2)
    config.id2label = dict(info.id2label)
    config.label2id = {name: i for i, name in info.id2label.items()}
    AutoModelForSemanticSegmentation.from_config(config).save_pretrained(folder)
    SegformerImageProcessor(do_resize=False).save_pretrained(folder)


def test_distilled_student_is_pushed_alone_when_all_is_done(hub, pusher, distil, scenes, tmp_path):  # noqa: F811
    # Trainer made the repository at the start, and uploaded the output folder at every checkpoint: optimizer, projectors,
    # logs, a pickle of all arguments, and a card of its own without scores.
    teacher_in(tmp_path / "teacher", scenes)

    said = pusher.said("script", words=[*distil, "--hub_model_id", "org/distilled", "--hub_private_repo", "true"])

    assert said.endswith(f"pushed to {hub.endpoint}/org/distilled\n")
    out, repo = tmp_path / "out", hub.repos["models/org/distilled"]
    assert repo.private and len(repo.commits) == 2
    assert (out / "checkpoint-2" / "projectors.safetensors").is_file()
    files = without_attributes(repo.files)
    assert {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"} <= set(files)
    assert all(path in PUBLISHED or re.fullmatch(r"(figures|examples)/[\w.-]+\.(png|jpg)", path) for path in files)
    assert files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.model_name == "org/distilled" and card.data.eval_results
    assert json.loads(files["config.json"])["class_colors"] == [list(color) for color in read_info(scenes).colors]
    assert not [path for path, content in files.items() if str(tmp_path).encode() in content]
    assert not holds_a_token(out) and TOKEN not in pusher.log.read_text()


@pytest.mark.parametrize("words, expected", [
    (["--hub_model_id", "stranger/new"], "stranger/new: the token may not make it"),
    (["--hub_model_id", "org/new", "--hub_token", READ_TOKEN], "org/new: the token may only read"),
    ([], "push_to_hub needs the repository: give hub_model_id as ORG/NAME"),
    (["--hub_model_id", "org/new", "--hub_strategy", "all_checkpoints"], "hub_strategy=all_checkpoints would publish"),
    (["--hub_model_id", "org/new", "--hub_revision", "v1"], "hub_revision has no effect here"),
])  # fmt: skip
def test_training_does_not_start_for_a_push_that_will_be_refused(
    hub,  # noqa: F811
    pusher,
    distil,
    scenes,
    tmp_path,
    words,
    expected,
):
    teacher_in(tmp_path / "teacher", scenes)
    sent = len(hub.requests)
    assert expected in pusher.refused("script", words=[*distil, *words])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert {request.method for request in hub.requests[sent:]} <= {"GET", "HEAD"}


def test_repository_of_something_else_is_refused_before_the_training(hub, pusher, distil, scenes, run, tmp_path):  # noqa: F811
    # The remedy was --overwrite, which is about the output folder here.
    teacher_in(tmp_path / "teacher", scenes)
    pusher.said("push", folder=str(run), repo_id="org/foreign")
    repo = hub.repos["models/org/foreign"]
    repo.files["README.md"] = b"of somebody else"
    message = pusher.refused("script", words=[*distil, "--hub_model_id", "org/foreign"])
    assert "org/foreign: holds something else already" in message
    assert message.endswith("train without push_to_hub, and push afterwards with push_to_hub.py --overwrite")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_token_goes_to_the_hub_alone_and_into_no_log(hub, pusher, run):  # noqa: F811
    change_weights(run, **{"decode_head.classifier.bias": torch.rand(3)})
    pusher.said("push", folder=str(run), repo_id="org/silent", token=TOKEN)
    pusher.refused("push", folder=str(run), repo_id="org/silent", token=READ_TOKEN, overwrite=True)

    uploads = [request for request in hub.requests if request.to_cdn]
    assert uploads and all(request.authorization is None for request in uploads)
    assert all(TOKEN.encode() not in request.body for request in hub.requests)
    log = pusher.log.read_text()
    assert "org/silent" in log  # the client did log what it did
    assert TOKEN not in log and READ_TOKEN not in log
    assert not holds_a_token(pusher.home) and not holds_a_token(run)


def test_saving_pushes_nothing_and_an_unscored_model_is_not_pushed(tmp_path):
    # Trainer pushes whenever a model is saved. This process is offline: asking the Hub would be an error.
    args = SegmentationConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none", hub_token=TOKEN)
    processor = SegformerImageProcessor(do_resize=False)
    trainer = SegmentationTrainer(
        tiny_model("segformer"), args, processing_class=processor, train_dataset=RandomTiles()
    )
    args.push_to_hub = True
    trainer.save_model()
    trainer._push_from_checkpoint(args.output_dir)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "config.json", "model.safetensors", "preprocessor_config.json"
    }  # fmt: skip
    with pytest.raises(UserError, match="push_to_hub needs the repository: give hub_model_id"):
        trainer.push_to_hub()
    args.hub_model_id = "org/unscored"
    with pytest.raises(UserError, match="out: the run is not finished; call finish_run"):
        trainer.push_to_hub()


def test_push_that_fails_after_the_training_says_how_to_go_on(tmp_path):
    args = SegmentationConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none", hub_model_id="org/later")
    processor = SegformerImageProcessor(do_resize=False)
    trainer = SegmentationTrainer(
        tiny_model("segformer"), args, processing_class=processor, train_dataset=RandomTiles()
    )
    finished_run(tmp_path)
    with pytest.raises(UserError) as refusal:
        trainer.push_to_hub(token=TOKEN)
    assert str(refusal.value).startswith("org/later: the Hub is not asked while HF_HUB_OFFLINE is set")
    assert f"push_to_hub.py --model {tmp_path} --repo_id org/later pushes what is in the folder" in str(refusal.value)


@pytest.mark.parametrize("config_class", [SegmentationConfig, DistillationConfig])
def test_token_is_in_no_text_of_the_arguments(config_class, tmp_path):
    args = config_class(output_dir=str(tmp_path), hub_token=TOKEN, use_cpu=True)
    assert TOKEN not in repr(args) + str(args) + args.to_json_string() + json.dumps(args.to_sanitized_dict())
