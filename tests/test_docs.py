"""What README and docs say exists: commands, options, files, names, numbers; and their code runs."""

import ast
import configparser
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import SegformerImageProcessor

from drd_hf import DistillationConfig, DistillationTrainer, load_student
from drd_hf.data.folder import read_layout
from drd_hf.losses.methods import METHODS
from drd_hf.models import DEFAULT_FEATURE_LAYERS, default_feature_layer

from .conftest import LABELS, RandomTiles, tiny_model

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = sorted(path for folder in ("scripts", "benchmarks") for path in (ROOT / folder).glob("*.py"))
NAMES = [path.name for path in PAGES]
OF_LAUNCHERS = {"--num_processes", "--nproc_per_node"}


def load(path: Path):
    spec = importlib.util.spec_from_file_location(f"docs_test_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tables, hooks = load(ROOT / "benchmarks" / "tables.py"), load(ROOT / "docs" / "hooks.py")


def fences(text: str, language: str = "") -> list[str]:
    return [code for name, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S) if name == language]


def python_of(page: str, heading: str) -> list[str]:
    text = (ROOT / page).read_text()
    (section,) = re.findall(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    return fences(section, "python")


@functools.cache
def options_of(script: str) -> frozenset[str]:
    """The options that `--help` of a script lists, asked without a new process."""
    if script.startswith("-m "):
        main = importlib.import_module(f"{script[3:]}.__main__").main
    else:
        main = load(ROOT / script).main
    printed, argv = io.StringIO(), sys.argv
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv = argv
    assert left.value.code == 0
    listed = re.findall(r"^ +(-.*?)(?:  |$)", printed.getvalue(), re.M)
    return frozenset(re.findall(r"--[\w-]+", " ".join(listed)))


def commands(text: str) -> list[list[str]]:
    """Words of every command: lines of blocks without a language, and inline code that starts like one."""
    lines = "".join(fences(text)).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|accelerate|torchrun|make|pip) [^`]+)`", text)
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words and words[0] in ("python", "accelerate", "torchrun", "make", "pip")]


def check_command(words: list[str]) -> str | None:
    """What is wrong with a command."""
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
        return None if set(words[1:]) <= targets else f"no target {words[1:]}"
    if words[0] == "pip":
        settings = configparser.ConfigParser()
        settings.read(ROOT / "setup.cfg")
        extras = re.findall(r"\[([\w,]+)\]", " ".join(words))
        return None if all(extra in settings["options.extras_require"] for extra in extras) else f"no extra {extras}"
    if "-m" in words:
        start = words.index("-m") + 1
        script = f"-m {words[start]}"
    else:
        start = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if start is None:
            return None if words[0] == "accelerate" and words[1:2] in (["config"], ["launch"]) else "names no script"
        script = words[start]
        if not (ROOT / script).is_file():
            return f"there is no {script}"
    for word in words[:start]:
        if word.startswith("--") and word not in OF_LAUNCHERS:
            return f"{word} is no option of {words[0]}"
    unknown = {word.split("=")[0] for word in words[start:] if word.startswith("--")} - options_of(script)
    return f"{script} has no {', '.join(sorted(unknown))}" if unknown else None


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_names_a_script_and_options_that_it_has(page):
    problems = [
        (shlex.join(words), problem) for words in commands(page.read_text()) if (problem := check_command(words))
    ]
    assert not problems


def test_commands_in_the_help_of_scripts_have_options_that_exist():
    found = 0
    for script in SCRIPTS:
        text = (ast.get_docstring(ast.parse(script.read_text())) or "").replace("\\\n", " ")
        lines = re.findall(r"^ *((?:python|accelerate) .*?)(?:  +#.*)?$", text, re.M)
        for line in lines:
            found += 1
            assert check_command(shlex.split(line, comments=True)) is None, (script.name, line)
    assert found > 20


