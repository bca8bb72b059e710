import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, f1_score, jaccard_score, recall_score
from transformers import (
    EvalPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

from drd_hf.errors import UserError
from drd_hf.metrics import BoundaryIoU, SegmentationMetrics, boundary_band, confusion, count_pairs

ROOT = Path(__file__).resolve().parents[1]
NAMES = {0: "road", 1: "building", 2: "tree", 3: "car"}


@st.composite
def label_maps(draw):
    """K classes, and class ids and references (B, H, W); some references are 255."""
    k = draw(st.integers(2, 5))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 6)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    predictions, references = rng.integers(0, k, shape), rng.integers(0, k, shape)
    references[rng.random(shape) < draw(st.sampled_from([0.0, 0.3]))] = 255
    return k, predictions, references


@settings(deadline=None, max_examples=60)
@given(label_maps())
def test_scores_equal_those_of_scikit_learn(maps):
    k, predictions, references = maps
    metrics = SegmentationMetrics({i: f"c{i}" for i in range(k)})
    metrics.update(torch.from_numpy(predictions), torch.from_numpy(references))
    scores = metrics.compute()

    y, p = references[references != 255], predictions[references != 255]
    if len(y) == 0:
        assert all(math.isnan(value) for value in scores.values())
        return
    labels = list(range(k))
    assert (metrics.matrix.numpy() == confusion_matrix(y, p, labels=labels)).all()
    present = np.unique(y)
    for score, reference in (("iou", jaccard_score), ("f1", f1_score), ("accuracy", recall_score)):
        expected = reference(y, p, labels=labels, average=None, zero_division=0)
        assert scores[f"mean_{score}"] == pytest.approx(expected[present].mean())
        for c in present:
            assert scores[f"{score}_c{c}"] == pytest.approx(expected[c])
    assert scores["overall_accuracy"] == pytest.approx(accuracy_score(y, p))
    if len(np.union1d(y, p)) > 1:  # with one class kappa is 0 / 0
        assert scores["kappa"] == pytest.approx(cohen_kappa_score(y, p))
    else:
        assert math.isnan(scores["kappa"])


