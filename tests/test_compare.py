"""The comparison of methods: plans are real commands, runs are resumable, tables say what their lines say."""

import argparse
import json
import math
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from datasets import load_dataset
from PIL import Image

from drd_hf import DistillationConfig, SegmentationConfig, load_splits
from drd_hf.arguments import parse_arguments
from drd_hf.data.transforms import TrainTransform
from drd_hf.errors import UserError
from drd_hf.losses.methods import METHODS
from drd_hf.runs import DataArguments

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks import compare, tables  # noqa: E402
from benchmarks.study import lines as results  # noqa: E402
from benchmarks.study.cells import SAME_TEACHER, require_same_teachers, run_cells  # noqa: E402
from benchmarks.study.data import ensure_data, keep_labels, labelled_sources  # noqa: E402
from benchmarks.study.plan import Data, candidates, read_study, student_cell, teacher_cell  # noqa: E402
from benchmarks.study.tables import OURS, by_place, collect, markdown, paired_difference, pooled, rows_of, sections  # noqa: E402
from scripts import distill, train_teacher  # noqa: E402

SHARED = ROOT / "../shared/data"
STUDIES = [
    path
    for path in sorted((ROOT / "benchmarks/study").glob("*.yaml"))
    if {"pairs", "base"} & yaml.safe_load(path.read_text()).keys()
]
TILES = "--dataset scenes --scenes_train 2 --scenes_validation 1 --scenes_test 1 --scene_size 128 --tile_size 64"


