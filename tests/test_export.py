"""ONNX files of small students: the same answers as PyTorch, at any size, in the same evaluation."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, Features, Image, Value
from PIL import Image as PILImage
from transformers import MobileNetV2ImageProcessor, SegformerImageProcessor

from drd_hf.data.transforms import normalization_of, normalize
from drd_hf.errors import UserError
from drd_hf.evaluation import evaluate_model, milliseconds_per_tile
from drd_hf.inference import model_fingerprint, predict_image

from .conftest import LABELS, tiny_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from drd_hf.export import OnnxSegmenter, adaptive_average, export_onnx, load_segmenter, quantize_onnx  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PROCESSOR = SegformerImageProcessor(do_resize=False)
FAMILIES = ("segformer", "mobilenet_v2", "upernet on resnet", "upernet on convnext", "upernet on timm")


def student(family="segformer"):
    """Tiny, with an answer that depends on the image: at its initial values, half of a graph could be missing."""
    model = tiny_model(family).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.1)
        else:
            torch.nn.init.kaiming_normal_(parameter)
    return model


def photo(height, width, seed=0, bands=3):
    """Smooth colours with noise, uint8 (bands, height, width)."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, bands, 6, 6, generator=generator) * 200
    smooth = F.interpolate(coarse, size=(height, width), mode="bilinear")[0]
    return (smooth + 40 * torch.rand(bands, height, width, generator=generator)).to(torch.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, dynamic file) of a SegFormer."""
    model, path = student(), tmp_path_factory.mktemp("onnx") / "student.onnx"
    export_onnx(model, PROCESSOR, path, size=None, images=[photo(100, 90)], name="someone/student")
    return model, path


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_free_size_gives_the_logits_of_pytorch_at_sizes_and_batches_not_traced(family, tmp_path):
    model = student(family)
    export = export_onnx(model, PROCESSOR, tmp_path / "student.onnx", size=None, images=[photo(100, 90)])
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
    for batch, rows, columns in ((1, 3, 2), (3, 2, 5)):
        height, width = (32 * rows, 32 * columns) if export.size_multiple > 1 else (37 * rows, 29 * columns)
        pixels = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = model(pixel_values=pixels).logits
        (logits,) = session.run(["logits"], {"pixel_values": pixels.numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-3)


def test_a_file_of_fixed_size_takes_any_batch_and_only_its_size(tmp_path):
    model = student("upernet on resnet")
    export = export_onnx(model, PROCESSOR, tmp_path / "student.onnx", size=96, images=[photo(80, 120)])
    assert export.size == (96, 96) and export.agreement == 1 and export.max_difference < 1e-3
    session = onnxruntime.InferenceSession(str(tmp_path / "student.onnx"), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 96, 96]
    pixels = torch.randn(5, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits.numpy()
    np.testing.assert_allclose(session.run(None, {"pixel_values": pixels.numpy()})[0], expected, atol=1e-3)


@pytest.mark.parametrize("size", [(1, 1), (3, 6), (2, 2), (None, 3)])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 16), (13, 40)])
def test_pooling_by_matrices_is_adaptive_pooling(size, shape):
    # ONNX has adaptive pooling only for sizes that are multiples of the grid, and UperNet pools 16 x 16 to 3 x 3.
    x = torch.randn(2, 3, *shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(adaptive_average(x, size), F.adaptive_avg_pool2d(x, size))


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(training, tmp_path):
    # The tracing exporter puts every module back into the mode of the outermost one, and that was training.
    model = student("upernet on resnet").train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, PROCESSOR, tmp_path / "student.onnx", size=64, images=[photo(64, 64)])
    assert all(module.training is training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_model_that_rounds_sizes_says_to_which_multiple(tmp_path):
    # MobileNetV2 computes TensorFlow's padding from the size in plain Python, and a trace keeps that of its own size.
    model = student("mobilenet_v2")
    export = export_onnx(model, PROCESSOR, tmp_path / "student.onnx", size=None, images=[photo(100, 90)])
    assert export.size_multiple == 32
    logits = OnnxSegmenter(tmp_path / "student.onnx")(pixel_values=torch.zeros(1, 3, 50, 70)).logits
    assert logits.shape == (1, 3, 50, 70)  # continued to 64 x 96 and cut


def test_predict_image_gives_the_map_of_pytorch(exported):
    model, path = exported
    image = photo(150, 203, seed=5).permute(1, 2, 0).numpy()
    segmenter = OnnxSegmenter(path)
    options = {"tile": 64, "overlap": 0.25, "return_probabilities": True}
    classes, probabilities = predict_image(segmenter, segmenter.processor, image, **options)
    expected_classes, expected = predict_image(model, PROCESSOR, image, **options)
    np.testing.assert_allclose(probabilities, expected, atol=1e-4)
    assert (classes == expected_classes).mean() > 0.999


def test_evaluation_counts_the_same_pixels_as_with_pytorch(exported):
    model, path = exported
    features = Features(
        {
            "image": Image(),
            "label": Image(),
            "source": Value("string"),
            "row": Value("int32"),
            "column": Value("int32"),
        }
    )
    tiles = {name: [] for name in features}
    for i in range(4):
        label = np.random.default_rng(i).integers(0, 3, (64, 64)).astype(np.uint8)
        image = PILImage.fromarray(photo(64, 64, seed=i).permute(1, 2, 0).numpy())
        values = (image, PILImage.fromarray(label), f"tile{i}", 0, 0)
        for column, value in zip(tiles.values(), values, strict=True):
            column.append(value)
    dataset = Dataset.from_dict(tiles, features=features)
    segmenter = OnnxSegmenter(path)
    matrix = evaluate_model(segmenter, segmenter.processor, dataset, batch_size=3, device="cpu").matrix
    expected = evaluate_model(model, PROCESSOR, dataset, batch_size=3, device="cpu").matrix
    assert int(matrix.sum()) == 4 * 64 * 64
    assert int((matrix - expected).abs().sum()) <= 8  # of 16384 pixels: ties between two classes


def test_speed_is_measured_as_of_any_model(exported):
    assert all(t > 0 for t in milliseconds_per_tile([exported[0], OnnxSegmenter(exported[1])], 64, "cpu", rounds=1))


def test_the_file_alone_says_what_goes_in_and_what_comes_out(tmp_path):
    model, processor = student("mobilenet_v2"), MobileNetV2ImageProcessor()  # mean and deviation 0.5
    model.config.bands = ["near_infrared", "red", "green"]
    model.config.class_colors = [[90, 80, 70], [200, 0, 0], [0, 120, 0]]
    export_onnx(model, processor, tmp_path / "student.onnx", size=64, name="someone/student")
    facts = {entry.key: json.loads(entry.value) for entry in onnx.load(str(tmp_path / "student.onnx")).metadata_props}
    version = facts.pop("drd_hf_version")
    assert version.count(".") == 2
    assert facts == {
        "id2label": {"0": "ground", "1": "building", "2": "tree"},
        "class_colors": [[90, 80, 70], [200, 0, 0], [0, 120, 0]],
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "rescale_factor": pytest.approx(1 / 255),
        "do_flip_channel_order": False,
        "num_channels": 3,
        "bands": ["near_infrared", "red", "green"],
        "size": [64, 64],
        "size_multiple": 1,
        "model": "someone/student",
    }
    segmenter, settings = load_segmenter(tmp_path / "student.onnx")
    assert segmenter.config.id2label == LABELS and segmenter.config.bands == facts["bands"]
    assert settings.image_mean == (0.5, 0.5, 0.5) and settings.do_rescale and settings.do_normalize


def test_a_small_image_is_continued_to_the_fixed_size_and_a_large_one_refused(tmp_path):
    model = student()
    export_onnx(model, PROCESSOR, tmp_path / "student.onnx", size=64, images=[photo(64, 64)])
    segmenter = OnnxSegmenter(tmp_path / "student.onnx")
    pixels = torch.randn(2, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    continued = torch.cat([pixels, pixels[:, :, -1:].expand(2, 3, 24, 64)], dim=2)
    with torch.no_grad():
        logits = model(pixel_values=continued).logits
    expected = F.interpolate(logits, size=(64, 64), mode="bilinear")[:, :, :40]
    torch.testing.assert_close(segmenter(pixel_values=pixels).logits, expected, atol=1e-3, rtol=0)
    with pytest.raises(UserError, match="exported for images of 64x64 pixels, not of 65x64: use tiles of at most 64"):
        segmenter(pixel_values=torch.zeros(1, 3, 65, 64))


def test_a_file_that_differs_from_pytorch_is_not_published(tmp_path):
    path = tmp_path / "student.onnx"
    path.write_bytes(b"an earlier file")
    with pytest.raises(UserError, match="not written, its logits differ"):
        export_onnx(student(), PROCESSOR, path, size=64, tolerance=-1.0)  # which no difference can meet
    assert path.read_bytes() == b"an earlier file"
    assert [file.name for file in tmp_path.iterdir()] == ["student.onnx"]


def test_a_family_that_does_not_export_is_one_line_and_no_file(tmp_path, capfd):
    # The exporter printed its graph, thousands of lines, from C++.
    with pytest.raises(UserError, match="cannot be exported with --size 64") as error:
        export_onnx(student("mobilevitv2"), PROCESSOR, tmp_path / "student.onnx", size=64)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
    assert "graph(" not in capfd.readouterr().out


def test_five_bands_are_normalised_each_by_its_own_numbers(tmp_path):
    model = student()
    model.segformer.config.num_channels = model.config.num_channels = 5
    first = next(module for module in model.modules() if isinstance(module, torch.nn.Conv2d))
    first.weight = torch.nn.Parameter(torch.randn(first.out_channels, 5, *first.kernel_size))
    processor = SegformerImageProcessor(image_mean=[0.1, 0.2, 0.3, 0.4, 0.5], image_std=[0.2] * 5)
    export_onnx(model, processor, tmp_path / "student.onnx", size=64, images=[photo(64, 64, bands=5)])
    segmenter = OnnxSegmenter(tmp_path / "student.onnx")
    assert segmenter.config.num_channels == 5
    image = photo(64, 64, seed=3, bands=5)
    pixels = (image / 255 - torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])[:, None, None]) / 0.2
    with torch.no_grad():
        expected = F.interpolate(model(pixel_values=pixels[None]).logits, size=(64, 64), mode="bilinear").softmax(1)[0]
    array = image.permute(1, 2, 0).numpy()
    probabilities = predict_image(segmenter, segmenter.processor, array, return_probabilities=True)[1]
    np.testing.assert_allclose(probabilities, expected.numpy(), atol=1e-4)
    with pytest.raises(UserError, match="have 3 bands, the model reads 5"):
        export_onnx(model, processor, tmp_path / "student.onnx", size=64, images=[photo(64, 64)])


@pytest.mark.parametrize("family, size", [("segformer", None), ("upernet on resnet", None), ("mobilenet_v2", 64)])
def test_int8_computes_in_integers_and_says_nearly_the_same(family, size, tmp_path):
    model, source, output = student(family), tmp_path / "student.onnx", tmp_path / "student_int8.onnx"
    export_onnx(model, PROCESSOR, source, size=size, images=[photo(64, 64)])
    quantize_onnx(source, output, [photo(64, 64, seed=i) for i in range(4)])
    weights = onnx.load(str(output)).graph.initializer
    assert any(w.data_type == onnx.TensorProto.INT8 and len(w.dims) == 4 for w in weights)
    exact, rounded = OnnxSegmenter(source), OnnxSegmenter(output)
    assert vars(rounded.config) == vars(exact.config) and rounded.processor == exact.processor
    pixels = normalize(photo(64, 64, seed=9)[None], *normalization_of(PROCESSOR))
    a, b = exact(pixel_values=pixels).logits, rounded(pixel_values=pixels).logits
    assert 0 < (a - b).abs().mean() < 0.25 * a.std()
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["student.onnx", "student_int8.onnx"]


def test_files_that_are_no_exported_student_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such ONNX file"):
        OnnxSegmenter(tmp_path / "absent.onnx")
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no model")
    with pytest.raises(UserError, match="damaged.onnx: onnxruntime cannot load it"):
        OnnxSegmenter(damaged)
    foreign = tmp_path / "foreign.onnx"
    shape = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        "foreign",
        [shape],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(foreign))
    with pytest.raises(UserError, match="lacks the metadata"):
        OnnxSegmenter(foreign)


def test_a_provider_that_is_not_there_is_refused(exported):
    with pytest.raises(UserError, match="provider NoExecutionProvider: this onnxruntime has only"):
        OnnxSegmenter(exported[1], providers=["NoExecutionProvider"])


def run_script(*words):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / words[0]), *map(str, words[1:])], capture_output=True, text=True
    )


def test_the_script_compares_on_a_real_image_and_writes_what_it_measured(tmp_path):
    model = student()
    model.save_pretrained(tmp_path / "student")
    PROCESSOR.save_pretrained(tmp_path / "student")
    PILImage.fromarray(photo(90, 120).permute(1, 2, 0).numpy()).save(tmp_path / "photo.png")
    options = ["--model", tmp_path / "student", "--image", tmp_path / "photo.png", "--output"]
    done = run_script("export_onnx.py", *options, tmp_path / "student.onnx", "--dynamic")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "largest difference of a logit" in done.stdout and "arg-max agreement 100.0000%" in done.stdout
    facts = json.loads((tmp_path / "student.json").read_text())
    assert facts["max_difference"] < 1e-3 and facts["compared_on"].endswith("photo.png")
    assert OnnxSegmenter(tmp_path / "student.onnx").config.name_or_path == "student"


@pytest.mark.slow
def test_the_script_measures_what_int8_costs(tmp_path):
    scenes = "--scenes_train 2 --scenes_validation 1 --scenes_test 1 --scene_size 128 --tile_size 64".split()
    done = run_script("prepare_dataset.py", "--dataset", "scenes", "--output", tmp_path / "tiles", *scenes)
    assert done.returncode == 0, done.stderr[-2000:]
    from drd_hf.data import load_splits

    model = student()
    model.config.id2label = load_splits(tmp_path / "tiles").info.id2label
    model.decode_head.classifier = torch.nn.Conv2d(16, len(model.config.id2label), 1)
    model.save_pretrained(tmp_path / "student")
    PROCESSOR.save_pretrained(tmp_path / "student")
    options = ["--model", tmp_path / "student", "--dataset", tmp_path / "tiles", "--calibration_tiles", 4, "--int8"]
    done = run_script("export_onnx.py", *options, "--output", tmp_path / "student.onnx")
    assert done.returncode == 0, done.stderr[-2000:]
    measured = json.loads((tmp_path / "student.json").read_text())["int8"]
    scores = {}
    for name in ("student", "student.onnx", "student_int8.onnx"):
        segmenter, processor = load_segmenter(tmp_path / name)
        tiles = load_splits(tmp_path / "tiles")["validation"]
        scores[name] = evaluate_model(segmenter, processor, tiles, device="cpu").compute()["mean_iou"]
    assert measured["mean_iou"]["float"] == pytest.approx(scores["student"], abs=1e-3)
    assert measured["mean_iou"]["int8"] == pytest.approx(scores["student_int8.onnx"], abs=1e-6)
    assert measured["mean_iou_lost"] == pytest.approx(scores["student.onnx"] - scores["student_int8.onnx"], abs=1e-6)
    assert ("times as fast" in done.stdout) is (measured["milliseconds"]["int8"] < measured["milliseconds"]["float"])


def test_an_output_that_cannot_be_written_is_one_line(exported, tmp_path):
    # A full or read-only disk ended in a traceback; here the temporary name is too long for the file system.
    output = tmp_path / f"{'x' * 245}.onnx"
    with pytest.raises(UserError, match="cannot be written") as refused:
        export_onnx(exported[0], PROCESSOR, output, size=32)
    assert "\n" not in str(refused.value) and list(tmp_path.iterdir()) == []


def test_a_file_knows_its_path_and_its_fingerprint_is_that_of_its_content(exported, tmp_path):
    # The fingerprint read a private attribute of onnxruntime.
    path, copy = exported[1], tmp_path / "copy.onnx"
    copy.write_bytes(path.read_bytes())
    first, second = OnnxSegmenter(path), OnnxSegmenter(str(copy))
    assert first.path == path and second.path == copy
    same = model_fingerprint(first, first.processor)
    assert same == model_fingerprint(second, second.processor)
    copy.write_bytes(path.read_bytes() + b"\0")
    assert same != model_fingerprint(second, second.processor)