@settings(deadline=None, max_examples=20)
@given(label_maps(), st.integers(1, 3))
def test_counting_in_chunks_or_merging_equals_counting_at_once(maps, chunk):
    k, predictions, references = maps
    id2label = {i: f"c{i}" for i in range(k)}
    at_once, streamed, merged = (SegmentationMetrics(id2label) for _ in range(3))
    at_once.update(predictions, references)
    for i in range(0, len(references), chunk):
        streamed.update(predictions[i : i + chunk], references[i : i + chunk])
        part = SegmentationMetrics(id2label)
        part.update(predictions[i : i + chunk], references[i : i + chunk])
        merged.merge(part)
    assert torch.equal(streamed.matrix, at_once.matrix)
    assert torch.equal(merged.matrix, at_once.matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_logits_are_resized_to_the_reference_before_the_argmax(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 3, 5, generator=generator).to(dtype)
    references = torch.randint(0, 4, (2, 12, 20), generator=generator)
    resized = torch.nn.functional.interpolate(logits.float(), size=(12, 20), mode="bilinear", align_corners=False)
    from_logits, from_ids = SegmentationMetrics(NAMES), SegmentationMetrics(NAMES)
    from_logits.update(logits, references)
    from_ids.update(resized.argmax(1), references)
    assert torch.equal(from_logits.matrix, from_ids.matrix)
    assert from_logits.matrix.sum() == references.numel()


def test_rows_are_the_reference_and_columns_the_prediction():
    metrics = SegmentationMetrics(NAMES)
    metrics.update(torch.tensor([[3, 3, 0]]), torch.tensor([[1, 1, 0]]))
    assert metrics.matrix[1, 3] == 2
    assert metrics.matrix[0, 0] == 1
    assert metrics.matrix.sum() == 3
    assert metrics.matrix.dtype == torch.int64


INTEGERS = ["u1", "i2", "u2", "i4", "u4", "i8", "u8", ">u2", ">i4"]


@pytest.mark.parametrize("dtype", INTEGERS)
def test_numpy_maps_of_every_integer_type_and_byte_order_are_counted(dtype):
    metrics = SegmentationMetrics(NAMES)
    metrics.update(np.array([[0, 1], [2, 3]], dtype), np.array([[0, 1], [2, 255]], dtype))
    assert metrics.matrix.diagonal().tolist() == [1, 1, 1, 0]


def test_masks_of_bool_and_int8_are_counted():
    metrics = SegmentationMetrics({0: "ground", 1: "building"}, ignore_index=-1)
    metrics.update(np.array([[True, False, True]]), np.array([[1, 1, -1]], np.int8))
    assert metrics.matrix.tolist() == [[0, 0], [1, 1]]


@settings(deadline=None, max_examples=60)
@given(
    k=st.sampled_from([1, 2, 6, 14, 15, 19, 179, 180, 256, 300]),  # codes of 8, 16 and 32 bits, and where they change
    dtypes=st.tuples(st.sampled_from(INTEGERS), st.sampled_from(INTEGERS)),
    ignore_index=st.sampled_from([255, 0, 1, -100, 2**40, None]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_matrix_is_the_number_of_each_pair(k, dtypes, ignore_index, seed):
    rng = np.random.default_rng(seed)
    predictions, references = (rng.integers(0, min(k, np.iinfo(t).max + 1), (3, 700)).astype(t) for t in dtypes)
    if ignore_index is not None and np.iinfo(dtypes[1]).min <= ignore_index <= np.iinfo(dtypes[1]).max:
        references[rng.random(references.shape) < 0.2] = ignore_index
    expected = np.zeros((k, k), int)
    for reference, prediction in zip(references.flat, predictions.flat, strict=True):
        if reference != ignore_index:
            expected[reference, prediction] += 1
    metrics = SegmentationMetrics({i: f"c{i}" for i in range(k)}, ignore_index)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(confusion, "CHUNK", 64)  # several chunks, the last of them short
        metrics.update(predictions, references)
    np.testing.assert_array_equal(metrics.matrix, expected)


@pytest.mark.parametrize("k", [2, 20, 200])
@pytest.mark.parametrize("stranger", [-1, -2, 200, 254, 256, 257, 2**16 + 1, 2**32 + 1, -(2**32) + 1])
def test_no_unknown_id_wraps_around_into_a_class(k, stranger):
    # Ids are counted in the narrowest type that holds all pairs: 257 is 1 in eight bits, 2**32 + 1 in 32.
    known, strange = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, stranger, 0])
    for what, maps in (("references", (known, strange)), ("predictions", (strange, known))):
        with pytest.raises(UserError, match=f"{what} contain {stranger}: the classes are 0..{k - 1}"):
            count_pairs(*maps, k)


def test_a_class_that_is_ignored_is_not_counted_and_not_unknown():
    metrics = SegmentationMetrics(NAMES, ignore_index=1)
    metrics.update(torch.tensor([[0, 3, 77]]), torch.tensor([[0, 1, 1]]))
    assert metrics.matrix.sum() == metrics.matrix[0, 0] == 1
    with pytest.raises(UserError, match="references contain 255"):
        metrics.update(torch.tensor([[0]]), torch.tensor([[255]]))


def test_without_an_ignore_index_every_pixel_counts():
    with pytest.raises(UserError, match=r"references contain 255: the classes are 0\.\.3$"):
        SegmentationMetrics(NAMES, ignore_index=None).update(torch.tensor([[0]]), torch.tensor([[255]]))


def test_bytes_are_not_taken_for_negative_marks():
    # torch compares in the type of the tensor: the byte 156 equals -100 there, the padding of the Trainer.
    names = {i: str(i) for i in range(200)}
    maps = torch.tensor([[156, 156]], dtype=torch.uint8)
    for metrics in (SegmentationMetrics(names), SegmentationMetrics(names, ignore_index=-100)):
        metrics.update(maps, maps)
        assert metrics(EvalPrediction(predictions=maps, label_ids=maps))["overall_accuracy"] == 1.0
        metrics.update(maps, maps)
        assert int(metrics.matrix[156, 156]) == 2


def test_arrays_are_counted_where_they_lie():
    maps = np.zeros((4, 4), np.int64)
    assert confusion.as_tensor(maps).data_ptr() == maps.ctypes.data


@pytest.mark.filterwarnings("error")
def test_read_only_and_flipped_arrays_are_counted():
    references = np.array([[0, 1, 2]])
    references.flags.writeable = False
    metrics = SegmentationMetrics(NAMES)
    metrics.update(references[:, ::-1], references)
    assert metrics.matrix[0, 2] == metrics.matrix[1, 1] == metrics.matrix[2, 0] == 1


def test_ignored_pixels_do_not_count_whatever_is_predicted_there():
    metrics = SegmentationMetrics(NAMES, ignore_index=9)
    metrics.update(torch.tensor([[0, 1, 77]]), torch.tensor([[0, 9, 9]]))
    assert metrics.matrix.sum() == 1
    assert metrics.compute()["overall_accuracy"] == 1.0


def test_a_class_that_the_reference_lacks_stays_out_of_the_means():
    metrics = SegmentationMetrics(NAMES)
    # road is right twice and once taken for tree; the reference has neither building, tree nor car
    metrics.update(torch.tensor([[0, 0, 2]]), torch.tensor([[0, 0, 0]]))
    scores = metrics.compute()
    assert scores["mean_iou"] == scores["iou_road"] == pytest.approx(2 / 3)
    assert scores["mean_f1"] == scores["f1_road"] == pytest.approx(4 / 5)
    assert scores["mean_accuracy"] == pytest.approx(2 / 3)
    assert scores["iou_tree"] == scores["f1_tree"] == 0.0 and math.isnan(scores["accuracy_tree"])
    assert all(math.isnan(scores[f"{score}_car"]) for score in ("iou", "f1", "accuracy"))


def test_mean_over_restricts_the_means_but_not_overall_accuracy_and_kappa():
    predictions, references = torch.tensor([[0, 1, 2, 0, 2]]), torch.tensor([[0, 1, 1, 3, 2]])
    everything, some = SegmentationMetrics(NAMES), SegmentationMetrics(NAMES, mean_over=["road", "tree"])
    everything.update(predictions, references)
    some.update(predictions, references)
    assert some.compute()["mean_iou"] == pytest.approx((1 / 2 + 1 / 2) / 2)  # road 1/2, tree 1/2
    assert everything.compute()["mean_iou"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 2 + 0) / 4)
    for score in ("overall_accuracy", "kappa"):
        assert some.compute()[score] == everything.compute()[score]
    assert some.compute()["overall_accuracy"] == pytest.approx(3 / 5)


