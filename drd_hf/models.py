"""Teachers and students by Hub id, folder or architecture file; default feature layers of each model family."""

import json
import logging
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    PreTrainedModel,
    SegformerImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.errors import UserError

logger = logging.getLogger(__name__)

# The last batch norm before the classifier of each family: everything the model knows about a pixel has come together
# there, and features are centred. After the ReLU that follows all cosines are positive, and a relation map tells less.
# Several names where versions of transformers differ; the first that the model has is taken.
DEFAULT_FEATURE_LAYERS = {
    "segformer": ("decode_head.batch_norm",),
    "upernet": ("decode_head.fpn_bottleneck.batch_norm",),
    "mobilenet_v2": ("segmentation_head.conv_projection.normalization",),
}


def default_feature_layer(model: PreTrainedModel) -> str:
    """Name of the layer whose relations are distilled if the user names none.

    Raises:
        UserError: the family has no default; name a layer of `model.named_modules()`.
    """
    family = model.config.model_type
    modules = dict(model.named_modules())
    for layer in DEFAULT_FEATURE_LAYERS.get(family, ()):
        if layer in modules:
            return layer
    raise UserError(
        f"no default feature layer for model type {family!r}: name one with feature_layers=STUDENT_LAYER=TEACHER_LAYER"
    )


def load_teacher(name_or_path: str, **kwargs) -> PreTrainedModel:
    """A trained segmentation model, in eval mode and frozen.

    Args:
        name_or_path: Hub id or folder of a `transformers` semantic segmentation checkpoint.
        kwargs: passed to `from_pretrained` (revision, token, ...).
    """
    if str(name_or_path).endswith(".json"):
        raise UserError(f"{name_or_path}: a teacher needs trained weights, give the folder or Hub id of a checkpoint")
    teacher = _from_pretrained(name_or_path, **kwargs)
    return teacher.eval().requires_grad_(False)


