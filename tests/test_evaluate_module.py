"""The scores as a metric of `evaluate`: loaded from the package without the network, counted without keeping maps."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

os.environ["HF_EVALUATE_OFFLINE"] = "1"  # before evaluate is imported

import evaluate
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, f1_score, jaccard_score, recall_score

from drd_hf.errors import UserError
from drd_hf.metrics import EVALUATE_MODULE, SegmentationMetrics

ROOT = Path(__file__).resolve().parents[1]
FORMS = {
    "array": np.asarray,
    "tensor": torch.as_tensor,
    "list of arrays": lambda maps: list(np.asarray(maps)),
    "nested lists": lambda maps: np.asarray(maps).tolist(),
}


@pytest.fixture(scope="module")
def module():
    return evaluate.load(EVALUATE_MODULE)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1), k=st.integers(2, 6), form=st.sampled_from(sorted(FORMS)), chunk=st.integers(1, 4)
)
def test_scores_equal_those_of_scikit_learn(module, seed, k, form, chunk):
    rng = np.random.default_rng(seed)
    predictions, references = rng.integers(0, k, (2, 4, 5, 6))
    references[rng.random(references.shape) < 0.2] = 255
    for i in range(0, 4, chunk):
        maps = (FORMS[form](values[i : i + chunk]) for values in (predictions, references))
        module.add_batch(**dict(zip(("predictions", "references"), maps, strict=True)))
    scores = module.compute(num_labels=k)

    y, p, labels = references[references != 255], predictions[references != 255], list(range(k))
    assert scores["confusion_matrix"] == confusion_matrix(y, p, labels=labels).tolist()
    assert scores["overall_accuracy"] == pytest.approx(accuracy_score(y, p))
    assert scores["kappa"] == pytest.approx(cohen_kappa_score(y, p))
    present = np.unique(y)
    for score, reference in (("iou", jaccard_score), ("f1", f1_score), ("accuracy", recall_score)):
        expected = reference(y, p, labels=labels, average=None, zero_division=0)
        assert scores[f"mean_{score}"] == pytest.approx(expected[present].mean())
        for c in present:
            assert scores[f"per_category_{score}"][c] == scores[f"{score}_{c}"] == pytest.approx(expected[c])


def test_it_loads_offline_from_any_folder(tmp_path):
    code = """if True:
        import socket
        socket.socket.connect = None
        import evaluate
        from drd_hf.metrics import EVALUATE_MODULE
        print(evaluate.load(EVALUATE_MODULE, num_labels=2).compute(predictions=[[[0, 1]]], references=[[[0, 0]]]))
    """
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment = os.environ | offline | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert "'overall_accuracy': 0.5" in done.stdout, done.stderr


def test_its_folder_is_a_package_so_that_it_is_installed_with_the_rest():
    assert (Path(EVALUATE_MODULE) / "__init__.py").exists()
    assert str(ROOT / "drd_hf" / "metrics" / "segmentation_scores") == EVALUATE_MODULE


def test_maps_may_have_different_sizes_and_come_one_by_one_or_with_compute(module):
    module.add(prediction=[[0, 1]], reference=[[0, 0]])
    module.add_batch(
        predictions=[np.zeros((2, 2), int), np.ones((1, 3), int)], references=[[[0, 0], [0, 0]], [[1, 1, 0]]]
    )
    assert len(module) == 3
    scores = module.compute(predictions=torch.ones(1, 1, 1).int(), references=[[[1]]], num_labels=2)
    assert scores["confusion_matrix"] == [[5, 2], [0, 3]]
    assert len(module) == 0


def test_settings_are_defaults_of_load_or_options_of_compute():
    maps = {"predictions": [[[0, 0, 1, 2]]], "references": [[[0, 2, 1, 9]]]}
    names = {0: "ground", 1: "car", 2: "clutter"}
    loaded = evaluate.load(EVALUATE_MODULE, id2label=names, mean_over=["ground", "car"], ignore_index=9)
    scores = loaded.compute(**maps)
    assert scores["mean_iou"] == pytest.approx((1 / 2 + 1) / 2) and scores["iou_clutter"] == 0
    assert loaded.compute(**maps, mean_over=["car"])["mean_iou"] == 1
    assert loaded.compute(**maps)["mean_iou"] == scores["mean_iou"]


def test_its_scores_are_those_of_segmentation_metrics(module):
    rng = np.random.default_rng(0)
    predictions, references = rng.integers(0, 4, (2, 3, 9, 9)).astype(np.uint8)
    references[0] = 255
    metrics = SegmentationMetrics({i: str(i) for i in range(4)})
    metrics.update(predictions, references)
    scores = module.compute(predictions=predictions, references=references, num_labels=4)
    expected = metrics.compute(per_category=True)
    assert {name: scores[name] for name in expected} == expected


def test_it_can_be_combined_with_others():
    both = evaluate.combine([evaluate.load(EVALUATE_MODULE, num_labels=2) for _ in range(2)], force_prefix=True)
    both.add(prediction=[[0, 1]], reference=[[0, 0]])
    both.add_batch(predictions=[[[0, 1]]], references=[[[0, 1]]])
    assert both.compute()["segmentation_scores_0_overall_accuracy"] == 3 / 4


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_neither_memory_nor_files_grow_with_the_number_of_maps(module, tmp_path):
    # What evaluate does by itself: every map goes to an Arrow file, and all of them into memory for compute.
    module = evaluate.load(EVALUATE_MODULE, num_labels=2, cache_dir=str(tmp_path))
    maps = np.zeros((8, 512, 512), np.uint8)
    for turn in range(100):
        module.add_batch(predictions=maps, references=maps)
        if turn == 5:
            before = resident()
    scores = module.compute()
    assert scores["confusion_matrix"] == [[100 * maps.size, 0], [0, 0]]
    assert resident() - before < 40e6  # the maps are 400 MB
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


PROCESS = """
import sys
import evaluate
import torch.distributed as dist
from drd_hf.errors import leave_process_group
from drd_hf.metrics import EVALUATE_MODULE

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}/meet", rank=rank, world_size=2)
module = evaluate.load(EVALUATE_MODULE, num_labels=3, num_process=2, process_id=rank)
for turn in range(2):  # a second evaluation starts at zero
    for _ in range(rank + 1):
        module.add_batch(predictions=[[[0, rank + 1]]], references=[[[0, 0]]])
    scores = module.compute()
    assert (scores is None) == (rank == 1)
    if rank == 0:
        assert scores["confusion_matrix"] == [[3, 1, 2], [0, 0, 0], [0, 0, 0]], scores