def test_a_left_out_class_still_counts_against_the_others():
    # GeoSeg's protocol for ISPRS: one matrix of six classes, means over the first five, overall accuracy of all six.
    names = {0: "building", 1: "car", 2: "clutter"}
    metrics = SegmentationMetrics(names)
    metrics.update(torch.tensor([[0, 0, 0, 1, 2]]), torch.tensor([[0, 0, 2, 1, 2]]))
    five, six = metrics.compute(mean_over=["building", "car"]), metrics.compute()
    assert five["iou_building"] == pytest.approx(2 / 3)  # the clutter taken for a building is in the union
    assert five["mean_iou"] == pytest.approx((2 / 3 + 1) / 2)
    assert six["mean_iou"] == pytest.approx((2 / 3 + 1 + 1 / 2) / 3)
    assert five["overall_accuracy"] == six["overall_accuracy"] == pytest.approx(4 / 5)
    assert (
        five["mean_iou"]
        == SegmentationMetrics.from_matrix(metrics.matrix, names, ["building", "car"]).compute()["mean_iou"]
    )
    with pytest.raises(UserError, match="no class is called 'clutte'; nearest: clutter"):
        metrics.compute(mean_over=["clutte"])


def test_scores_of_the_classes_come_as_lists_too():
    metrics = SegmentationMetrics(NAMES)
    metrics.update(torch.tensor([[0, 0, 2]]), torch.tensor([[0, 0, 0]]))
    scores = metrics.compute(per_category=True)
    for score in ("iou", "f1", "accuracy"):
        expected = [scores[f"{score}_{name}"] for name in NAMES.values()]
        np.testing.assert_array_equal(scores[f"per_category_{score}"], expected)
    assert scores["per_category_iou"][0] == pytest.approx(2 / 3)