def test_a_wrong_command_is_seen():
    wrong = {
        "python scripts/distil.py --teacher runs/teacher": "there is no scripts/distil.py",
        "accelerate launch scripts/distill.py --teachers runs/teacher": "scripts/distill.py has no --teachers",
        "accelerate launch --processes 2 scripts/distill.py": "--processes is no option of accelerate",
        "make demos": "no target ['demos']",
        "pip install -e '.[onxx]'": "no extra ['onxx']",
    }
    text = "```\n" + "\n".join(wrong) + "\n```\n"
    assert [check_command(words) for words in commands(text)] == list(wrong.values())


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_options_named_in_sentences_exist(page):
    named = set(re.findall(r"`(--[\w-]+)", page.read_text()))
    scripts = [f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py")]
    known = OF_LAUNCHERS.union(*map(options_of, [*scripts, "benchmarks/compare.py"]))
    assert named <= known


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    assert hooks.broken_links(page) == []


def test_broken_links_are_seen(tmp_path):
    (tmp_path / "other.md").write_text("# A title\n\n## It's here: 1 - 2\n\n```\n# no title\n```\n")
    page = tmp_path / "page.md"
    links = ["other.md", "other.md#a-title", "other.md#its-here-1-2", "other.md#no-title", "none.md", "#nowhere"]
    page.write_text("".join(f"[x]({link}) " for link in links) + "[x](https://example.org/none.md) ![x](none.png)")
    assert hooks.broken_links(page) == ["other.md#no-title", "none.md", "#nowhere", "none.png"]


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("nav:")[2].partition("theme:")[0]
    assert sorted(re.findall(r"\w+\.md", navigation)) == sorted(NAMES[1:])


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_configs_and_results_that_are_named_exist(page):
    named = re.findall(r"(?:scripts/configs|benchmarks)/[\w/.-]+\.(?:yaml|json|py)", page.read_text())
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_names_of_the_package_exist(page):
    text = page.read_text()
    named = set(re.findall(r"(?:`|::: )(drd_hf(?:\.\w+)+)", text))
    for block in fences(text, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("drd_hf"):
                named |= {f"{node.module}.{alias.name}" for alias in node.names}
    for name in named:
        parent, _, last = name.rpartition(".")
        exists = importlib.util.find_spec(parent) and hasattr(importlib.import_module(parent), last)
        assert exists or importlib.util.find_spec(name), name


# Numbers


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_committed_tables_are_what_the_results_give(page):
    text = page.read_text(encoding="utf-8")
    assert tables.render(text) == text, "run make tables"


def test_the_tables_of_the_comparison_are_those_of_its_lines():
    """They stayed behind by half of the runs, and pages sent readers there."""
    results = ROOT / "benchmarks/results"
    assert tables.comparison(results) == (results / "compare.md").read_text(encoding="utf-8"), "run make tables"


def test_every_table_stands_on_a_page():
    named = set(re.findall(r"^<!-- table: (\S+) -->$", "\n".join(page.read_text() for page in PAGES), re.M))
    assert named == set(tables.TABLES)


def test_a_number_changed_by_hand_is_put_right():
    right = tables.render("before\n<!-- table: dubai -->\n<!-- end -->\nafter\n")
    scores = [run["test_mean_iou"] for run in tables.read("dubai")["runs"] if run["method"] == "drd_3_3"]
    assert ", ".join(f"{score:.3f}" for score in scores) in right
    assert right.startswith("before\n<!-- table") and right.endswith("<!-- end -->\nafter\n")
    changed = right.replace(f"{scores[0]:.3f}", "0.999")
    assert changed != right and tables.render(changed) == right


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- table: dubay -->\n<!-- end -->\n", "no table 'dubay'"),
        ("<!-- table: dubai -->\n| 1 |\n", "needs its own <!-- end -->"),
        ("<!-- table: dubai -->\n<!-- table: demo -->\n<!-- end -->\n<!-- end -->\n", "needs its own <!-- end -->"),
        ("<!-- end -->\n<!-- table: dubai -->\n", "needs its own <!-- end -->"),
    ],
)
def test_wrong_markers_are_refused(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tables.render(text)


def test_the_page_of_losses_lists_every_method_with_its_default_weight():
    rows = re.findall(r"^\| `(\w+)` \|.*\| (\S+) \|$", (ROOT / "docs/losses.md").read_text(), re.M)
    assert {name: float(weight) for name, weight in rows} == {name: m.weight for name, m in METHODS.items()}


# Code


def imported(code: str, name: str, folder: Path, monkeypatch):
    """Code as a module in a file: classes are looked up there by pickle and by transformers."""
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module(name)


def first_step(folder: Path, student, teacher, losses=None) -> dict:
    """What is logged of one step of distillation."""
    args = DistillationConfig(
        output_dir=str(folder), max_steps=1, per_device_train_batch_size=4, logging_steps=1, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = DistillationTrainer(
        student, teacher, args, losses=losses, train_dataset=RandomTiles(), eval_dataset=RandomTiles(4),
        processing_class=SegformerImageProcessor(do_resize=False),
    )  # fmt: skip
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry


def test_the_ten_lines_of_a_loss_train_a_student(tmp_path):
    (code,) = python_of("docs/extending.md", "A loss")
    exec(compile(code, "extending.md", "exec"), names := {"__name__": "extending"})
    student, teacher = tiny_model("segformer", seed=1), tiny_model("upernet", width=2, seed=2)
    entry = first_step(tmp_path, student, teacher, losses=[names["loss"]])
    assert entry["mean_feature"] > 0
    assert entry["mean_feature_weighted"] == pytest.approx(10 * entry["mean_feature"], rel=1e-4)
    assert names["loss"].projectors["0"].weight.shape[:2] == (32, 16)


def test_the_ten_lines_of_a_model_family_choose_its_layer(capsys, monkeypatch):
    monkeypatch.setitem(
        DEFAULT_FEATURE_LAYERS, "segformer", DEFAULT_FEATURE_LAYERS["segformer"]
    )  # put back at the end
    known, _ = python_of("docs/extending.md", "A model family")
    exec(compile(known, "extending.md", "exec"), names := {})
    first, others = capsys.readouterr().out.splitlines()
    assert first == "decode_head.batch_norm" and "'linear_fuse'" in others
    assert default_feature_layer(names["model"]) == "decode_head.linear_fuse"


def test_an_architecture_of_ones_own_is_a_student(tmp_path, monkeypatch):
    _, own = python_of("docs/extending.md", "A model family")
    imported(own, "my_architecture", tmp_path, monkeypatch)
    (tmp_path / "my.json").write_text(json.dumps({"model_type": "two_convolutions"}))
    student = load_student(str(tmp_path / "my.json"), id2label=LABELS)
    assert default_feature_layer(student) == "body.1"
    entry = first_step(tmp_path / "run", student, tiny_model("segformer"))
    assert entry["channel_alignment"] > 0 and entry["spatial_class_alignment"] > 0


def test_the_ten_lines_of_a_dataset_prepare_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    areas = {}
    for split, sides in (("train", (128, 64)), ("validation", (64, 64)), ("test", (64, 64))):
        Path("areas", split).mkdir(parents=True)
        areas[split] = rng.integers(0, 256, (*sides, 4), dtype=np.uint8)
        areas[split][..., 3] %= 2
        np.save(f"areas/{split}/a.npy", areas[split])
    (code,) = python_of("docs/extending.md", "A dataset")
    splits = imported(code, "my_areas", tmp_path, monkeypatch).splits
    assert {split: len(splits[split]) for split in splits} == {"train": 2, "validation": 1, "test": 1}
    assert splits.info.id2label == {0: "field", 1: "forest"}
    tile = splits["train"][1]
    np.testing.assert_array_equal(np.array(tile["image"]), areas["train"][64:, :, :3])
    np.testing.assert_array_equal(np.array(tile["label"]), areas["train"][64:, :, 3])


def test_the_lines_that_use_a_student_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tiny_model("segformer").save_pretrained("demo/student")
    SegformerImageProcessor(do_resize=False).save_pretrained("demo/student")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 101, 3), dtype=np.uint8)).save("tile.png")
    (readme,) = python_of("README.md", "I only want to use a student")
    pipeline, classes = python_of("docs/quickstart.md", "Only using a student")
    assert readme == pipeline
    exec(compile(pipeline, "quickstart.md", "exec"), {})
    assert "(101, 70)" in capsys.readouterr().out
    exec(compile(classes, "quickstart.md", "exec"), names := {})
    assert names["classes"].shape == (70, 101)


def test_the_example_of_a_layout_file_is_one(tmp_path):
    (example,) = fences((ROOT / "docs/data.md").read_text(), "yaml")
    (tmp_path / "layout.yaml").write_text(example)
    layout = read_layout(tmp_path / "layout.yaml")
    assert [c.name for c in layout.classes] == ["land", "water"] and set(layout.splits) == {
        "train",
        "validation",
        "test",
    }
