from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForSemanticSegmentation, SegformerImageProcessor
from transformers.modeling_outputs import SemanticSegmenterOutput

from drd_hf.data import (
    CITYSCAPES,
    ISPRS_CLASSES,
    POTSDAM,
    DatasetFacts,
    SegmentationClass,
    SegmentationInfo,
    SourceHeader,
    SourceImage,
    cut_tiles,
    find_isprs,
    load_splits,
    prepare_dataset,
)
from drd_hf.data.tiles import tile_at
from drd_hf.data.transforms import undecoded
from drd_hf.errors import UserError
from drd_hf.evaluation import (
    AugmentedModel,
    check_labels,
    evaluate_model,
    evaluate_sources,
    find_protocol,
    join_tiles,
    joined_sources,
    milliseconds_per_tile,
    protocol_of,
    references_of,
)
from drd_hf.inference import predict_image
from drd_hf.metrics import BoundaryIoU, SegmentationMetrics

from .conftest import LABELS, tiny_config, tiny_model
from .data.official import write_potsdam

FACTS = DatasetFacts("squares", tuple(SegmentationClass(name, (40 * i, 0, 0)) for i, name in LABELS.items()))


def square(record):
    """Image, label, and label without the borders of the squares."""
    generator = np.random.default_rng(record)
    label = np.kron(generator.integers(0, 3, (5, 5)), np.ones((20, 20))).astype(np.uint8)  # 100 x 100
    label[:7] = 255
    image = (label[..., None] * 80 + generator.integers(0, 60, (100, 100, 3))).clip(0, 255).astype(np.uint8)
    eroded = label.copy()
    eroded[::20] = eroded[:, ::20] = 255
    return image, label, eroded


class SquareReader:
    bands = ("red", "green", "blue")

    def header(self, record):
        return SourceHeader(f"square{record}", 100, 100, str(record), eroded=True)

    def read(self, record):
        return SourceImage(f"square{record}", *square(record))


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "squares"
    sources = {"train": [0, 1], "validation": [2], "test": [3, 4]}
    prepare_dataset(sources, SquareReader(), FACTS, output, tile_size=64, stride=32)
    return load_splits(output)


def test_each_pixel_of_overlapping_tiles_is_counted_once(splits):
    model, processor = tiny_model("segformer").eval(), SegformerImageProcessor(do_resize=False)
    metrics = evaluate_model(model, processor, splits["test"], batch_size=3, device="cpu")
    counted = sum(int((square(record)[1] != 255).sum()) for record in (3, 4))
    assert int(metrics.matrix.sum()) == counted


def test_the_eroded_reference_leaves_out_its_borders(splits):
    model, processor = tiny_model("segformer").eval(), SegformerImageProcessor(do_resize=False)
    metrics = evaluate_model(model, processor, splits["test"], device="cpu", label="label_eroded")
    counted = sum(int((square(record)[2] != 255).sum()) for record in (3, 4))
    assert int(metrics.matrix.sum()) == counted < sum(int((square(record)[1] != 255).sum()) for record in (3, 4))


def test_the_protocol_names_the_reference_where_there_are_two(splits):
    assert protocol_of(splits.info) == "tiles, each pixel once, full reference"
    assert protocol_of(splits.info, "label_eroded") == "tiles, each pixel once, eroded reference"
    assert protocol_of(replace(splits.info, has_eroded=False)) == "tiles, each pixel once"
    # Cards of models that were scored on the eroded reference alone did not say so.
    alone = replace(splits.info, has_eroded=False, notes=("Labels are the reference with eroded boundaries: 255.",))
    assert protocol_of(alone) == "tiles, each pixel once, eroded reference"


def test_a_model_in_half_precision_is_scored_and_timed(splits):
    # It met tiles in float32, which ended in a RuntimeError.
    model, processor = tiny_model("segformer").to(torch.bfloat16), SegformerImageProcessor(do_resize=False)
    metrics = evaluate_model(model, processor, splits["test"], batch_size=3, device="cpu")
    assert int(metrics.matrix.sum()) == sum(int((square(record)[1] != 255).sum()) for record in (3, 4))
    assert milliseconds_per_tile([model], 64, "cpu", rounds=1)[0] > 0


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


# Whole images