def test_scores_can_be_taken_from_the_matrix_of_a_report():
    scores = SegmentationMetrics.from_matrix([[3, 1], [0, 4]], {0: "a", 1: "b"}).compute()
    assert scores["overall_accuracy"] == 7 / 8 and scores["iou_a"] == 3 / 4
    for matrix in ([[3, 1]], [[0.5, 0.5], [0, 1]]):
        with pytest.raises(UserError, match=r"expected integers \(2, 2\)"):
            SegmentationMetrics.from_matrix(matrix, {0: "a", 1: "b"})


RANK = """
import sys, torch
import torch.distributed as dist
from drd_hf.errors import leave_process_group
from drd_hf.metrics import BoundaryIoU, SegmentationMetrics

rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
maps = torch.randint(0, 4, (2, 5, 8, 8), generator=torch.Generator().manual_seed(0))
for kind in (SegmentationMetrics, BoundaryIoU):
    ours, everything = (kind({i: str(i) for i in range(4)}) for _ in range(2))
    everything.update(*maps)
    for i in ((0, 1, 2), (3, 4))[rank]:
        ours.update(*maps[:, i : i + 1])
    for _ in range(2):  # asking twice does not count twice
        assert ours.summed_over_ranks().compute() == everything.compute(), (rank, kind)
    assert ours.compute() != everything.compute()
    if rank == 0:
        ours.reset()  # a rank without data
    total = ours.summed_over_ranks().compute()
    ours.reset()
    for i in (3, 4):
        ours.update(*maps[:, i : i + 1])
    assert total == ours.compute()
leave_process_group()
print("equal")
"""


def test_counts_of_several_processes_sum_up_to_those_of_one(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meet")],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for rank in ranks:
        printed, _ = rank.communicate(timeout=300)  # a busy machine imports torch slowly
        assert rank.returncode == 0 and printed.strip().endswith("equal"), printed


def test_without_processes_the_sum_over_ranks_is_a_copy():
    metrics = SegmentationMetrics(NAMES)
    metrics.update(torch.tensor([[0]]), torch.tensor([[0]]))
    total = metrics.summed_over_ranks()
    metrics.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert int(total.matrix.sum()) == 1


def test_means_come_first_and_every_value_is_a_float():
    scores = SegmentationMetrics({0: "a", 1: "b"}).compute()
    assert list(scores) == (
        ["mean_iou", "mean_f1", "mean_accuracy", "overall_accuracy", "kappa"]
        + ["iou_a", "iou_b", "f1_a", "f1_b", "accuracy_a", "accuracy_b"]
    )
    assert all(type(value) is float and math.isnan(value) for value in scores.values())


def test_compute_keeps_the_counts_unless_it_is_told_to_reset():
    metrics = SegmentationMetrics(NAMES)
    metrics.update(torch.tensor([[0]]), torch.tensor([[0]]))
    assert metrics.compute() and metrics.matrix.sum() == 1
    assert metrics.compute(reset=True)["overall_accuracy"] == 1.0
    assert metrics.matrix.sum() == 0


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (torch.tensor([[0, 0]]), torch.tensor([[4, 7]]), "references contain 4, 7: the classes are 0..3"),
        (torch.tensor([[0, 0]]), torch.tensor([[-1, 0]]), "references contain -1"),
        (torch.tensor([[4, 0]]), torch.tensor([[1, 1]]), "predictions contain 4"),
        (torch.tensor([[255, 0]]), torch.tensor([[1, 1]]), "predictions contain 255"),
        (torch.zeros(2, 2, dtype=torch.long), torch.zeros(2, 3, dtype=torch.long), r"shape \(2, 2\).*\(2, 3\)"),
        (torch.zeros(1, 5, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long), "4 classes"),
        (torch.zeros(2, 4, 2, 2), torch.zeros(1, 4, 4, dtype=torch.long), r"logits \(B, 4, h, w\)"),
        (torch.zeros(4, 2, 2), torch.zeros(4, 4, dtype=torch.long), r"logits \(B, 4, h, w\)"),
        (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1), "references are torch.float32"),
    ],
)
def test_data_that_does_not_fit_is_refused_and_not_counted(predictions, references, message):
    metrics = SegmentationMetrics(NAMES)
    with pytest.raises(UserError, match=message) as caught:
        metrics.update(predictions, references)
    assert "\n" not in str(caught.value)
    assert metrics.matrix.sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"id2label": {}}, "number the classes"),
        ({"id2label": {1: "a", 2: "b"}}, "number the classes"),
        ({"id2label": {0: "a", 1: "a"}}, "names a more than once"),
        ({"id2label": NAMES, "mean_over": ["raod"]}, "no class is called 'raod'; nearest: road"),
        ({"id2label": NAMES, "mean_over": []}, "mean_over is empty"),
    ],
)
def test_classes_that_cannot_be_scored_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        SegmentationMetrics(**arguments)