def load_student(
    name_or_path: str,
    id2label: dict[int, str] | None = None,
    pretrained_weights: str | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A segmentation model to train, with a head for the given labels.

    Args:
        name_or_path: Hub id or folder of a checkpoint (it gets a new classifier where the number of classes differs), or an
            architecture as a `config.json`-like file, which starts from random values.
        id2label: {0: name, ...} of the task; None keeps the checkpoint's own.
        pretrained_weights: only with an architecture file. A folder or Hub id of a checkpoint whose weights fit the
            architecture, or a `.safetensors` file with weights of its backbone.
        kwargs: passed to `from_pretrained` (revision, token, ...).

    Raises:
        UserError: the file or folder is missing or unreadable, or none of the pretrained weights fit.
    """
    labels = {}
    if id2label is not None:
        id2label = {int(i): str(name) for i, name in id2label.items()}
        if sorted(id2label) != list(range(len(id2label))):
            raise UserError(f"id2label must number the classes 0..{len(id2label) - 1}, got {sorted(id2label)}")
        labels = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    if not str(name_or_path).endswith(".json"):
        if pretrained_weights is not None:
            raise UserError("pretrained_weights goes with an architecture file (.json), not with a checkpoint")
        model = _from_pretrained(name_or_path, new_head=True, **labels, **kwargs)
    else:
        config = _read_architecture(name_or_path, labels)
        if pretrained_weights is None or str(pretrained_weights).endswith(".safetensors"):
            model = AutoModelForSemanticSegmentation.from_config(config)
            if pretrained_weights is not None:
                _load_backbone(model, pretrained_weights)
        else:
            model = _from_pretrained(pretrained_weights, new_head=True, config=config, **kwargs)
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
        if hasattr(model.config, name):
            setattr(model.config, name, IGNORE_INDEX)
    _slow_down_batch_norm(model)
    return model


def load_image_processor(
    name_or_path: str,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    pretrained_weights: str | None = None,
    **kwargs,
):
    """The image processor of a model, set to leave the size of images and the labels as they are.

    Tiles are seen at their native resolution in training and afterwards, and labels are final (0..K-1 and 255), so
    `do_resize`, `do_center_crop` and `do_reduce_labels` are off. An architecture file takes the processor of the
    checkpoint that it starts from; without one, it gets a `SegformerImageProcessor` with ImageNet statistics.

    Args:
        name_or_path: Hub id, folder, or architecture file.
        image_mean, image_std: three values each, for images scaled to 0..1; override the processor's own.
        pretrained_weights: as in `load_student`.
    """
    if str(name_or_path).endswith(".json") and pretrained_weights is not None:
        name_or_path = pretrained_weights
    if str(name_or_path).endswith((".json", ".safetensors")):
        processor = SegformerImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
        except (OSError, ValueError) as error:
            raise UserError(f"{name_or_path}: no usable preprocessor_config.json ({_first_line(error)})") from error
    for switch in ("do_resize", "do_center_crop", "do_reduce_labels"):
        if hasattr(processor, switch):
            setattr(processor, switch, False)
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if values is not None:
            if len(values) != 3:
                raise UserError(f"{name} {values}: give three values, one for each channel")
            setattr(processor, name, [float(x) for x in values])
            processor.do_normalize = True
    return processor


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in model.parameters())


def _from_pretrained(name_or_path: str, new_head: bool = False, **kwargs) -> PreTrainedModel:
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path}: not a model folder, it has no config.json")
    if not path.is_dir() and (path.is_absolute() or str(name_or_path).startswith(".") or path.is_file()):
        raise UserError(f"{path}: no such model folder")
    kwargs.setdefault(
        "dtype", torch.float32
    )  # else a checkpoint in half precision stays so; mixed precision is the trainer's
    try:
        model, report = AutoModelForSemanticSegmentation.from_pretrained(
            name_or_path, use_safetensors=True, ignore_mismatched_sizes=new_head, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, HFValidationError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded as a segmentation model ({_first_line(error)})") from error
    # from_pretrained fills what the checkpoint lacks with random values and only prints a report.
    lacking = {
        key[0] if isinstance(key, tuple) else key for key in (*report["missing_keys"], *report["mismatched_keys"])
    }
    lacking = {key for key in lacking if not key.endswith("num_batches_tracked")}
    if lacking and not new_head:
        raise UserError(
            f"{name_or_path}: {len(lacking)} tensors have no trained values, the first is {min(lacking)}: "
            "give a checkpoint that was trained for segmentation"
        )
    body = tuple(f"{name}." for name in (model.base_model_prefix, "backbone") if name)
    tensors = [name for name in model.state_dict() if name.startswith(body)]
    lacking = [name for name in tensors if name in lacking]
    if 4 * len(lacking) > len(tensors):  # a head may be new, a body may not
        raise UserError(
            f"{name_or_path}: {len(lacking)} of the {len(tensors)} tensors of the body of {type(model).__name__} do not "
            "fit, choose a checkpoint of the same architecture"
        )
    return model


def _slow_down_batch_norm(model: nn.Module) -> None:
    """Batch-norm momentum above 0.5 becomes PyTorch's 0.1.

    MobileNetV2 of transformers passes TensorFlow's decay 0.997 as PyTorch's momentum, which means the opposite: the
    statistics used after training would be those of the very last batch. Momentum is no part of a checkpoint.
    """
    changed = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and (m.momentum or 0) > 0.5]
    for module in changed:
        module.momentum = 0.1
    if changed:
        logger.info("momentum of %d batch norms set to 0.1, it followed only the last batch", len(changed))


def _read_architecture(path: str, labels: dict):
    try:
        values = json.loads(Path(path).read_text())
        config = AutoConfig.for_model(**values)
    except FileNotFoundError:
        raise UserError(f"{path}: no such architecture file") from None
    except (json.JSONDecodeError, TypeError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not an architecture (config.json with model_type): {_first_line(error)}") from error
    for name, value in labels.items():
        setattr(config, name, value)
    return config


def _load_backbone(model: PreTrainedModel, path: str) -> None:
    """Backbone weights from a safetensors file into `model.backbone`, also where it wraps a timm model."""
    backbone = getattr(model, "backbone", None) or model.base_model
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        weights = load_file(path)
    except Exception as error:  # safetensors raises its own error type per kind of damage
        raise UserError(f"{path}: not a readable safetensors file ({_first_line(error)})") from error
    wanted = backbone.state_dict()
    prefix = "_backbone." if any(k.startswith("_backbone.") for k in wanted) else ""
    fitting = {
        prefix + k: v for k, v in weights.items() if prefix + k in wanted and wanted[prefix + k].shape == v.shape
    }
    if len(fitting) < len(wanted):
        missing = sorted(set(wanted) - set(fitting))
        raise UserError(
            f"{path}: fits {len(fitting)} of the backbone's {len(wanted)} tensors, the first that it lacks: {missing[0]}"
        )
    backbone.load_state_dict(fitting)
    logger.info("%s: %d backbone tensors taken, %d left over", path, len(fitting), len(weights) - len(fitting))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
