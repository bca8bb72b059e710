import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, cohen_kappa_score, confusion_matrix, f1_score, jaccard_score, recall_score
from transformers import (
    EvalPrediction,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    Trainer,
    TrainingArguments,
)

from drd_hf.errors import UserError
from drd_hf.metrics import SegmentationMetrics

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


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.int64])
def test_numpy_maps_of_every_integer_type_are_counted(dtype):
    metrics = SegmentationMetrics(NAMES)
    metrics.update(np.array([[0, 1], [2, 3]], dtype), np.array([[0, 1], [2, 255]], dtype))
    assert metrics.matrix.diagonal().tolist() == [1, 1, 1, 0]


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