def architecture(folder, width):
    path = folder / f"segformer{width}.json"
    sizes = [8 * width, 8 * width, 16 * width, 16 * width]
    heads = {"num_attention_heads": [1, 1, 2, 2], "depths": [1, 1, 1, 1], "decoder_hidden_size": 16 * width}
    path.write_text(json.dumps({"model_type": "segformer", "hidden_sizes": sizes, **heads}))
    return str(path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A study of two steps a run; its folder also takes the runs and results."""
    folder = tmp_path_factory.mktemp("study")
    training = {"crop_size": 64, "per_device_train_batch_size": 4, "use_cpu": True}
    content = {
        "dataset": {"name": "scenes", "prepare": TILES, "folds": [f"{folder}/tiles"]},
        "steps": 2,
        "seeds": [0],
        "runs": f"{folder}/runs",
        "settings": training,
        "teachers": {"big": {"options": {"model": architecture(folder, 2), "max_steps": 2, **training}}},
        "pairs": {"big_to_small": {"teacher": "big", "student": {"model": architecture(folder, 1)}}},
        "methods": {"none": None, "drd": {"options": "--method drd={weight}", "weights": [0.1, 1]}},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "tiny.yaml"


def run_study(monkeypatch, tiny, *options):
    monkeypatch.setattr(sys, "argv", ["compare.py", str(tiny), "--results", str(tiny.parent / "results"), *options])
    compare.main()


def test_a_study_is_tuned_on_validation_compared_on_test_and_not_repeated(tiny, monkeypatch, capsys):
    folder = tiny.parent / "results"
    run_study(monkeypatch, tiny)
    tuning, compared = (results.read_lines(folder / name) for name in ("compare_tuning.jsonl", "compare.jsonl"))
    by_weight = {line["weight"]: line["validation_mean_iou"] for line in tuning if "command" in line}
    assert list(by_weight) == [None, 0.1, 1]  # None: the student alone, to see the others against
    del by_weight[None]
    assert not any(key.startswith("test") for line in tuning for key in line)
    assert tuning[-1]["chosen_weight"] == max(by_weight, key=by_weight.get)
    assert [line["method"] for line in compared] == ["none", "teacher", "drd"]
    student = compared[-1]
    assert student["weight"] == tuning[-1]["chosen_weight"] and f"drd={student['weight']:g}" in student["command"]
    needed = (
        "dataset pair method fold seed steps test_mean_iou seconds device peak_megabytes milliseconds_per_step".split()
    )
    assert all(student[key] is not None for key in needed)
    assert {"test_iou_building", "versions", "settings"} < student.keys()
    words = shlex.split(student["command"])
    run = json.loads((Path(words[-1]) / "run.json").read_text())
    assert run["command"] == student["command"] and run["steps"] == 2
    assert run["results"]["model"]["test"]["mean_iou"] == student["test_mean_iou"]
    table = (folder / "compare.md").read_text()
    assert f"{100 * student['test_mean_iou']:.1f}" in table and "| drd, tuned |" in table
    with Image.open(folder / "compare_tiny_big_to_small_2_gains.png") as picture:
        assert picture.format == "PNG"

    written = (folder / "compare.jsonl").read_bytes()
    run_study(monkeypatch, tiny)
    assert (folder / "compare.jsonl").read_bytes() == written
    assert "6 runs, 6 of them finished before" in capsys.readouterr().out
    teacher = Path(words[words.index("--teacher") + 1])
    teacher.rename(folder / "elsewhere")  # needed by no run that is left
    run_study(monkeypatch, tiny)
    assert (folder / "compare.jsonl").read_bytes() == written and not teacher.exists()
    with pytest.raises(UserError, match="which is not here; put that one back, or give another folder with --results"):
        run_study(monkeypatch, tiny, "--seeds", "5")
    assert (folder / "compare.jsonl").read_bytes() == written
    (folder / "elsewhere").rename(teacher)


def test_a_teacher_that_was_trained_before_is_only_scored(tiny, monkeypatch):
    (trained,) = (tiny.parent / "runs/tiny/teachers").glob("big_fold0_????????")
    content = yaml.safe_load(tiny.read_text())
    content["teachers"]["big"]["trained"] = {0: str(trained)}
    path = tiny.with_name("again.yaml")
    path.write_text(yaml.safe_dump(content))
    study, folder = read_study(path), tiny.parent / "results"
    cell = teacher_cell(study, "big", 0, 1.0, ROOT)
    assert run_cells(study, lambda: [cell], folder) == []
    before, now = (one for one in results.read_lines(folder / "compare.jsonl") if one["method"] == "teacher")
    assert cell.words[0] == "scripts/evaluate.py" and now["study"] == "again"
    assert now["test_mean_iou"] == pytest.approx(before["test_mean_iou"], abs=1e-9)
    assert now["validation_mean_iou"] == before["validation_mean_iou"] and now["seconds"] == before["seconds"]


def test_a_run_that_fails_leaves_no_line_and_is_named(tiny, monkeypatch, capsys):
    content = yaml.safe_load(tiny.read_text())
    content["methods"] = {"none": None, "wrong": {"options": "--method no_such_method"}}
    other = tiny.with_name("wrong.yaml")
    other.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"1 runs failed; first .*wrong.*no_such_method"):
        run_study(monkeypatch, other, "--stage", "compare", "--methods", "wrong")
    lines = results.read_lines(tiny.parent / "results/compare.jsonl")
    assert not [line for line in lines if line["method"] == "wrong"]


def test_a_run_that_another_runner_is_at_is_waited_for_and_not_repeated(tiny, monkeypatch, capsys):
    study, folder = read_study(tiny), tiny.parent / "results"
    cell = student_cell(study, "big_to_small", study.methods["none"], None, 0, 7, ROOT)
    started = threading.Event()

    def other_runner():
        with results.locked(Path(study.runs) / "locks", cell.folder):
            started.set()
            time.sleep(1)
            line = {"command": cell.command, "method": "none", "validation_mean_iou": 0.5, "test_mean_iou": 0.25}
            results.append_line(folder / "compare.jsonl", line | {"study": "by the other runner"})

    other = threading.Thread(target=other_runner)
    other.start()
    started.wait()
    run_study(monkeypatch, tiny, "--stage", "compare", "--methods", "none", "--seeds", "7")
    other.join()
    assert results.finished(folder / "compare.jsonl")[cell.command]["study"] == "by the other runner"
    assert "validation 0.5000, test 0.2500" in capsys.readouterr().out
    assert not (ROOT / cell.folder / "run.json").exists()


def test_the_weight_with_the_highest_validation_score_is_chosen_once_all_are_there(tiny):
    study = read_study(tiny)
    drd, lines = study.methods["drd"], {}
    cells = candidates(study, "big_to_small", drd, ROOT)
    for cell, score in zip(cells, (None, 0.2), strict=True):  # the first one diverged
        with pytest.raises(UserError, match="weight of drd for big_to_small is not chosen yet: run --stage tune"):
            compare.chosen_weight(study, "big_to_small", drd, lines)
        lines[cell.command] = {"validation_mean_iou": score}
    assert compare.chosen_weight(study, "big_to_small", drd, lines) == 1
    lines[cells[0].command]["validation_mean_iou"] = 0.3
    assert compare.chosen_weight(study, "big_to_small", drd, lines) == 0.1


def options_of(**given):
    nothing = {"pairs": None, "methods": None, "folds": None, "seeds": None, "stage": ["tune", "compare"]}
    return argparse.Namespace(**nothing | given)


def test_every_method_is_compared_once_as_soon_as_it_is_tuned_before_other_folds_and_pairs(tiny, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    content["dataset"]["folds"] = ["a", "b"]
    content["pairs"]["second"] = content["pairs"]["big_to_small"]
    content["tuned_on"] = "big_to_small"
    content["methods"]["kd"] = {"options": "--method kd={weight}", "weights": [1, 10]}
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    study = read_study(path)

    def shown(lines):
        cells, missing = compare.plan(study, options_of(), lines)
        facts = [cell.facts for cell in cells]
        return [(f["pair"], f["method"], f["weight"], f["fold"], f["stage"]) for f in facts], missing, cells

    first, second = "big_to_small", "second"
    tuning = {name: [(first, name, w, 0, "tune") for w in study.methods[name].weights] for name in ("drd", "kd")}
    rows, missing, cells = shown({})
    others = [(first, "none", None, 1, "compare"), *((second, "none", None, fold, "compare") for fold in (0, 1))]
    alone = [(first, "none", None, 0, stage) for stage in ("tune", "compare")]
    assert rows == [*alone, *tuning["drd"], *tuning["kd"], *others]
    assert len(missing) == 2 and all("is not chosen yet" in reason for reason in missing)

    lines = {cell.command: {"validation_mean_iou": cell.facts["weight"]} for cell in cells if "drd" in cell.command}
    rows, missing, cells = shown(lines)
    here = [*alone, *tuning["drd"], (first, "drd", 1, 0, "compare"), *tuning["kd"]]
    there = [
        (p, m, w, f, "compare")
        for p, f in ((first, 1), (second, 0), (second, 1))
        for m, w in (("none", None), ("drd", 1))
    ]
    assert rows == here + there
    assert [reason.split()[3] for reason in missing] == ["kd"]
    assert {cell.facts["tuned_on"] for cell in cells if cell.facts["method"] == "drd"} == {None, first}


def test_a_fold_for_the_weights_alone_is_not_compared(tiny, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    content["dataset"]["folds"] = ["a", {"folder": "b", "compared": False}]
    content["tuning"] = {"fold": 1}
    path = tmp_path / "apart.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    study = read_study(path)
    weights = study.methods["drd"].weights
    scores = {cell.command: {"validation_mean_iou": 0.5} for cell in compare.plan(study, options_of(), {})[0]}
    cells, missing = compare.plan(study, options_of(), scores)
    where = [(cell.facts["method"], cell.facts["fold"], cell.facts["stage"]) for cell in cells]
    assert where == [
        ("none", 1, "tune"),
        ("none", 0, "compare"),
        *[("drd", 1, "tune")] * len(weights),
        ("drd", 0, "compare"),
    ]
    assert not missing
    assert all("test" not in cell.words for cell in cells if cell.facts["fold"] == 1)
    with pytest.raises(UserError, match="folds: 1 is not in the study"):
        compare.plan(study, options_of(folds=[1]), scores)


def test_a_runner_starts_nothing_after_its_hours_and_goes_on_later(tiny, monkeypatch, capsys, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    content["methods"] = {"none": None}
    path = tmp_path / "slices.yaml"
    path.write_text(yaml.safe_dump(content))
    folder, words = tmp_path / "results", ["--stage", "compare", "--seeds", "0", "1"]
    run_study(monkeypatch, path, *words, "--max_hours", "0")
    assert "stopped after 0 hours, 2 runs are left" in capsys.readouterr().out
    assert results.read_lines(folder / "compare.jsonl") == []
    hours = SimpleNamespace(monotonic=lambda: 3600.0 * len(results.read_lines(folder / "compare.jsonl")))
    monkeypatch.setattr("benchmarks.study.cells.time", hours)  # a run takes an hour
    run_study(monkeypatch, path, *words, "--max_hours", "0.5")
    assert "stopped after 0.5 hours, 1 runs are left" in capsys.readouterr().out
    assert [line["seed"] for line in results.read_lines(folder / "compare.jsonl")] == [0]


def test_the_student_alone_and_distilled_start_alike_and_see_the_same_crops(tiny, tmp_path):
    """Without dropout and drop path, all that is random in the first step is the start and the crops."""
    content = yaml.safe_load(tiny.read_text())
    small = json.loads(Path(content["pairs"]["big_to_small"]["student"]["model"]).read_text())
    still = {"classifier_dropout_prob": 0.0, "drop_path_rate": 0.0}
    (tmp_path / "still.json").write_text(json.dumps(small | still))
    content["pairs"]["big_to_small"]["student"] = {"model": str(tmp_path / "still.json")}
    content["settings"] |= {"logging_steps": 1}
    # Which has all that draws numbers of its own: a projector, a generator, a mask. Its weight of 1e-9 teaches nothing.
    content["methods"] = {"none": None, "mgd": {"options": "--method mgd=1e-9"}}
    path = tmp_path / "fair.yaml"
    path.write_text(yaml.safe_dump(content))
    study = read_study(path)
    wanted = (("none", 0), ("mgd", 0), ("none", 1))
    cells = [student_cell(study, "big_to_small", study.methods[name], None, 0, seed, ROOT) for name, seed in wanted]
    assert run_cells(study, lambda: cells, tmp_path / "results") == []
    losses = []
    for cell in cells:
        log = json.loads((ROOT / cell.folder / "run.json").read_text())["log"]
        losses.append([entry.get("task_loss", entry["loss"]) for entry in log if "loss" in entry])
    alone, distilled, other_seed = losses
    assert len(alone) == 2 and distilled == pytest.approx(alone, rel=1e-4)  # both steps: nothing was taught
    assert other_seed[0] != pytest.approx(alone[0], rel=1e-3)


def test_a_diverged_run_is_reported_in_the_table_of_the_others(tiny, monkeypatch, tmp_path):
    """Its line had no number of steps, which put it into a table of its own, and the method looked as if never run."""
    content = yaml.safe_load(tiny.read_text())
    content["methods"] = {"none": None, "kd": {"options": "--method kd=1e39"}}
    path = tmp_path / "diverged.yaml"
    path.write_text(yaml.safe_dump(content))
    run_study(monkeypatch, path)
    found = results.read_lines(tmp_path / "results/compare.jsonl")
    ((_, group),) = sections(found)
    rows = {row["method"]: row for row in rows_of(group)}
    assert rows["kd"]["diverged"] == 1 and rows["kd"]["runs"] == 0 and rows["none"]["runs"] == 1
    assert "not finite" in next(line["error"] for line in found if line["method"] == "kd")
    assert "| kd | `--method kd=1e39` | 0 (1 diverged) |" in (tmp_path / "results/compare.md").read_text()


def test_a_run_that_was_killed_is_repeated_whatever_it_left(tiny, tmp_path):
    study = read_study(tiny)
    cell = student_cell(study, "big_to_small", study.methods["none"], None, 0, 8, ROOT)
    (ROOT / cell.folder / "logs_of_something").mkdir(parents=True)
    assert run_cells(study, lambda: [cell], tmp_path) == []
    (line,) = results.read_lines(tmp_path / "compare.jsonl")
    assert line["seed"] == 8 and not (ROOT / cell.folder / "logs_of_something").exists()


def test_a_teacher_is_not_trained_again_for_other_results(tiny, tmp_path):
    study = read_study(tiny)
    cell = teacher_cell(study, "big", 0, 1.0, ROOT)
    assert run_cells(study, lambda: [cell], tmp_path / "first") == []
    weights = ROOT / cell.folder / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert run_cells(study, lambda: [cell], tmp_path / "second") == []
    first, second = (results.read_lines(tmp_path / name / "compare.jsonl")[0] for name in ("first", "second"))
    assert weights.stat().st_mtime_ns == written and second["test_mean_iou"] == first["test_mean_iou"]


def test_a_weight_is_chosen_by_its_mean_over_seeds_and_not_where_one_diverged(tiny, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    content["tuning"] = {"seeds": [0, 1]}
    content["methods"]["drd"]["weights"] = [0.1, 1, 10]
    path = tmp_path / "seeds.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    study = read_study(path)
    cells = compare.candidates(study, "big_to_small", study.methods["drd"], ROOT)
    assert [(c.facts["weight"], c.facts["seed"]) for c in cells] == [(w, s) for s in (0, 1) for w in (0.1, 1, 10)]
    scores = {(0.1, 0): 0.5, (0.1, 1): 0.3, (1, 0): 0.4, (1, 1): 0.6, (10, 0): 0.9, (10, 1): None}
    lines = {c.command: {"validation_mean_iou": scores[c.facts["weight"], c.facts["seed"]]} for c in cells}
    assert compare.chosen_weight(study, "big_to_small", study.methods["drd"], lines) == 1
    lines.pop(cells[0].command)
    with pytest.raises(UserError, match="drd for big_to_small is not chosen yet"):
        compare.chosen_weight(study, "big_to_small", study.methods["drd"], lines)
    content["tuning"] = {"seeds": 0}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(UserError, match=r"tuning: seeds is 0; give a list of whole numbers such as \[0, 1\]"):
        read_study(path)


def test_where_the_published_weight_is_chosen_its_run_is_that_of_the_method_without_a_weight(tiny, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    content |= {"name": "shared", "methods": {"kd": {"options": "--method kd"}}}
    (tmp_path / "published.yaml").write_text(yaml.safe_dump(content))
    content["methods"] = {"kd": {"options": "--method kd={weight}", "weights": [0.1, 1], "published": 1}}
    (tmp_path / "tuned.yaml").write_text(yaml.safe_dump(content))
    published, tuned = read_study(tmp_path / "published.yaml"), read_study(tmp_path / "tuned.yaml")
    assert published.name == tuned.name == "shared"
    pair = "big_to_small"
    cell = student_cell(published, pair, published.methods["kd"], None, 0, 0, ROOT)
    same = student_cell(tuned, pair, tuned.methods["kd"], 1, 0, 0, ROOT)
    assert same.command == cell.command and same.facts == cell.facts
    other = student_cell(tuned, pair, tuned.methods["kd"], 0.1, 0, 0, ROOT)
    assert "--method kd=0.1 " in other.command and other.facts["tuned_on"] == pair
    assert [c.facts["weight"] for c in compare.candidates(tuned, pair, tuned.methods["kd"], ROOT)] == [0.1, 1]


def test_published_weights_of_the_shipped_study_are_those_of_the_losses():
    study = read_study(ROOT / "benchmarks/study/dubai_tuned.yaml")
    published = read_study(ROOT / "benchmarks/study/dubai_published.yaml")
    tuned = {name: method for name, method in study.methods.items() if name != "none"}
    assert study.name == published.name and set(METHODS) <= {*published.methods} and len(tuned) == 17
    for name, method in tuned.items():
        tenfold = [round(math.log10(weight / method.published), 6) for weight in method.weights]
        assert {-1, 0, 1} <= {*tenfold} and tenfold == list(range(int(tenfold[0]), int(tenfold[-1]) + 1))
        options = method.options_with(method.published)
        assert options == published.methods[name].options
        for one in options.removeprefix("--method ").split():
            assert METHODS[one].weight == method.published


def test_all_pairs_together_keep_chosen_weights_apart_from_published_ones():
    lines = [
        line("none", 0, 0, 0.2, command="none"),
        line("none", 0, 0, 0.3, pair="q", command="none q"),
        line("kd", 0, 0, 0.4, "--method kd", command="kd"),
        line("kd", 0, 0, 0.6, "--method kd=0.1", command="kd 0.1", tuned_on="q"),
        line("kd", 0, 0, 0.8, "--method kd=0.1", pair="q", command="kd q", tuned_on="q"),
    ]
    ((_, group),) = pooled(lines)
    rows = {(row["method"], row["options"]): row for row in rows_of(group)}
    assert rows["kd", ""]["runs"] == 1 and rows["kd", ""]["gain"][0] == pytest.approx(0.2)
    assert rows["kd", "tuned"]["runs"] == 2 and rows["kd", "tuned"]["gain"][0] == pytest.approx(0.45)


def test_ours_is_that_with_its_own_weights_and_ablations_stay_out_of_pooled_tables(tmp_path):
    """Chosen weights of ours ran last, and every lead was theirs, against methods that nothing was chosen for."""
    default, late = "--method drd_channels drd_classes", "2026-05-01T00:00:00+00:00"
    lines = [
        line("none", 0, 0, 0.2, command="none"),
        line(OURS, 0, 0, 0.5, default, command="own"),
        line(OURS, 0, 0, 0.9, default + "=9", command="tuned", tuned_on="p", finished=late),
        line("kd", 0, 0, 0.3, "--method kd", command="kd"),
        line("drd_third", 0, 0, 0.8, "--method drd=0.3", command="ablation", stage="ablate"),
    ]
    behind = {(row["method"], row["tuned"]): row["behind"] for row in rows_of(lines)}
    assert behind["kd", False][0] == pytest.approx(0.2)
    lines += [{**one, "pair": "q", "command": one["command"] + " q"} for one in lines]
    ((_, group),) = pooled(lines)
    assert {row["method"] for row in rows_of(group)} == {"none", OURS, "kd"}
    # Weights that were chosen anew for a pair take the place of those before.
    again = line("kd", 1, 0, 0.6, "--method kd=3", command="3", tuned_on="p", finished=late)
    before = line("kd", 2, 0, 0.1, "--method kd=9", command="9", tuned_on="p")
    ((_, group),) = pooled([*lines, before, again])
    (row,) = (row for row in rows_of(group) if row["method"] == "kd" and row["tuned"])
    assert row["runs"] == 1 and row["test"] == 0.6


def test_tables_of_chosen_weights_and_of_variants_read_the_runs_that_they_name(monkeypatch):
    pair, facts = (
        "upernet-lite2_to_mobilenetv2",
        {"study": "dubai_published", "stage": "compare", "teacher": "upernet-lite2"},
    )
    other = "upernet-lite2_to_segformer-b0"

    def run(method, score, options="", weight=None, **others):
        command = f"{method} {options} {others}"
        return {
            **line(method, 0, 0, score, options),
            **facts,
            "pair": pair,
            "weight": weight,
            "command": command,
            **others,
        }

    compared = [run("none", 0.2), run("none", 0.3, pair=other), run(OURS, 0.5, "x"), run(OURS, 0.7, "x", pair=other)]
    compared += [run("dist", 0.4, "dist"), run("kd", None, "kd", error="not finite")]
    compared += [run("dist", 0.3, "dist=10", 10, tuned_on=pair), run("dist", 0.9, "dist=100", 100, tuned_on=pair)]
    compared += [run("drd_classes", 0.6, "c", pair=other), run("default_kd", 0.8, "k", pair=other, stage="ablate")]
    compared += [run("default_10", 0.25, "s", pair=other, stage="ablate", labelled=0.1)]
    del compared[5]["test_mean_iou"]
    best = {"dist": 10, "kd": 1}
    chosen = [
        run(name, None, "t", w, seed=seed, fold=3, steps=200, pair=pair, stage="tune", command=f"{name} {w} {seed}")
        | {"validation_mean_iou": 0.4 if w == best[name] else None if w == 0.1 else 0.3}
        for name, weights in (("dist", (0.1, 1, 10, 100)), ("kd", (0.1, 1, 10)))
        for w in weights
        for seed in (0, 1)
    ]
    chosen += [
        run("none", None, seed=seed, fold=3, steps=200, pair=pair, stage="tune", command=f"none {seed}")
        | {"validation_mean_iou": score}
        for seed, score in enumerate((0.40, 0.42))
    ]
    monkeypatch.setattr(tables, "read_lines", lambda path: chosen if "tuning" in path.name else compared)
    head, _, dist, kd, alone = tables.compare_tuned().splitlines()
    assert dist == (
        "| `dist` | 0.1: diverged, 1: 30.0, 10: 40.0, 100: 30.0 | 10 | -10.0 (n 1) | +10.0 (n 1) | +20.0 (n 1) | |"
    )  # not the 0.9 of another weight, nor the 0.4 of the published one
    assert kd == "| `kd` | 0.1: diverged, 1: 40.0, 10: 30.0 | 1 (published) | | | | |"
    assert alone == "| student alone | 41.0 | | | | | |"
    rows = tables.compare_ablations().splitlines()[2:]
    assert rows == [
        f"| `c` | +30.0 (n 1) | `{OURS}` | -10.0 (n 1) |",
        f"| `k` | +50.0 (n 1) | `{OURS}` | +10.0 (n 1) |",
        f"| `s`, 10% of labels | | `{OURS}` | -45.0 (n 1) |",
    ]
    assert "default_kd" not in tables.compare()


def test_a_pair_has_its_own_steps_unless_the_command_says_otherwise(tiny, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    content["pairs"]["longer"] = {**content["pairs"]["big_to_small"], "steps": 5}
    path = tmp_path / "steps.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    for asked, tuned, expected in ((None, None, (2, 5)), (7, None, (7, 7)), (None, 3, (3, 3))):
        path.write_text(yaml.safe_dump(content | {"tuning": {"steps": tuned}}, sort_keys=False))
        study = read_study(path, asked)
        for pair, steps in zip(("big_to_small", "longer"), expected, strict=True):
            compared = student_cell(study, pair, study.methods["none"], None, 0, 0, ROOT)
            (tuning, *_) = compare.candidates(study, pair, study.methods["drd"], ROOT)
            assert f"--max_steps {steps} " in tuning.command and tuning.facts["steps"] == steps
            if tuned is None:
                assert f"--max_steps {steps} " in compared.command
                assert compared.facts["study_steps"] == (asked or 2)


def test_a_failed_method_does_not_stop_the_others(tiny, monkeypatch, tmp_path):
    """A tuning run that failed ended the whole study, each time that it was started again."""
    content = yaml.safe_load(tiny.read_text())
    wrong = {"options": "--method no_such_method={weight}", "weights": [1]}
    content["methods"] = {"wrong": wrong, "none": None}
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="1 runs failed; first .*wrong.*no_such_method"):
        run_study(monkeypatch, path)
    students = [line["method"] for line in results.read_lines(tmp_path / "results/compare.jsonl") if line["pair"]]
    assert students == ["none"] and "| none |" in (tmp_path / "results/compare.md").read_text()


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_commands_of_a_shipped_study_are_understood_by_their_scripts(path):
    study, first = read_study(path), True
    for pair in study.pairs:
        cells = []
        for method in (*study.methods.values(), *study.ablations.values()):
            if first or method.name in ("none", "drd", "kd"):
                weight = method.weights[0] if method.weights else 1.0
                cells.append(student_cell(study, pair, method, weight, 0, 1, ROOT))
        cells += [cell.teacher for cell in cells if cell.teacher is not None]
        first = False
        for cell in dict.fromkeys(cells):
            if cell.words[0] == "scripts/evaluate.py":
                continue
            # bf16 is refused where there is no GPU; everything else is parsed as the script does it.
            words = " ".join(cell.words[1:]).replace("--bf16 true", "").split()
            if cell.words[0] == "scripts/distill.py":
                models, data, args = parse_arguments(
                    distill.ModelArguments, DataArguments, DistillationConfig, description="", argv=words
                )
                assert models.student and models.teacher and not models.score_teacher
            else:
                models, data, args = parse_arguments(
                    train_teacher.ModelArguments, DataArguments, SegmentationConfig, description="", argv=words
                )
                assert models.model
            assert args.output_dir == cell.folder and data.dataset == cell.data.folder
            assert args.seed == cell.facts["seed"] and args.max_steps > 0


def test_all_methods_train_the_student_in_the_same_way():
    study = read_study(ROOT / "benchmarks/study/dubai.yaml")
    pair = "upernet-lite2_to_segformer-b0"
    options = []
    for method in study.methods.values():
        words = list(student_cell(study, pair, method, 1.0, 0, 0, ROOT).words)
        options.append(words[words.index("--dataset") : words.index("--seed") + 2])
    assert len(options) == 20 and all(other == options[0] for other in options)


def test_what_is_chosen_for_dubai_is_chosen_on_tiles_that_no_fold_tests():
    study = read_study(ROOT / "benchmarks/study/dubai.yaml")
    layout = yaml.safe_load((ROOT / "../shared/data/aerial_dubai.yaml").read_text()) if SHARED.is_dir() else None
    own = {"train": [1, 2, 3, 5, 7], "validation": [4], "test": [6, 8]}  # of the layout file
    splits = [{split: [f"Tile {t}/*" for t in tiles] for split, tiles in own.items()}]
    assert layout is None or layout["splits"] == splits[0]
    splits += [fold.splits for fold in study.folds[1:]]
    assert study.compared_folds == [0, 1, 2] and study.tuning["fold"] == 3
    for fold in splits:
        assert sorted(tile for tiles in fold.values() for tile in tiles) == [f"Tile {t}/*" for t in range(1, 9)]
    *compared, tuning = splits
    assert all(fold["validation"] == ["Tile 4/*"] for fold in compared)
    tested = sorted(tile for fold in compared for tile in fold["test"])
    assert tested == [f"Tile {t}/*" for t in (1, 2, 3, 6, 7, 8)]  # each once
    assert tuning["validation"] == ["Tile 4/*", "Tile 5/*"]


def test_a_teacher_sees_the_labels_of_its_student_and_the_student_alone_no_unlabelled_tiles(tiny):
    content = yaml.safe_load(tiny.read_text())
    content["methods"]["drd_half"] = {"like": "drd", "labelled": 0.5}
    content["methods"]["none_half"] = {"like": "none", "labelled": 0.5}
    path = tiny.with_name("half.yaml")
    path.write_text(yaml.safe_dump(content))
    study = read_study(path)
    distilled = student_cell(study, "big_to_small", study.methods["drd_half"], 1.0, 0, 0, ROOT)
    alone = student_cell(study, "big_to_small", study.methods["none_half"], None, 0, 0, ROOT)
    assert distilled.data.folder.endswith("tiles_labelled50")
    assert alone.data.folder == distilled.teacher.data.folder == f"{distilled.data.folder}_only"
    assert "--method drd=1" in distilled.command and alone.words[0] == "scripts/train_teacher.py"


def test_labels_are_kept_for_the_same_images_in_every_share(tiny, tmp_path):
    assert labelled_sources([f"i{n}" for n in range(10)] * 3, 0.25) < labelled_sources(
        [f"i{n}" for n in range(10)], 0.5
    )
    assert [len(labelled_sources([f"i{n}" for n in range(45)], share)) for share in (0.1, 0.25, 1)] == [5, 12, 45]
    study, whole = read_study(tiny), tiny.parent / "tiles"
    ensure_data(study, Data(study.folds[0]), tmp_path)
    keep_labels(whole, tmp_path / "half", 0.5, only_labelled=False)
    keep_labels(whole, tmp_path / "only", 0.5, only_labelled=True)
    splits, half, only = (load_splits(path) for path in (whole, tmp_path / "half", tmp_path / "only"))
    labels = dict.fromkeys(splits["train"]["source"])
    kept = {s for s, label in zip(half["train"]["source"], half["train"]["label"], strict=True) if label is not None}
    assert len(half["train"]) == len(splits["train"]) and len(labels) == 2 and len(kept) == 1
    assert set(only["train"]["source"]) == kept and None not in only["train"]["label"]
    assert len(half["test"]) == len(splits["test"]) and None not in half["test"]["label"]
    for path in (tmp_path / "half", tmp_path / "only"):  # also without the package
        assert len(load_dataset(str(path), cache_dir=tmp_path / "cache")["train"]) == len(load_splits(path)["train"])
    tiles = half["train"].with_transform(TrainTransform(32))
    assert [bool((tile["labels"] != 255).any()) for tile in tiles] == [s in kept for s in half["train"]["source"]]


def test_differences_are_paired_and_their_interval_is_that_of_student():
    alone = {(0, 0): 0.30, (0, 1): 0.40, (1, 0): 0.20, (1, 1): 0.10, (2, 0): 0.9}
    ours = {(0, 0): 0.31, (0, 1): 0.42, (1, 0): 0.23, (1, 1): 0.14, (3, 0): 0.1}
    # Differences 1, 2, 3, 4 points: mean 2.5, deviation sqrt(5/3), t of 3 degrees of freedom at 97.5 % is 3.182446.
    half = 3.182446 * math.sqrt(5 / 3) / math.sqrt(4) / 100
    mean, low, high, n = paired_difference(ours, alone)
    assert n == 4
    assert (mean, low, high) == pytest.approx((0.025, 0.025 - half, 0.025 + half), abs=1e-8)
    mean, low, high, n = paired_difference({(0, 0): 0.5}, {(0, 0): 0.25})
    assert (mean, n) == (0.25, 1) and math.isnan(low) and math.isnan(high)
    assert paired_difference({(0, 0): 0.5}, {(0, 1): 0.5}) is None


def line(method, fold, seed, score, options="", labelled=1.0, **others):
    facts = {
        **{"study": "s", "dataset": "d", "pair": "p", "teacher": "t", "method": method, "options": options},
        **{"alone": method.startswith("none"), "labelled": labelled, "fold": fold, "seed": seed, "steps": 9},
        **{"settings": {}, "error": None, "test_mean_iou": score, "test_iou_road": score, "validation_mean_iou": 0.5},
        **{"seconds": 90.0, "milliseconds_per_step": 10.0, "peak_megabytes": 700, "peak_gpu_megabytes": None},
        **{"device": "CPU", "processor": "x86_64", "command": f"{method} {options} {fold} {seed} {labelled}"},
        **{"student": {"model": "m"}, "tuned_on": None, "code": "c", "finished": "2026-01-01T00:00:00+00:00"},
    }
    return {**facts, **others}


def test_of_each_place_there_is_one_difference():
    """Three seeds of one fold are not three places."""
    ours = {("a", 0): 0.5, ("a", 1): 0.7, ("b", 0): 0.4, ("c", 0): 0.9}
    theirs = {("a", 0): 0.4, ("a", 1): 0.4, ("b", 0): 0.3, ("c", 1): 0.9}
    mean, low, high, n = by_place(ours, theirs)
    assert n == 2 and mean == pytest.approx(0.15)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(12.7062 * 0.05, rel=1e-4)  # t with one degree
    assert by_place(ours, {}) is None
    mean, *_, n = by_place(ours, theirs, place=lambda fold: "one")  # two folds of one place
    assert n == 1 and mean == pytest.approx(0.15)


def test_rows_compare_runs_with_the_same_labels_fold_and_seed():
    lines = [line("none", 0, seed, score) for seed, score in ((0, 0.2), (1, 0.4))]
    lines += [line("none_10", 0, seed, 0.1, labelled=0.1) for seed in (0, 1)]
    lines += [
        line("drd_channels_classes", 0, 0, 0.9),
        line("drd_channels_classes", 0, 0, 0.3),
        line("drd_channels_classes", 0, 1, 0.5),
        line("drd_channels_classes", 0, 2, 0.4, code="d"),
    ]
    lines += [line("drd_10", 0, seed, 0.15, labelled=0.1) for seed in (0, 1)]
    lines += [line("kd", 0, 0, 0.25, "a"), line("kd", 0, 1, None, "a", error="the loss is not finite")]
    ((title, group),) = sections([*lines, line("teacher", 0, 0, 0.8, pair=None)])
    assert title == "d: p, 9 steps"
    rows = {row["method"]: row for row in rows_of(group)}
    assert list(rows) == ["drd_channels_classes", "none", "kd", "drd_10", "none_10"]
    drd = rows["drd_channels_classes"]
    assert drd["runs"] == 3 and drd["test"] == pytest.approx(0.4)  # the repeated run counts once, as its last line
    assert drd["deviation"] == pytest.approx(0.1)
    assert drd["gain"][0] == pytest.approx(0.1) and drd["gain"][3] == 2
    assert rows["drd_10"]["gain"][0] == pytest.approx(0.05)  # not against the student alone with all labels
    assert rows["none"]["gain"] is None and rows["none"]["behind"][0] == pytest.approx(0.1)
    assert (rows["kd"]["runs"], rows["kd"]["diverged"], rows["kd"]["behind"][3]) == (1, 1, 1)
    text = markdown(lines)
    assert "| drd_channels_classes |  | 3 | 50.0 | 40.0 ± 10.0 | +10.0 [+10.0, +10.0] (n 2) |" in text
    assert "Code c (10 runs), d (1 runs)." in text
    assert "| kd | `a` | 1 (1 diverged) | 50.0 | 25.0 | +5.0 (n 1) | +5.0 (n 1) |" in text


@pytest.mark.parametrize("other", [{"settings": {"learning_rate": 1}}, {"student": {"model": "n"}}, {"steps": 10}])
def test_other_students_and_other_settings_are_in_a_table_of_their_own(other):
    lines = [line("none", 0, 0, 0.2, "a"), line("none", 0, 0, 0.3, "b", **other)]
    assert [[one["test_mean_iou"] for one in group] for _, group in sections(lines)] == [[0.2], [0.3]]


def test_all_pairs_together_are_compared_within_each_pair():
    """A run of one pair is never set against the student alone of another one."""
    lines = [line("none", 0, 0, 0.2), line("none", 0, 0, 0.6, pair="q", teacher="u", command="none q")]
    assert pooled(lines[:1]) == []
    lines += [
        line("drd_channels_classes", 0, 0, 0.3, "w1"),
        line("drd_channels_classes", 0, 0, 0.9, "w2", pair="q", teacher="u"),
    ]
    lines += [
        line("drd_channels_classes", 0, 0, 0.4, "w3", finished="2026-02-01T00:00:00+00:00"),
        line("kd", 1, 0, 0.5),
    ]
    ((title, group),) = pooled(lines)
    assert title == "d: all pairs, 9 steps"
    rows = {row["method"]: row for row in rows_of(group)}
    assert rows["drd_channels_classes"]["runs"] == 2 and rows["drd_channels_classes"]["test"] == pytest.approx(
        0.65
    )  # w3 ran after w1
    assert (
        rows["drd_channels_classes"]["gain"][0] == pytest.approx(0.25) and rows["drd_channels_classes"]["gain"][3] == 2
    )
    assert rows["kd"]["gain"] is None and rows["kd"]["behind"] is None
    assert "## d: all pairs, 9 steps" in markdown(lines)
    lines.append(line("none", 1, 0, 0.6, pair="r", command="none r", steps=20, study_steps=9))  # a pair's own steps
    ((title, group),) = pooled(lines)
    assert title == "d: all pairs, 9 or 20 steps" and {one["study_steps"] for one in group} == {9}


def test_a_study_takes_from_its_base_what_it_does_not_say(tiny, tmp_path):
    content = yaml.safe_load(tiny.read_text())
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(content))
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({"base": "whole.yaml", "steps": 7, "methods": {"none": None}}))
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(content | {"name": "shared"}))  # which a base does not hand on
    assert read_study(tmp_path / "whole.yaml").name == "shared"
    part, whole = read_study(tmp_path / "part.yaml"), read_study(tmp_path / "whole.yaml")
    assert part.name == "part" and part.steps == 7 and list(part.methods) == ["none"]
    assert (part.pairs, part.teachers, part.folds, part.settings) == (
        whole.pairs, whole.teachers, whole.folds, whole.settings,
    )  # fmt: skip
    (tmp_path / "part.yaml").write_text(yaml.safe_dump({"base": "other.yaml"}))
    with pytest.raises(UserError, match="other.yaml: cannot be read"):
        read_study(tmp_path / "part.yaml")


def test_methods_are_compared_with_the_options_of_drd_that_ran_last():
    lines = [
        line("kd", 0, 0, 0.3, "kd"),
        line("drd_channels_classes", 0, 0, 0.9, "new", finished="2026-03-01T00:00:00+00:00"),
    ]
    lines += [line("drd_channels_classes", 0, 0, 0.5, "old", finished="2026-02-01T00:00:00+00:00")]
    behind = {row["options"]: row["behind"] for row in rows_of(lines)}
    assert behind["kd"][0] == pytest.approx(0.6) and behind["new"] is behind["old"] is None


def test_a_run_that_was_repeated_with_another_command_counts_once():
    """With a teacher that was trained anew: its students are other commands, and the old ones stayed in the means."""
    lines = [
        line("drd_channels_classes", 0, 0, 0.2, command="old", seconds=10.0),
        line("drd_channels_classes", 0, 0, 0.4, command="new", seconds=30.0),
    ]
    (row,) = rows_of(lines)
    assert (row["runs"], row["test"], row["seconds"]) == (1, 0.4, 30.0)


def test_tables_and_plots_of_few_finished_runs_are_made(tmp_path):
    """The plot of classes took their names from the first line, and failed where that run had diverged."""
    lines = [line("kd", 0, 0, None, "kd", error="not finite"), line("kd", 1, 0, 0.3, "kd")]
    lines[0].pop("test_iou_road")
    for n in range(3):
        lines += [line("none", 0, 0, 0.2), line("drd_channels_classes", 1, 0, 0.4)][n - 1 : n]
        (tmp_path / "compare.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
        collect(tmp_path)
    text = (tmp_path / "compare.md").read_text()
    assert "| kd | `kd` | 1 (1 diverged) | 50.0 | 30.0 |  | +10.0 (n 1) |" in text
    assert "| drd_channels_classes |  | 1 | 50.0 | 40.0 |  |  |" in text  # the student alone has no run of this fold
    assert len(list(tmp_path.glob("*_classes.png"))) == 1 and not list(tmp_path.glob("*_gains.png"))


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on the size of a file is one of POSIX")
def test_a_line_for_which_there_is_no_space_is_taken_back(tmp_path):
    path = tmp_path / "compare.jsonl"
    results.append_line(path, {"command": "a"})
    words = [sys.executable, "-c", FULL_DISK.format(root=str(ROOT), path=str(path))]
    found = subprocess.run(words, capture_output=True, text=True)
    assert found.returncode and "No space left on device" in found.stderr
    results.append_line(path, {"command": "b"})
    assert list(results.finished(path)) == ["a", "b"]
    with path.open("a") as file:
        file.write(json.dumps({"command": "c"}))  # by hand, without an end
    results.append_line(path, {"command": "d"})
    assert list(results.finished(path)) == ["a", "b", "c", "d"]


FULL_DISK = """
import resource, signal, sys
sys.path.insert(0, {root!r})
from benchmarks.study.lines import append_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30, 30))
append_line({path!r}, dict(command="x" * 100))
"""


def test_students_of_another_teacher_are_not_set_beside_those_of_the_first(tiny, tmp_path):
    study = read_study(tiny)
    cells = [student_cell(study, "big_to_small", study.methods["drd"], w, 0, 0, ROOT) for w in (0.1, 1)]
    teacher, alone = cells[0].teacher, student_cell(study, "big_to_small", study.methods["none"], None, 0, 0, ROOT)
    folder = ROOT / teacher.folder  # of the study's run by the first test, or none
    path = tmp_path / "compare.jsonl"
    require_same_teachers([alone, *cells], tmp_path)  # nothing has run
    results.append_line(path, {**cells[0].facts, "command": cells[0].command})
    require_same_teachers([alone], tmp_path)  # it has no teacher
    with pytest.raises(
        UserError, match=r"drd weight 1, fold 0, seed 0: .*students of this pair's teacher in .*--results"
    ):
        require_same_teachers(cells[1:], tmp_path)  # its line is missing: it would be trained again
    seconds = json.loads((folder / "run.json").read_text())["seconds"] if folder.is_dir() else None
    if seconds is None:
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps({"seconds": (seconds := 5.0)}))
    results.append_line(path, {**teacher.facts, "seconds": seconds + 1, "command": teacher.command})
    with pytest.raises(UserError, match="is not the one that is here"):
        require_same_teachers(cells[1:], tmp_path)
    results.append_line(path, {**teacher.facts, "seconds": seconds, "command": teacher.command})
    require_same_teachers(cells[1:], tmp_path)
    elsewhere = {**cells[1].facts, "command": cells[1].command.replace(teacher.folder, "runs/first")}
    results.append_line(path, elsewhere)
    with pytest.raises(UserError, match="in runs/first, which is not here"):
        require_same_teachers(cells[1:], tmp_path)


def test_every_share_and_fold_of_the_shipped_results_has_one_teacher():
    teachers = {}
    for name in ("compare.jsonl", "compare_tuning.jsonl"):
        for command, line in results.finished(ROOT / "benchmarks/results" / name).items():
            if "--teacher" in (words := shlex.split(command)):
                key = tuple(line[key] for key in SAME_TEACHER)
                teachers.setdefault(key, set()).add(words[words.index("--teacher") + 1])
    assert teachers and all(len(folders) == 1 for folders in teachers.values())


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "compare.jsonl"
    results.append_line(path, {"command": "a"})
    with path.open("a") as file:
        file.write('{"command": "b", "test')
    with pytest.raises(UserError, match=r"compare\.jsonl: line 2 is not whole JSON"):
        results.finished(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("pairs"), "pairs is missing"),
        (lambda c: c.update(methds={}), "unknown key 'methds'; nearest: methods"),
        (lambda c: c["methods"].update(kd={}), "kd has no options"),
        (lambda c: c["methods"].update(kd={"options": "--method kd={weight}"}), "give weights to choose from"),
        (
            lambda c: c["methods"].update(kd={"options": "--method kd", "published": 1}),
            "kd has a published weight but no '={weight}'",
        ),
        (lambda c: c["methods"].update(kd={"like": "dr"}), "'dr' is not in the study; it has drd"),
        (lambda c: c["methods"].update(kd={"option": "x"}), "unexpected keyword argument 'option'"),
        (lambda c: c.update(tuned_on="small"), "tuned_on: 'small' is not in the study; it has big_to_small"),
        (lambda c: c["pairs"]["big_to_small"].update(teacher="huge"), "'huge' is not in the study; it has big"),
        (lambda c: c["pairs"]["big_to_small"].update(student="m"), "student of big_to_small is 'm'; give options"),
        (lambda c: c["pairs"].update(big_to_small="big"), "must be a mapping with the keys of a pair"),
        (lambda c: c.update(seeds=3), "seeds is 3; give a list of whole numbers"),
        (lambda c: c.update(steps="ten"), "steps is 'ten'; give a whole number"),
        (lambda c: c.update(tuning={"fold": 9}), "tuning: fold is 9; the dataset has folds 0 to 0"),
        (lambda c: c.update(methods=["none"]), "methods: must be a mapping"),
        (lambda c: c["methods"].update(kd="--method kd"), "kd is '--method kd'; give its keys"),
        (lambda c: c["methods"]["drd"].update(weights=1), "weights of drd is 1; give a list"),
        (
            lambda c: c["methods"]["drd"].update(weights=["1e-3"]),
            "weight of drd is '1e-3', which is not a number; YAML",
        ),
        (lambda c: c["methods"]["drd"].update(published=5), "published of drd is 5, but without a weight drd has 1"),
    ],
)
def test_a_mistake_in_a_study_is_named(tiny, tmp_path, change, message):
    content = yaml.safe_load(tiny.read_text())
    change(content)
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=message) as raised:
        read_study(path)
    assert "wrong.yaml" in str(raised.value) and "\n" not in str(raised.value)