leave_process_group()
print("equal")
"""


@pytest.mark.slow
def test_several_processes_count_into_one_result(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(rank), str(tmp_path)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        printed, _ = process.communicate(timeout=150)
        assert process.returncode == 0 and printed.strip().endswith("equal"), printed


def test_several_processes_that_cannot_talk_are_refused():
    # evaluate's own exchange over lock files times out with current versions of filelock.
    module = evaluate.load(EVALUATE_MODULE, num_labels=2, num_process=2, process_id=0)
    with pytest.raises(UserError, match="num_process is 2, but torch.distributed is not initialised"):
        module.compute(predictions=[[[0]]], references=[[[0]]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"references": [[[0, 7]]]}, "references contain 7: the classes are 0..1 \\(and 255 = ignored\\)$"),
        ({"predictions": [[[0, 7]]]}, "predictions contain 7: the classes are 0..1$"),
        ({"references": [[[0, -100]]]}, "references contain -100"),
        ({"references": [[[0, 0, 0]]]}, "pass class ids of the same shape"),
        ({"references": [[[0, 0]], [[0, 0]]]}, "1 predictions and 2 references"),
        ({"references": None}, "predictions or references are missing"),
        ({"predictions": [np.zeros((1, 2))]}, "predictions are torch.float64: pass integer class ids"),
        ({"predictions": None, "references": None}, "no maps were added"),
        ({"num_labels": None}, "neither num_labels nor id2label is known"),
        ({"num_labels": 300}, "give 1 to 256"),
        ({"id2label": {0: "a"}}, "num_labels is 2, id2label has 1 classes"),
        ({"ignore_index": -100}, "ignore_index is -100: ids are 0..255"),
        ({"mean_over": ["x"]}, "no class is called 'x'"),
        ({"reduce_labels": True}, "no option is called reduce_labels: there are num_labels, ignore_index"),
    ],
)
def test_input_that_cannot_be_scored_is_refused_in_one_line(module, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        module.compute(**{"predictions": [[[0, 0]]], "references": [[[0, 0]]], "num_labels": 2} | arguments)
    assert "\n" not in str(caught.value)


def test_what_was_added_survives_a_refused_compute(module):
    module.add_batch(predictions=[[[0, 1]]], references=[[[0, 1]]])
    for arguments in ({}, {"num_labels": 1}, {"num_labels": 2, "predictions": [[[5]]], "references": [[[0]]]}):
        with pytest.raises(UserError):
            module.compute(**arguments)
    assert module.compute(num_labels=2)["confusion_matrix"] == [[1, 0], [0, 1]]


def test_wrong_settings_are_refused_when_it_is_loaded():
    with pytest.raises(UserError, match="id2label has the keys"):
        evaluate.load(EVALUATE_MODULE, id2label={1: "a"})


def test_a_class_that_the_references_lack_does_not_poison_the_mean(module):
    scores = module.compute(predictions=[[[0, 0]]], references=[[[0, 0]]], num_labels=3)
    assert scores["mean_iou"] == 1 and math.isnan(scores["per_category_iou"][1])


@pytest.mark.slow
def test_the_benchmark_of_metrics_prints_a_table_and_writes_json(tmp_path):
    options = "--labels 6 --dtypes uint8 --rounds 1 --tiles 16 --peer_tiles 8 --output".split()
    command = [sys.executable, str(ROOT / "benchmarks" / "metrics.py"), *options, str(tmp_path / "m.json")]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    report = json.loads((tmp_path / "m.json").read_text())
    times = {row["method"]: row["milliseconds"] for row in report["rows"]}
    assert 0 < times["SegmentationMetrics"] < times["mean_iou form"] < times["mean_iou in evaluate"]
    assert {row["method"] for row in report["memory"]} == set(times)
    assert "16 tiles" in done.stdout


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ids_that_are_none_and_no_maps_are_said_as_such():
    # "the classes are 0..255" was said of six classes, and no maps at all had the score NaN.
    module = evaluate.load(EVALUATE_MODULE, num_labels=6)
    with pytest.raises(UserError, match=r"references contain 0 to 300: ids are 0\.\.255"):
        module.add_batch(predictions=[[[0, 1]]], references=[[[0, 300]]])
    with pytest.raises(UserError, match="no maps were added"):
        module.compute(predictions=[], references=[])