def tiles_of(image, label, eroded, size, stride, name="image"):
    """Rows of a dataset: what cut_tiles gives, as `decode` takes it."""
    return [
        {
            "image": tile[..., :3],
            "extra_bands": [tile[..., band] for band in range(3, tile.shape[2])],
            "label": label_tile,
            "label_eroded": tile_at(eroded, row, column, size),
            "source": name,
            "row": row,
            "column": column,
        }
        for row, column, tile, label_tile in cut_tiles(image, label, size, stride)
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 50), st.integers(1, 50), st.integers(4, 20), st.data())
def test_joining_undoes_cutting(seed, height, width, size, data):
    stride = data.draw(st.integers(1 if max(height, width) < 20 else size // 2, size))
    generator = np.random.default_rng(seed)
    image = generator.integers(0, 256, (height, width, 5), dtype=np.uint8)
    label = generator.integers(0, 3, (height, width), dtype=np.uint8)
    label[generator.random(label.shape) < 0.3] = 255
    for row in {*range(0, height, stride), max(height - size, 0)}:
        for column in {*range(0, width, stride), max(width - size, 0)}:
            label[row, column] = 0  # so that no tile is left out
    eroded = np.where(generator.random(label.shape) < 0.5, 255, label).astype(np.uint8)
    joined = join_tiles(tiles_of(image, label, eroded, size, stride), ["label", "label_eroded"])
    np.testing.assert_array_equal(joined.image, image)
    np.testing.assert_array_equal(joined.references["label"], label)
    np.testing.assert_array_equal(joined.references["label_eroded"], eroded)
    assert (joined.row, joined.column, joined.filled_pixels) == (0, 0, 0)


def test_what_lies_in_no_tile_is_ignored_and_has_the_mean_colour():
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (60, 80, 3), dtype=np.uint8)
    label = np.full((60, 80), 255, np.uint8)
    label[20:40, 20:40], label[40:60, 60:80] = 1, 2  # two of the 12 tiles of 20 pixels
    joined = join_tiles(tiles_of(image, label, label, 20, 20))
    assert (joined.row, joined.column) == (20, 20) and joined.image.shape == (40, 60, 3)
    np.testing.assert_array_equal(joined.references["label"], label[20:, 20:])
    np.testing.assert_array_equal(joined.image[:20, :20], image[20:40, 20:40])
    np.testing.assert_array_equal(joined.image[20:, 40:], image[40:, 60:])
    mean = np.concatenate([image[20:40, 20:40], image[40:, 60:]]).reshape(-1, 3).mean(0).round()
    assert joined.filled_pixels == 40 * 60 - 2 * 400
    np.testing.assert_array_equal(joined.image[:20, 20:].reshape(-1, 3), np.tile(mean, (20 * 40, 1)))


class FiveBandReader(SquareReader):
    bands = ("red", "green", "blue", "near_infrared", "height")

    def read(self, record):
        image, label, eroded = square(record)
        more = np.random.default_rng(record).integers(0, 256, (100, 100, 2), dtype=np.uint8)
        image = np.concatenate([image, more], axis=2)
        return SourceImage(f"square{record}", image, label if record != 1 else None, eroded if record != 1 else None)

    def header(self, record):
        return SourceHeader(f"square{record}", 100, 100, str(record), labelled=record != 1, eroded=record != 1)


@pytest.fixture(scope="module")
def five_bands(tmp_path_factory):
    output = tmp_path_factory.mktemp("data") / "five"
    prepare_dataset({"train": [0], "test": [1, 2, 3]}, FiveBandReader(), FACTS, output, tile_size=64, stride=48)
    return output


@pytest.mark.parametrize("streaming", [False, True])
def test_a_split_gives_the_images_it_was_prepared_from(five_bands, streaming):
    dataset = load_splits(five_bands, streaming=streaming)["test"]
    for record, joined in zip((1, 2, 3), joined_sources(dataset, ["label", "label_eroded"]), strict=True):
        source = FiveBandReader().read(record)
        assert joined.name == source.name
        image = source.image
        if source.label is None:
            assert joined.references == {"label": None, "label_eroded": None}
        else:
            np.testing.assert_array_equal(joined.references["label"], source.label)
            np.testing.assert_array_equal(joined.references["label_eroded"], source.label_eroded)
        np.testing.assert_array_equal(joined.image, image)


@pytest.mark.parametrize("streaming", [False, True])
def test_ranks_share_the_images(five_bands, streaming):
    dataset = load_splits(five_bands, streaming=streaming)["test"]
    of_ranks = [[(s.number, s.name) for s in joined_sources(dataset, rank=rank, world_size=2)] for rank in (0, 1)]
    assert of_ranks == [[(0, "square1"), (2, "square3")], [(1, "square2")]]


def test_a_damaged_tile_is_named_with_its_image(five_bands):
    def cut_short(row):
        if row["source"] == "square2":
            row["image"] = {"bytes": row["image"]["bytes"][:200], "path": None}
        return row

    dataset = undecoded(load_splits(five_bands)["test"]).map(cut_short)
    with pytest.raises(UserError, match="^square2: the image of a tile is damaged"):
        list(joined_sources(dataset))


def five_band_model():
    config = tiny_config("segformer")
    config.num_channels, config.bands = 5, list(FiveBandReader.bands)
    config.id2label, config.label2id = LABELS, {name: i for i, name in LABELS.items()}
    torch.manual_seed(3)
    return AutoModelForSemanticSegmentation.from_config(config).eval()


def counted(prediction, label):
    matrix = np.zeros((3, 3), np.int64)
    np.add.at(matrix, (label[label != 255], prediction[label != 255]), 1)
    return matrix


@pytest.mark.parametrize("streaming", [False, True])
def test_one_prediction_of_the_whole_image_is_compared_with_both_references(five_bands, streaming):
    splits = load_splits(five_bands, streaming=streaming)
    model = five_band_model()
    processor = SegformerImageProcessor(image_mean=[0.5] * 5, image_std=[0.2] * 5)
    expected = {"full": np.zeros((3, 3), np.int64), "eroded": np.zeros((3, 3), np.int64)}
    outlines = BoundaryIoU(LABELS, 2)
    for record in (2, 3):
        source = FiveBandReader().read(record)
        prediction = predict_image(model, processor, source.image, 64, 0.5)
        expected["full"] += counted(prediction, source.label)
        expected["eroded"] += counted(prediction, source.label_eroded)
        outlines.update(prediction, source.label)
    seen = []
    evaluation = evaluate_sources(
        model,
        processor,
        splits["test"],
        splits.info,
        overlap=0.5,
        reference="both",
        device="cpu",
        boundary_distance=2,
        on_source=lambda source, prediction: seen.append((source.name, prediction.shape)),
    )
    assert {name: m.matrix.tolist() for name, m in evaluation.metrics.items()} == {
        name: matrix.tolist() for name, matrix in expected.items()
    }
    assert evaluation.outlines["full"].compute() == outlines.compute() and list(evaluation.outlines) == ["full"]
    assert seen == [("square2", (100, 100)), ("square3", (100, 100))]
    assert evaluation.unlabelled == ("square1",)
    of_last = counted(prediction, source.label)
    assert evaluation.sources[1].overall_accuracy["full"] == pytest.approx(of_last.trace() / of_last.sum())


def test_evaluation_refuses_what_does_not_fit_in_one_line(splits, five_bands):
    model, processor, info = tiny_model("segformer"), SegformerImageProcessor(), splits.info
    test = splits["test"]
    mixed = test.select([0, len(test) - 1, 1])
    with pytest.raises(UserError, match="do not stand together: pass a split as load_splits gives it"):
        evaluate_sources(model, processor, mixed, info, device="cpu")
    with pytest.raises(UserError, match="the model reads 3 bands"):
        five = load_splits(five_bands)
        evaluate_sources(model, processor, five["test"], five.info, device="cpu")
    with pytest.raises(UserError, match="squares has no eroded reference, only the full one"):
        evaluate_sources(model, processor, test, replace(info, has_eroded=False), reference="eroded")
    with pytest.raises(UserError, match="unknown reference 'erosion'; nearest: eroded"):
        evaluate_sources(model, processor, test, info, reference="erosion")
    with pytest.raises(UserError, match="no column label_eroded: prepare it with that reference"):
        evaluate_sources(model, processor, test.remove_columns("label_eroded"), info, reference="both", device="cpu")
    other = tiny_model("segformer")
    other.config.id2label = {0: "a", 1: "b", 2: "c"}
    with pytest.raises(UserError, match=r"the model predicts \['a', 'b', 'c'\], the dataset has"):
        evaluate_sources(other, processor, test, info, device="cpu")
    with pytest.raises(UserError, match="unknown test-time augmentation 'flip'; nearest: flips"):
        evaluate_sources(model, processor, test, info, tta=["flip"], device="cpu")


# Test-time augmentation


class ColourModel(torch.nn.Module):
    """Class k where channel k is the brightest: each pixel by itself."""

    device, dtype, calls = torch.device("cpu"), torch.float32, 0

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(num_labels=3, num_channels=3, id2label=LABELS)

    def forward(self, pixel_values):
        self.calls += 1
        return SemanticSegmenterOutput(logits=2 * pixel_values)


@pytest.mark.parametrize(
    ("augmentations", "views"), [(["flips"], 4), (["quarter_turns"], 4), (["flips", "quarter_turns"], 8)]
)
def test_augmentation_changes_nothing_for_a_pixelwise_model(augmentations, views):
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    plain, processor = ColourModel(), SegformerImageProcessor()
    expected_classes, expected = predict_image(plain, processor, image, 32, return_probabilities=True)
    model = ColourModel()
    classes, probabilities = predict_image(
        AugmentedModel(model, augmentations), processor, image, 32, return_probabilities=True
    )
    np.testing.assert_array_equal(classes, expected_classes)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)
    assert model.calls == views * plain.calls