def test_metrics_of_other_classes_are_not_merged():
    with pytest.raises(UserError, match="cannot merge"):
        SegmentationMetrics({0: "a", 1: "b"}).merge(SegmentationMetrics({0: "b", 1: "a"}))


def test_class_ids_may_be_strings_as_in_a_config_json():
    assert SegmentationMetrics({"1": "b", "0": "a"}).class_names == ["a", "b"]


def test_call_returns_scores_at_the_last_batch_only_and_then_starts_again():
    metrics = SegmentationMetrics(NAMES)
    right, wrong = np.array([[[0, 1]]]), np.array([[[1, 0]]])
    assert metrics(EvalPrediction(predictions=right, label_ids=right), compute_result=False) == {}
    scores = metrics(EvalPrediction(predictions=wrong, label_ids=right), compute_result=True)
    assert scores["overall_accuracy"] == 0.5
    assert metrics(EvalPrediction(predictions=right, label_ids=right))["overall_accuracy"] == 1.0


def test_padding_of_the_trainer_between_ranks_is_ignored():
    # Trainer pads the labels and class maps of a rank with smaller tiles with -100 before it gathers them.
    padded = torch.tensor([[[0, 1], [-100, -100]]])
    assert SegmentationMetrics(NAMES)(EvalPrediction(predictions=padded, label_ids=padded))["overall_accuracy"] == 1.0


def test_a_trainer_reports_the_scores_of_the_whole_evaluation_set(tmp_path):
    torch.manual_seed(0)
    config = SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1], decoder_hidden_size=8,
        id2label=NAMES, label2id={name: i for i, name in NAMES.items()},
    )  # fmt: skip
    model = SegformerForSemanticSegmentation(config).eval()
    tiles = [{"pixel_values": torch.randn(3, 32, 32), "labels": torch.randint(0, 4, (32, 32))} for _ in range(5)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=2, batch_eval_metrics=True, report_to="none", use_cpu=True
    )
    trainer = Trainer(model, arguments, eval_dataset=tiles, compute_metrics=SegmentationMetrics(NAMES))
    first, second = trainer.evaluate(), trainer.evaluate()

    with torch.inference_mode():
        logits = model(torch.stack([tile["pixel_values"] for tile in tiles])).logits
    predicted = torch.nn.functional.interpolate(logits, size=(32, 32), mode="bilinear").argmax(1).flatten()
    references = torch.stack([tile["labels"] for tile in tiles]).flatten()
    expected = jaccard_score(references, predicted, average="macro")
    assert first["eval_mean_iou"] == second["eval_mean_iou"] == pytest.approx(expected, abs=1e-4)


