import numpy as np
import pytest
import torch
from transformers import SegformerImageProcessor

from drd_hf.data import SegmentationClass, load_splits, prepare_dataset
from drd_hf.data.facts import DatasetFacts
from drd_hf.errors import UserError
from drd_hf.evaluation import check_labels, evaluate_model, milliseconds_per_tile

from .conftest import LABELS, tiny_model

FACTS = DatasetFacts("squares", tuple(SegmentationClass(name, (40 * i, 0, 0)) for i, name in LABELS.items()))


def read_square(record):
    generator = np.random.default_rng(record)
    label = np.kron(generator.integers(0, 3, (5, 5)), np.ones((20, 20))).astype(np.uint8)  # 100 x 100
    label[:7] = 255
    image = np.repeat((label[..., None] * 80 + generator.integers(0, 60, (100, 100, 3))).clip(0, 255), 1, axis=2)
    return image.astype(np.uint8), label, f"square{record}", {}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "squares"
    sources = {"train": [0, 1], "validation": [2], "test": [3, 4]}
    prepare_dataset(sources, read_square, FACTS, output, tile_size=64, stride=32)
    return load_splits(output)


def test_each_pixel_of_overlapping_tiles_is_counted_once(splits):
    model, processor = tiny_model("segformer").eval(), SegformerImageProcessor(do_resize=False)
    metrics = evaluate_model(model, processor, splits["test"], batch_size=3, device="cpu")
    counted = sum(int((read_square(record)[1] != 255).sum()) for record in (3, 4))
    assert int(metrics.matrix.sum()) == counted


def test_scores_equal_those_of_a_plain_loop(splits):
    model, processor = tiny_model("segformer").eval(), SegformerImageProcessor(do_resize=False)
    matrix = np.zeros((3, 3), dtype=np.int64)
    seen = {}
    for tile in splits["test"]:
        pixels = processor(tile["image"], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = model(pixel_values=pixels).logits
        guess = torch.nn.functional.interpolate(logits, size=(64, 64), mode="bilinear").argmax(1)[0].numpy()
        label = np.array(tile["label"])
        done = seen.setdefault(tile["source"], np.zeros((100, 100), dtype=bool))
        window = done[tile["row"] : tile["row"] + 64, tile["column"] : tile["column"] + 64]
        counted = (label != 255) & ~window
        np.add.at(matrix, (label[counted], guess[counted]), 1)
        window[:] = True
    metrics = evaluate_model(model, processor, splits["test"], batch_size=4, device="cpu")
    np.testing.assert_array_equal(metrics.matrix.cpu().numpy(), matrix)


def test_a_model_is_scored_on_the_channels_that_it_reads(splits):
    # Final scores were taken on all channels in the order of the tiles, whatever the model was trained on.
    model, processor = tiny_model("segformer").eval(), SegformerImageProcessor(do_resize=False)
    swapped = tiny_model("segformer").eval()
    first = next(module for module in swapped.modules() if isinstance(module, torch.nn.Conv2d))
    first.weight.data = first.weight.data[:, [2, 1, 0]]
    for name in ("image_mean", "image_std"):
        setattr(processor, name, [0.5, 0.5, 0.5])
    expected = evaluate_model(model, processor, splits["test"], device="cpu").matrix
    matrix = evaluate_model(swapped, processor, splits["test"], device="cpu", channels=[2, 1, 0]).matrix
    assert torch.equal(torch.as_tensor(matrix), torch.as_tensor(expected))


def test_a_model_with_other_labels_is_refused(splits):
    model = tiny_model("segformer")
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(UserError, match=r"the model predicts \['a', 'b', 'c'\]"):
        check_labels(model, splits.info.id2label, "the model")


def test_timing_gives_one_positive_number_for_each_model():
    times = milliseconds_per_tile([tiny_model("segformer"), tiny_model("upernet")], 64, "cpu", rounds=3)
    assert len(times) == 2 and all(t > 0 for t in times)