def test_scales_change_nothing_where_there_is_nothing_to_resample():
    pixels = torch.tensor([0.3, -0.2, 0.9])[None, :, None, None].expand(1, 3, 24, 40)
    model = AugmentedModel(ColourModel(), ["scales"], [0.5, 1, 1.3])
    torch.testing.assert_close(model(pixels).logits.softmax(1), (2 * pixels).softmax(1))
    assert "scales 0.5 1 1.3 (3 views)" in model.description


def test_the_mean_is_that_of_the_probabilities_of_all_views():
    model, pixels = tiny_model("segformer").eval(), torch.randn(2, 3, 64, 96)
    views = {
        (): lambda x: x,
        "left to right": lambda x: x.flip(-1),
        "top to bottom": lambda x: x.flip(-2),
        "both": lambda x: x.flip(-1, -2),
    }
    with torch.no_grad():
        expected = 0
        for view in views.values():  # each is its own inverse
            logits = torch.nn.functional.interpolate(model(view(pixels)).logits, size=(64, 96), mode="bilinear")
            expected = expected + view(logits.softmax(1)) / 4
        found = AugmentedModel(model, ["flips"])(pixel_values=pixels).logits.softmax(1)
    torch.testing.assert_close(found, expected)


def test_with_all_symmetries_a_turned_image_gets_the_turned_map():
    model, pixels = (
        AugmentedModel(tiny_model("segformer").eval(), ["flips", "quarter_turns"]),
        torch.randn(1, 3, 64, 64),
    )
    with torch.no_grad():
        upright = model(pixels).logits
        for turns in range(4):
            for flip in (False, True):
                turned = pixels.rot90(turns, (-2, -1))
                expected = upright.rot90(turns, (-2, -1))
                if flip:
                    turned, expected = turned.flip(-1), expected.flip(-1)
                torch.testing.assert_close(model(turned).logits, expected)


