"""Students as ONNX files, in floating point or int8, and the adapter that runs such a file like a model.

Needs the packages of the extra `onnx`: pip install drd-hf[onnx].
"""

import contextlib
import copy
import json
import logging
import os
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import SemanticSegmenterOutput

from drd_hf import __version__
from drd_hf.data.transforms import normalization_of, normalize
from drd_hf.errors import UserError
from drd_hf.evaluation import evaluate_model, milliseconds_per_tile
from drd_hf.evaluation.report import output_errors
from drd_hf.features import input_channels
from drd_hf.models import bands_of, colors_of, count_parameters, load_image_processor, load_teacher

# (multiple of pixels, height and width of the image that the trace sees). Tracing fixes what a model computes from the
# size in plain Python, such as the padding of MobileNetV2 and of Swin's windows; sizes that need no padding agree.
DYNAMIC_ATTEMPTS = ((1, (96, 160)), (32, (96, 160)), (224, (224, 448)))
LARGEST_FILE = 2**31 - 2**24  # bytes; protobuf ends at 2 GiB


@dataclass(frozen=True)
class OnnxExport:
    """What `export_onnx` wrote, and how far it is from PyTorch on the images that were compared.

    `size` is (height, width) in pixels, None where both are free; they are multiples of `size_multiple` then.
    `agreement` is the share of the logits' pixels with the same arg-max.
    """

    path: Path
    size: tuple[int, int] | None
    size_multiple: int
    max_difference: float
    agreement: float
    compared_sizes: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class OnnxImageProcessor:
    """The normalisation that an ONNX file was exported with, under the names of an image processor."""

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    rescale_factor: float
    do_flip_channel_order: bool
    do_rescale: bool = True
    do_normalize: bool = True
    do_resize: bool = False