def test_metrics_counted_in_inference_mode_can_be_merged_outside():
    # An in-place addition to a tensor made in inference mode is refused by torch.
    first, second = SegmentationMetrics(NAMES), SegmentationMetrics(NAMES)
    with torch.inference_mode():
        first.update(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    second.update(torch.tensor([[2, 2]]), torch.tensor([[2, 1]]))
    first.merge(second)
    assert int(first.matrix.sum()) == 4


def authors_boundary_iou(predictions, references, k, distance, frame_is_border=True):
    """Per class as the authors' mask_to_boundary does it: a mask less its erosion, d times 3x3, after a frame of zeros."""
    intersection, union = np.zeros(k), np.zeros(k)
    for prediction, reference in zip(predictions, references, strict=True):
        for c in range(k):
            bands = []
            for ids in (prediction, reference):
                mask = np.pad(ids == c, 1) if frame_is_border else np.pad(ids == c, 1, mode="edge")
                eroded = binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=True)
                bands.append((mask & ~eroded)[1:-1, 1:-1])
            intersection[c] += (bands[0] & bands[1]).sum()
            union[c] += (bands[0] | bands[1]).sum()
    return intersection, union


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), distance=st.integers(1, 6), k=st.integers(1, 4), frame=st.booleans())
def test_boundary_iou_is_that_of_its_authors(seed, distance, k, frame):
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, k, (2, 2, 4, 5)).repeat(4, axis=2).repeat(3, axis=3)  # two maps and their references
    predictions, references = np.where(rng.random(blocks.shape) < 0.02, rng.integers(0, k, blocks.shape), blocks)
    outlines = BoundaryIoU({i: f"c{i}" for i in range(k)}, distance, frame_is_border=frame)
    for prediction, reference in zip(predictions, references, strict=True):
        outlines.update(prediction, reference)
    scores = outlines.compute()
    intersection, union = authors_boundary_iou(predictions, references, k, distance, frame)
    for c in range(k):
        expected = intersection[c] / union[c] if union[c] else math.nan
        assert scores[f"boundary_iou_c{c}"] == pytest.approx(expected, nan_ok=True)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), distance=st.integers(1, 4))
def test_ignored_pixels_are_in_no_band_and_make_none(seed, distance):
    rng = np.random.default_rng(seed)
    ids, known = rng.integers(0, 3, (3, 3)).repeat(3, 0).repeat(3, 1), rng.random((9, 9)) < 0.7
    band = boundary_band(torch.from_numpy(ids), distance, torch.from_numpy(known), frame_is_border=False)
    for y, x in np.ndindex(9, 9):
        around = np.s_[max(0, y - distance) : y + distance + 1, max(0, x - distance) : x + distance + 1]
        assert band[y, x] == (known[y, x] and (ids[around] != ids[y, x])[known[around]].any())


def test_a_large_object_moved_by_a_pixel_keeps_its_iou_and_loses_its_outline():
    reference, prediction = torch.zeros(1, 100, 100, dtype=torch.uint8), torch.zeros(1, 100, 100, dtype=torch.uint8)
    reference[:, 20:80, 20:80] = prediction[:, 20:80, 21:81] = 1
    names = {0: "ground", 1: "building"}
    whole, outline = SegmentationMetrics(names), BoundaryIoU(names, distance=1)
    whole.update(prediction, reference)
    outline.update(prediction, reference)
    assert whole.compute()["iou_building"] == pytest.approx(60 * 59 / (60 * 61))
    # rings of 4 * 59 pixels share 59 of the 60 pixels of the upper and the lower side each, less the corners
    assert outline.compute()["boundary_iou_building"] == pytest.approx(118 / (2 * 236 - 118))