def test_a_class_that_is_impossible_in_all_views_stays_so():
    class Certain(ColourModel):
        def forward(self, pixel_values):
            return SemanticSegmenterOutput(
                logits=torch.tensor([500.0, 0, -500])[None, :, None, None].expand(1, 3, 4, 4)
            )

    probabilities = AugmentedModel(Certain(), ["flips"])(torch.zeros(1, 3, 8, 8)).logits.softmax(1)
    torch.testing.assert_close(probabilities[0, :, 0, 0], torch.tensor([1.0, 0, 0]))


# Protocols


def info_of(classes, **more):
    colors = tuple((0, 0, i) for i in range(len(classes)))
    empty = {"num_tiles": {}, "num_sources": {}, "pixel_shares": {}, "ignored_shares": {}}
    return SegmentationInfo("made", dict(enumerate(classes)), colors, 255, 64, 64, 1.0, **empty, **more)


ISPRS = [c.name for c in ISPRS_CLASSES]


def test_isprs_means_are_over_five_and_six_classes_of_one_matrix():
    # Counted by hand: all six classes in the matrix, the first five in the mean, all six in the overall accuracy.
    matrix = np.random.default_rng(0).integers(1, 100, (6, 6))
    iou = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    info = info_of(ISPRS, has_eroded=True)
    metrics = {name: SegmentationMetrics.from_matrix(matrix, info.id2label) for name in references_of(info)}
    scores = find_protocol("auto", info).scores(metrics)
    assert list(metrics) == ["full", "eroded"]
    for reference in metrics:
        assert scores[f"isprs/{reference}/5_classes/mean_iou"] == pytest.approx(iou[:5].mean())
        assert scores[f"isprs/{reference}/6_classes/mean_iou"] == pytest.approx(iou.mean())
        assert scores[f"isprs/{reference}/6_classes/iou_car"] == pytest.approx(iou[4])
        expected = np.trace(matrix) / matrix.sum()
        assert scores[f"isprs/{reference}/6_classes/overall_accuracy"] == pytest.approx(expected)
    assert {key.rsplit("/", 1)[0] for key in scores} == {
        f"isprs/{reference}/{group}" for reference in metrics for group in ("5_classes", "6_classes")
    }
    # What depends on all classes is said once, so that nobody takes it for a score of five.
    assert "isprs/full/5_classes/overall_accuracy" not in scores