class OnnxSegmenter:
    """A segmentation model in an ONNX file of `export_onnx`, for `predict_image` and `evaluate_model`.

    Called with `pixel_values` float (B, C, H, W), it gives an object with `logits` float32 (B, K, h, w), tensors on the
    device of the input. An image smaller than the file's fixed size, or of no multiple of its `size_multiple`, is
    continued with its border pixels and the logits are cut; they are (B, K, H, W) then.

    Args:
        path: the .onnx file.
        providers: of onnxruntime, as in `onnxruntime.InferenceSession`. None: the CPU, with as many threads as PyTorch.

    Raises:
        UserError: no such file, not an ONNX file, or not one that `export_onnx` wrote; provider not available.
    """

    dtype = torch.float32

    def __init__(self, path: str | Path, providers: Sequence[str] | None = None):
        ort = _onnxruntime()
        self.path = Path(path)
        if not self.path.is_file():
            raise UserError(f"{path}: no such ONNX file")
        providers = list(providers or ["CPUExecutionProvider"])
        unknown = [name for name in providers if name not in ort.get_available_providers()]
        if unknown:
            known = ", ".join(ort.get_available_providers())
            raise UserError(f"provider {unknown[0]}: this onnxruntime has only {known}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 4  # errors are raised, and said once
        try:
            self.session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # onnxruntime has an exception class for each kind of damage, all below Exception
            raise UserError(f"{path}: onnxruntime cannot load it ({_first_line(error)})") from error
        try:
            facts = {k: json.loads(v) for k, v in self.session.get_modelmeta().custom_metadata_map.items()}
            id2label = {int(i): name for i, name in facts["id2label"].items()}
            self.processor = OnnxImageProcessor(
                tuple(facts["image_mean"]),
                tuple(facts["image_std"]),
                facts["rescale_factor"],
                facts["do_flip_channel_order"],
            )
            self.size, self.size_multiple = facts["size"] and tuple(facts["size"]), facts["size_multiple"]
            self.config = SimpleNamespace(
                model_type="onnx",
                name_or_path=facts["model"],
                num_labels=len(id2label),
                id2label=id2label,
                label2id={name: i for i, name in id2label.items()},
                num_channels=facts["num_channels"],
                bands=facts["bands"],
                class_colors=facts.get("class_colors"),  # files of earlier versions have none
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: lacks the metadata of scripts/export_onnx.py: export the model with it"
            ) from error
        self.device = torch.device("cpu")

    def __call__(self, pixel_values: torch.Tensor) -> SemanticSegmenterOutput:
        height, width = pixel_values.shape[-2:]
        padded = self.size or tuple(
            -(-length // self.size_multiple) * self.size_multiple for length in (height, width)
        )
        if height > padded[0] or width > padded[1]:
            raise UserError(
                f"{self.config.name_or_path}: exported for images of {_by(padded)} pixels, not of {_by((height, width))}: "
                f"use tiles of at most {min(padded)}, or export it with --dynamic"
            )
        images = pixel_values.detach().float()
        if padded != (height, width):
            images = F.pad(images, (0, padded[1] - width, 0, padded[0] - height), mode="replicate")
        logits = self.session.run(["logits"], {"pixel_values": images.cpu().numpy()})[0]
        logits = torch.from_numpy(logits).to(pixel_values.device)
        if padded != (height, width):
            logits = F.interpolate(logits, size=padded, mode="bilinear", align_corners=False)[..., :height, :width]
        return SemanticSegmenterOutput(logits=logits)

    def to(self, device) -> "OnnxSegmenter":
        """Where tensors come from and go to; what computes is the choice of `providers`."""
        self.device = torch.device(device)
        return self

    def eval(self) -> "OnnxSegmenter":
        return self


def export_onnx(
    model: PreTrainedModel,
    processor,
    output: str | Path,
    size: int | None = 512,
    images: Sequence[torch.Tensor] = (),
    opset: int = 17,
    tolerance: float = 1e-3,
    name: str = "",
) -> OnnxExport:
    """Write a segmentation model as one ONNX file, after comparing it with PyTorch.

    The file takes `pixel_values` float32 (B, C, H, W), normalised, with any B, and gives the model's own `logits` float32
    (B, K, h, w). Its metadata hold, each as JSON: id2label, image_mean, image_std, rescale_factor,
    do_flip_channel_order, num_channels, bands, size, size_multiple, model, drd_hf_version.

    Args:
        model: a semantic segmentation model; it is left as it is.
        processor: its image processor, of which the normalisation is written down.
        output: the .onnx file, replaced if it exists.
        size: side of the images in pixels. None: any height and width, or multiples of `size_multiple` of them where
            a model rounds sizes (32 for MobileNetV2 and MobileViT, 224 for Swin's windows of 7).
        images: uint8 (C, H, W) to compare on, cut or mirrored to the sizes that are compared. Empty: noise.
        opset: ONNX operator set.
        tolerance: largest allowed absolute difference of a logit.
        name: what the model is called in the metadata.

    Raises:
        UserError: the model does not export, the file differs from PyTorch by more than the tolerance (it is not
            written), or the folder of `output` does not exist.
    """
    output = Path(output)
    _onnxruntime()
    if not output.resolve().parent.is_dir():
        raise UserError(f"--output {output}: its folder does not exist")
    if size is not None and size < 1:
        raise UserError(f"--size {size}: give a positive number of pixels")
    if 4 * count_parameters(model) > LARGEST_FILE:
        raise UserError(f"{name or 'the model'}: more than 2 GB, which one ONNX file cannot hold")
    channels = input_channels(model)
    if not len(images):
        images = [torch.randint(256, (channels, 512, 512), generator=torch.Generator().manual_seed(0)).to(torch.uint8)]
    if images[0].shape[0] != channels:
        raise UserError(f"the images to compare on have {images[0].shape[0]} bands, the model reads {channels}")
    normalization = normalization_of(processor)
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    _make_pooling_exportable(model)
    attempts = ((1, (size, size)),) if size else DYNAMIC_ATTEMPTS
    first_error = None
    with _temporary(output) as temporary:
        for multiple, traced in attempts:
            sizes = (traced,) if size else _sizes_to_compare(multiple, images[0].shape[-2:])
            try:
                _trace(model, torch.zeros(2, channels, *traced), temporary, dynamic=not size, opset=opset)
                facts = {
                    "id2label": {int(i): label for i, label in model.config.id2label.items()},
                    "rescale_factor": normalization[0],
                    "image_mean": _per_channel(normalization[1], channels),
                    "image_std": _per_channel(normalization[2], channels),
                    "do_flip_channel_order": normalization[3],
                    "num_channels": channels,
                    "bands": list(bands_of(model.config) or ()),
                    "class_colors": colors_of(model.config),
                    "size": size and [size, size],
                    "size_multiple": multiple,
                    "model": name or model.config.model_type,
                    "drd_hf_version": __version__,
                }
                _write_metadata(temporary, facts)
                difference, agreement = _compare(model, OnnxSegmenter(temporary), images, sizes, normalization)
            except (UserError, OSError):
                raise
            except Exception as error:  # of the exporter, of onnxruntime, or of the model at an odd size: any class
                first_error = first_error or error
                continue
            if difference <= tolerance or multiple == attempts[-1][0]:
                break
        else:
            what = f"with --size {size}" if size else "with a free size (give --size)"
            raise UserError(f"{name or 'the model'}: cannot be exported {what}: {_first_line(first_error)}")
        if not difference <= tolerance:
            raise UserError(
                f"{output}: not written, its logits differ from PyTorch's by up to {difference:.2g}, more than the tolerance "
                f"{tolerance:g} (arg-max agreement {agreement:.4%}): give --tolerance or another --opset"
            )
    return OnnxExport(output, size and (size, size), multiple, difference, agreement, sizes)


def quantize_onnx(source: str | Path, output: str | Path, images: Iterable[torch.Tensor]) -> None:
    """Write an int8 form of an exported file: weights per channel, activations by calibration, in QDQ format.

    Convolutions and matrix products, and the additions and activations between them, compute in int8; the metadata
    stay. A file with a fixed size is calibrated at that size. Transformers gain little: their norms and softmax stay in
    floating point, and the change from one to the other costs time.

    Args:
        source: a file of `export_onnx`.
        output: the .onnx file, replaced if it exists.
        images: uint8 (C, H, W) to calibrate on, of the training data; the ranges of all activations come from them.

    Raises:
        UserError: `source` is no exported file, no images, or the quantisation fails.
    """
    segmenter = OnnxSegmenter(source)
    images = list(images)
    if not images:
        raise UserError("calibration needs images of the training data, and got none")
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Images(CalibrationDataReader):
        def __init__(self):
            self.remaining = iter(images)

        def get_next(self):
            image = next(self.remaining, None)
            if image is None:
                return None
            size = segmenter.size or _rounded(image.shape[-2:], segmenter.size_multiple)
            pixels = normalize(_cut(image, size)[None], *normalization_of(segmenter.processor))
            return {"pixel_values": pixels.numpy()}

    metadata = segmenter.session.get_modelmeta().custom_metadata_map
    with tempfile.TemporaryDirectory() as folder, _temporary(Path(output)) as temporary:
        prepared = str(Path(folder) / "prepared.onnx")
        try:
            with _quietly():
                quant_pre_process(str(source), prepared)
                quantize_static(
                    prepared,
                    str(temporary),
                    Images(),
                    quant_format=QuantFormat.QDQ,
                    per_channel=True,
                    activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )
        except Exception as error:  # of onnx, onnxruntime or protobuf
            raise UserError(f"{source}: cannot be quantised ({_first_line(error)})") from error
        _write_metadata(temporary, {key: json.loads(value) for key, value in metadata.items()})


def measure_int8(
    exact: str | Path, quantized: str | Path, dataset, tile_size: int, channels: Sequence[int] | None = None
) -> dict:
    """What quantisation costs and gains on the CPU, each as {"float": ..., "int8": ...}.

    Args:
        exact, quantized: files of `export_onnx` and `quantize_onnx`.
        dataset: one split from `load_splits`, with labels.
        tile_size: side in pixels of the tile that is timed.
        channels: channels of the tiles that the model reads, in its order. None: all.

    Returns:
        `mean_iou` of `evaluate_model`, `mean_iou_lost` (one number), `milliseconds` for a tile, `megabytes` of the files,
        `threads` (one number).
    """
    files = {"float": Path(exact), "int8": Path(quantized)}
    models = {name: OnnxSegmenter(path) for name, path in files.items()}
    mean_iou = {
        name: evaluate_model(model, model.processor, dataset, 1, "cpu", channels).compute()["mean_iou"]
        for name, model in models.items()
    }
    milliseconds = milliseconds_per_tile(models.values(), tile_size, "cpu")
    return {
        "mean_iou": mean_iou,
        "mean_iou_lost": mean_iou["float"] - mean_iou["int8"],
        "milliseconds": dict(zip(models, milliseconds, strict=True)),
        "megabytes": {name: path.stat().st_size / 1e6 for name, path in files.items()},
        "threads": torch.get_num_threads(),
    }


def load_segmenter(name_or_path: str | Path, **kwargs) -> tuple:
    """A model and its image processor, from a checkpoint (folder or Hub id) or from an ONNX file (name ends in .onnx).

    Args:
        kwargs: of a checkpoint, passed to `from_pretrained`; of an ONNX file, `providers`.
    """
    if str(name_or_path).endswith(".onnx"):
        segmenter = OnnxSegmenter(name_or_path, **kwargs)
        return segmenter, segmenter.processor
    return load_teacher(name_or_path, **kwargs), load_image_processor(name_or_path, **kwargs)


class _Logits(nn.Module):
    """A model as a function of one tensor that gives one tensor."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


def _trace(model: PreTrainedModel, example: torch.Tensor, path: Path, dynamic: bool, opset: int) -> None:
    # The tracing exporter: it writes every family here in a second and for any size, from torch 2.6 on. That of
    # torch.export takes 10 times as long, and loses free sizes in half of the families.
    names = {0: "batch"}
    sizes = ({2: "height", 3: "width"}, {2: "logits_height", 3: "logits_width"}) if dynamic else ({}, {})
    with _quietly(), torch.no_grad():
        torch.onnx.export(
            _Logits(model).eval(),  # the exporter gives all modules back in the mode of this one
            (example,),
            str(path),
            input_names=["pixel_values"],
            output_names=["logits"],
            dynamic_axes={"pixel_values": names | sizes[0], "logits": names | sizes[1]},
            opset_version=opset,
            dynamo=False,
        )


def _make_pooling_exportable(model: nn.Module) -> None:
    """Adaptive average pooling as two matrix products: ONNX has it only where the size is a multiple of the grid."""
    for module in model.modules():
        if isinstance(module, nn.AdaptiveAvgPool2d):
            size = module.output_size if isinstance(module.output_size, tuple) else (module.output_size,) * 2
            module.forward = lambda x, size=size: adaptive_average(x, size)


def adaptive_average(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """`F.adaptive_avg_pool2d`: (B, C, H, W) -> (B, C, *size), cell i being the mean of [floor(iH/n), ceil((i+1)H/n))."""

    def weights(cells: int | None, length) -> torch.Tensor:  # (cells, length), rows add up to 1
        cell, pixel = torch.arange(cells, device=x.device)[:, None], torch.arange(length, device=x.device)[None]
        inside = (pixel >= cell * length // cells) & (pixel < ((cell + 1) * length + cells - 1) // cells)
        return inside.to(x.dtype) / inside.sum(dim=1, keepdim=True)

    height, width = x.shape[-2:]
    rows, columns = (height if size[0] is None else size[0]), (width if size[1] is None else size[1])
    return weights(rows, height) @ x @ weights(columns, width).transpose(0, 1)


def _sizes_to_compare(multiple: int, real: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """That of the real image and another one, each a multiple; both odd where the multiple is 1."""
    if multiple == 1:
        return (real[0] - 1 + real[0] % 2, real[1] - 1 + real[1] % 2), (131, 187)
    return _rounded(real, multiple), (2 * multiple, 3 * multiple)


def _rounded(size: Sequence[int], multiple: int) -> tuple[int, int]:
    return tuple(max(length // multiple, 1) * multiple for length in size)


def _cut(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """The middle of an image (C, H, W) at `size`, mirrored beyond its borders where it is smaller."""
    missing = [max(wanted - length, 0) for wanted, length in zip(size, image.shape[-2:], strict=True)]
    if any(missing):
        image = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, missing[0]), (0, missing[1])), mode="symmetric"))
    top, left = ((length - wanted) // 2 for wanted, length in zip(size, image.shape[-2:], strict=True))
    return image[:, top : top + size[0], left : left + size[1]]


def _compare(model, segmenter: OnnxSegmenter, images, sizes, normalization) -> tuple[float, float]:
    """Largest difference of a logit, and the share of pixels with the same arg-max, over images and sizes."""
    largest, same, pixels = 0.0, 0, 0
    for size in sizes:
        for image in images:
            pixel_values = normalize(_cut(image, size)[None], *normalization)
            with torch.inference_mode():
                expected = model(pixel_values=pixel_values).logits
            logits = segmenter(pixel_values=pixel_values).logits
            difference = float((logits - expected).abs().max())
            largest = difference if difference != difference else max(largest, difference)  # NaN stays
            same += int((logits.argmax(1) == expected.argmax(1)).sum())
            pixels += expected[:, 0].numel()
    return largest, same / pixels


def _per_channel(values: Sequence[float], channels: int) -> list[float]:
    return [float(x) for x in (values if len(values) == channels else [*values] * channels)]


def _write_metadata(path: Path, facts: dict) -> None:
    import onnx

    content = onnx.load(str(path))
    onnx.checker.check_model(content)
    onnx.helper.set_model_props(content, {key: json.dumps(value) for key, value in facts.items()})
    onnx.save(content, str(path))


@contextlib.contextmanager
def _temporary(output: Path) -> Iterator[Path]:
    """A name in the folder of `output` that takes its place when the block ends well, and vanishes when not."""
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with output_errors(output):
            yield temporary
            os.replace(temporary, output)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without warnings, and without the thousands of lines that a failing export prints from C++."""
    muted = logging.root.manager.disable
    logging.disable(logging.WARNING)
    sys.stdout.flush()
    stdout = os.dup(1)
    with open(os.devnull, "w") as nowhere, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(nowhere.fileno(), 1)
        try:
            yield
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
            logging.disable(muted)


def _onnxruntime():
    try:
        import onnx  # noqa: F401
        import onnxruntime
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install drd-hf[onnx]") from error
    return onnxruntime


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))


def _first_line(error: Exception | None) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