def test_a_distance_below_one_is_a_share_of_each_images_diagonal():
    for shape, pixels in (((30, 40), 5), ((60, 80), 10), ((3, 4), 1)):
        maps = torch.randint(0, 2, (2, 1, *shape), generator=torch.Generator().manual_seed(0))
        maps[:, :, : shape[0] // 2] = 0
        share, fixed = BoundaryIoU({0: "a", 1: "b"}, 0.1), BoundaryIoU({0: "a", 1: "b"}, pixels)
        share.update(*maps)
        fixed.update(*maps)
        assert share.compute() == fixed.compute()


def test_references_without_their_outlines_have_no_boundary_iou():
    # as the eroded ISPRS labels: every pixel near a border is 255
    reference = torch.zeros(1, 20, 20, dtype=torch.uint8)
    reference[:, :, 10:] = 1
    prediction = reference.clone()
    reference[:, :, 7:13] = 255
    outlines = BoundaryIoU({0: "a", 1: "b"}, distance=3, frame_is_border=False)
    outlines.update(prediction, reference)
    assert math.isnan(outlines.compute()["mean_boundary_iou"])


def test_an_outline_can_be_counted_in_parts_from_logits_and_over_some_classes():
    generator = torch.Generator().manual_seed(0)
    logits, references = torch.randn(4, 3, 6, 6, generator=generator), torch.zeros(4, 24, 24, dtype=torch.long)
    references[:, 6:, 8:], references[:, 15:], references[0, :3] = 1, 2, 255
    names = {0: "a", 1: "b", 2: "c"}
    at_once, parts, other = (BoundaryIoU(names, 2, mean_over=["a", "c"]) for _ in range(3))
    at_once.update(logits, references)
    parts.update(logits[:1], references[:1])
    other.update(logits[1:], references[1:])
    parts.merge(other)
    scores = at_once.compute()
    assert parts.compute() == scores
    assert scores["mean_boundary_iou"] == pytest.approx((scores["boundary_iou_a"] + scores["boundary_iou_c"]) / 2)
    assert at_once.compute(reset=True) == scores
    assert math.isnan(at_once.compute()["mean_boundary_iou"])


@pytest.mark.parametrize("distance", [0, -1, 1.5])
def test_a_distance_that_is_neither_pixels_nor_a_share_is_refused(distance):
    with pytest.raises(UserError, match="whole pixels from 1 up, or a share of the diagonal below 1"):
        BoundaryIoU(NAMES, distance)


def test_outlines_of_maps_that_do_not_fit_are_refused_and_not_counted():
    outlines = BoundaryIoU(NAMES, 1)
    inside = torch.zeros(9, 9, dtype=torch.long)
    inside[4, 4] = 9
    for maps, message in (
        ((inside, inside * 0), "predictions contain 9"),
        ((inside * 0, inside), "references contain 9"),
        ((inside[0], inside[0]), "outlines need maps"),
        ((inside, inside[:8]), "pass class ids of the same shape"),
    ):
        with pytest.raises(UserError, match=message):
            outlines.update(*maps)
    assert math.isnan(outlines.compute()["mean_boundary_iou"])
    with pytest.raises(UserError, match="cannot merge"):
        outlines.merge(BoundaryIoU(NAMES, 2))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_memory_does_not_grow_with_the_number_of_images():
    maps = np.zeros((8, 512, 512), np.uint8)
    metrics, outlines = SegmentationMetrics(NAMES), BoundaryIoU(NAMES, 3)
    for turn in range(100):
        metrics.update(maps, maps)
        outlines.update(maps[:1], maps[:1])
        if turn == 5:
            before = resident()
    assert int(metrics.matrix[0, 0]) == 100 * maps.size
    assert resident() - before < 40e6  # the maps of one kind alone are 200 MB


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("distance", [math.nan, math.inf, 0, -1, 2.5])
def test_distances_that_are_none_are_refused(distance):
    # Infinity and NaN ended in an OverflowError or a ValueError.
    with pytest.raises(UserError, match="distance .*: give whole pixels"):
        BoundaryIoU({0: "ground", 1: "building"}, distance)