def test_clutter_is_left_out_by_name_wherever_it_stands():
    first = ["clutter", *ISPRS[:5]]
    assert find_protocol("isprs", info_of(first)).groups["5_classes"] == tuple(ISPRS[:5])


def test_boundary_scores_say_their_distance_and_follow_the_group():
    info = info_of(ISPRS)
    generator = torch.Generator().manual_seed(0)
    prediction, reference = torch.randint(0, 6, (2, 40, 40), generator=generator)
    outlines = BoundaryIoU(info.id2label, 3)
    outlines.update(prediction, reference)
    metrics = SegmentationMetrics(info.id2label)
    metrics.update(prediction, reference)
    scores = find_protocol("isprs", info, "-tta").scores({"full": metrics}, {"full": outlines})
    of_classes = [scores[f"isprs-tta/full/6_classes/boundary_iou_{name}_3px"] for name in ISPRS]
    assert scores["isprs-tta/full/5_classes/mean_boundary_iou_3px"] == pytest.approx(np.mean(of_classes[:5]))
    assert scores["isprs-tta/full/6_classes/mean_boundary_iou_3px"] == pytest.approx(np.mean(of_classes))


def test_the_protocol_is_found_by_the_classes_and_refused_for_others():
    cityscapes = [c.name for c in CITYSCAPES.dataset.classes]
    assert find_protocol("auto", info_of(cityscapes)).groups == {"19_classes": tuple(cityscapes)}
    assert find_protocol("auto", info_of(cityscapes)).name == "cityscapes"
    assert find_protocol("auto", info_of(["a", "b"])).groups == {"2_classes": ("a", "b")}
    assert find_protocol("plain", info_of(ISPRS)).groups == {"6_classes": tuple(ISPRS)}
    with pytest.raises(UserError, match="unknown protocol 'isprss'; nearest: isprs"):
        find_protocol("isprss", info_of(ISPRS))
    with pytest.raises(UserError, match="protocol isprs is for the classes .* and made has a, b: take protocol plain"):
        find_protocol("isprs", info_of(["a", "b"]))


@pytest.mark.filterwarnings("ignore:.*Not all files are there")
def test_a_dataset_prepared_with_eroded_labels_alone_is_not_called_full(tmp_path):
    write_potsdam(tmp_path / "raw", ("2_10", "2_11", "2_13"), 64, imagery=("RGB",), height=False)
    sources, reader, facts, notes = find_isprs(POTSDAM, tmp_path / "raw", reference="eroded")
    info = prepare_dataset(sources, reader, facts, tmp_path / "tiles", tile_size=64, notes=notes)
    assert references_of(info) == {"eroded": "label"}
    with pytest.raises(UserError, match="has no full reference, only the eroded one"):
        references_of(info, "full")


def test_answers_that_are_no_numbers_are_not_scored(splits):
    # NaN counted as class 0: a model that overflowed got a score.
    model, processor = tiny_model("segformer").eval(), SegformerImageProcessor(do_resize=False)
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match="the model answers with NaN or infinity"):
        evaluate_model(model, processor, splits["test"], device="cpu")
    with pytest.raises(UserError, match="square3: the model answers with NaN or infinity"):
        evaluate_sources(model, processor, splits["test"], splits.info, device="cpu")
