"""Teachers and students by Hub id, folder or architecture file; default feature layers of each model family."""

import copy
import inspect
import json
import logging
import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING,
    MODEL_MAPPING,
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForSemanticSegmentation,
    AutoModelForUniversalSegmentation,
    PreTrainedModel,
    SegformerImageProcessor,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

from drd_hf.data.facts import IGNORE_INDEX
from drd_hf.data.splits import SegmentationInfo
from drd_hf.errors import UserError
from drd_hf.features import input_channels, layers_in_order

logger = logging.getLogger(__name__)

# Semantic segmenters: the last batch norm before the classifier of each family. Everything the model knows about a pixel
# has come together there, and features are centred: after the ReLU that follows all cosines are positive, and a relation
# map tells less. TIPSv2 has no norm, its classifier's input stands here. Universal segmenters: the map that is
# multiplied with the queries to give masks. Several names where versions of transformers differ; the first that the
# model has is taken. A family without an entry, and an encoder, is run once to find its layer.
DEFAULT_FEATURE_LAYERS = {
    "beit": ("decode_head.fpn_bottleneck.normalization", "decode_head.fpn_bottleneck.bn"),
    "data2vec-vision": ("decode_head.fpn_bottleneck.normalization", "decode_head.fpn_bottleneck.bn"),
    "dpt": ("head.head.1",),
    "mobilenet_v2": ("segmentation_head.conv_projection.normalization",),
    "mobilevit": ("segmentation_head.aspp.project.normalization",),
    "mobilevitv2": ("segmentation_head.aspp.project.normalization",),
    "segformer": ("decode_head.batch_norm",),
    "tipsv2_dpt": ("decoder.project",),
    "upernet": ("decode_head.fpn_bottleneck.batch_norm",),
    "eomt": ("upscale_block",),
    "eomt_dinov3": ("upscale_block",),
    "mask2former": ("model.pixel_level_module.decoder.mask_projection",),
    "maskformer": ("model.pixel_level_module.decoder.mask_projection",),
    "oneformer": ("model.pixel_level_module.decoder.mask_projection",),
}

RGB = ("red", "green", "blue")

# Buffers that a model computes for itself, and that a checkpoint may lack.
NOT_TRAINED = ("num_batches_tracked", "relative_position_index", "relative_coords_table")


def default_feature_layer(model: PreTrainedModel) -> str:
    """Name of the layer whose relations are distilled if the user names none.

    `DEFAULT_FEATURE_LAYERS` has it for the known families. Another segmenter is run on a blank image: the last
    normalisation right before its classifier is taken, or else what its classifier reads. Of an encoder (a model
    without class scores) the last layer that gives a feature map is taken: the last layer norm over its tokens, or its
    last convolutional stage.

    Raises:
        UserError: no such layer; name a layer of `model.named_modules()`.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    family = model.config.model_type
    modules = dict(model.named_modules())
    for layer in DEFAULT_FEATURE_LAYERS.get(family, ()):
        if layer in modules:
            return layer
    order, outputs = layers_in_order(model)
    layer = (
        _before_classifier(order, model.config.num_labels)
        if getattr(outputs, "logits", None) is not None
        else next((run.name for run in reversed(order) if run.width and not _is_aside(run)), None)
    )
    if layer is None:
        raise UserError(
            f"no default feature layer for model type {family!r}: name one with feature_layers=STUDENT_LAYER=TEACHER_LAYER"
        )
    return layer


def encoder_stages(model: PreTrainedModel) -> dict[int, str]:
    """{stride: layer} of the last stage or block of a segmenter's or encoder's body at each resolution, finest first.

    Stride is in pixels of the image. Stages and blocks are the numbered members of a list; where no such layer gives a map of
    that size, the layer with the shortest name does. A resolution without any (attention in windows) is missing.
    """
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    modules = dict(model.named_modules())
    # The first is that of universal segmenters, the last two those of encoders by themselves and of EoMT.
    bodies = ("model.pixel_level_module.encoder", model.base_model_prefix, "backbone", "encoder", "layers")
    body = next((name for name in bodies if name and name in modules), "")
    stages: dict[int, tuple[tuple, str]] = {}
    for run in layers_in_order(model)[0]:
        if not run.width or not run.name.startswith(f"{body}." if body else "") or _is_aside(run):
            continue
        if re.search(r"attention|attn|position_bias|rel_pos", run.name):  # tables, and parts of a block
            continue
        if model.config.model_type == "hiera" and "stages." in run.name:
            continue  # tokens in an order of their own until the end of the encoder
        rank = (not run.name.rpartition(".")[2].isdigit(), run.name.count("."))
        if run.stride not in stages or rank <= stages[run.stride][0]:
            stages[run.stride] = rank, run.name
    return {stride: name for stride, (_, name) in sorted(stages.items())}


def stage_pairs(student: PreTrainedModel, teacher: PreTrainedModel, least: int = 8) -> list[tuple[str, str]]:
    """Pairs of encoder stages: the coarsest of both models, and below these those of equal stride from `least` pixels on."""
    of_student, of_teacher = (encoder_stages(model) for model in (student, teacher))
    if not of_student or not of_teacher:
        return []
    ends = max(of_student), max(of_teacher)
    equal = [(s, s) for s in of_student if s in of_teacher and least <= s < min(ends)]
    return [(of_student[s], of_teacher[t]) for s, t in dict.fromkeys([*equal, ends])]


def _before_classifier(order: list, num_labels: int) -> str | None:
    """The last norm before the classifier of a segmenter, with no more than activation and dropout between them."""
    order = [run for run in order if "auxiliary" not in run.name]
    is_classifier = [getattr(run.module, "out_channels", None) == num_labels for run in order]
    if True not in is_classifier:
        return None
    before = order[: len(order) - 1 - is_classifier[::-1].index(True)]
    reads = next((run.name for run in reversed(before) if run.width and not _is_aside(run)), None)
    for run in reversed(before):
        if "Norm" in type(run.module).__name__ and run.width:
            return run.name
        is_container = next(run.module.children(), None) is not None
        if not (is_container or _is_aside(run) or next(run.module.parameters(), None) is None):
            break
    return reads


def _is_aside(run) -> bool:
    """Dropout gives another map in training, and a pooling layer gives none of the whole image."""
    kind = type(run.module).__name__
    return "Drop" in kind or "Pooling" in kind or "AvgPool" in kind or "MaxPool" in kind or "pooler" in run.name


def load_teacher(name_or_path: str, **kwargs) -> PreTrainedModel:
    """A trained model to learn from, in eval mode and frozen.

    A checkpoint of a semantic segmenter gives class scores and features. A universal segmenter (Mask2Former, MaskFormer,
    OneFormer, EoMT) and an encoder without a segmentation head (DINOv2, DINOv3, ViT, Swin, ConvNeXt, ... and the image
    tower of CLIP or SigLIP) teach by their features alone; classifiers of images are such encoders. Where a model can
    interpolate its position embeddings, it takes images of any size.

    Args:
        name_or_path: Hub id or folder of a `transformers` checkpoint.
        kwargs: passed to `from_pretrained` (revision, token, ...).

    Raises:
        UserError: missing, unreadable or untrained weights, or not a model of images.
    """
    if str(name_or_path).endswith(".json"):
        raise UserError(f"{name_or_path}: a teacher needs trained weights, give the folder or Hub id of a checkpoint")
    config = _read_config(name_or_path, **kwargs)
    auto_class, part = _class_and_config(config, name_or_path)
    if part is not config:
        kwargs["config"] = part
    teacher = _from_pretrained(name_or_path, auto_class, **kwargs)
    _let_images_be_enough(teacher)
    if type(teacher).__name__.startswith(("Data2VecVisionForSemantic", "Eomt")):
        _refuse_other_sizes(teacher)
    return teacher.eval().requires_grad_(False)


def load_student(
    name_or_path: str,
    id2label: dict[int, str] | None = None,
    pretrained_weights: str | None = None,
    num_channels: int | None = None,
    bands: Sequence[str] | None = None,
    **kwargs,
) -> PreTrainedModel:
    """A segmentation model to train, with a head for the given labels and a first layer for the given bands.

    Weights that were trained on other bands are kept: the kernels of the first convolution are chosen by the names of
    the bands if the checkpoint has them in its configuration, else in order (near infrared, red, green take those of
    red, green, blue). A band without a kernel gets the mean of all kernels. From I to C bands the kernels are
    multiplied by I / C, so that the sum over the bands keeps its size.

    Args:
        name_or_path: Hub id or folder of a checkpoint (it gets a new classifier where the number of classes differs), or an
            architecture as a `config.json`-like file, which starts from random values.
        id2label: {0: name, ...} of the task; None keeps the checkpoint's own.
        pretrained_weights: only with an architecture file. A folder or Hub id of a checkpoint whose weights fit the
            architecture, or a `.safetensors` file with weights of its backbone.
        num_channels: number of bands of the images. None: as many as `bands`, or as the checkpoint or architecture says.
        bands: names of the bands in their order, which go into the configuration as `bands`.
        kwargs: passed to `from_pretrained` (revision, token, ...).

    Raises:
        UserError: the file or folder is missing or unreadable, none of the pretrained weights fit, the model cannot
            compute its loss, or its family cannot read so many bands.
    """
    labels = {}
    if id2label is not None:
        id2label = {int(i): str(name) for i, name in id2label.items()}
        if sorted(id2label) != list(range(len(id2label))):
            raise UserError(f"id2label must number the classes 0..{len(id2label) - 1}, got {sorted(id2label)}")
        labels = {"id2label": id2label, "label2id": {name: i for i, name in id2label.items()}}
    if bands is not None and num_channels not in (None, len(bands)):
        raise UserError(f"num_channels={num_channels} with {len(bands)} names of bands: give one name a channel")
    num_channels = num_channels if bands is None else len(bands)
    if num_channels is not None and num_channels < 1:
        raise UserError(f"num_channels={num_channels}: give at least 1")
    if not str(name_or_path).endswith(".json"):
        if pretrained_weights is not None:
            raise UserError("pretrained_weights goes with an architecture file (.json), not with a checkpoint")
        model = _from_pretrained(name_or_path, AutoModelForSemanticSegmentation, new_head=True, **labels, **kwargs)
    else:
        config = _read_architecture(name_or_path, labels)
        if pretrained_weights is None:
            if num_channels is not None:
                _set_channels(config, num_channels, name_or_path)
            model = AutoModelForSemanticSegmentation.from_config(config)
        elif str(pretrained_weights).endswith(".safetensors"):
            model = AutoModelForSemanticSegmentation.from_config(config)
            _load_backbone(model, pretrained_weights)
        else:
            num_channels = _channels(config) if num_channels is None else num_channels
            trained = _read_config(pretrained_weights, "a segmentation model", **kwargs)
            if _channels(trained) != _channels(config):
                _set_channels(config, _channels(trained), name_or_path)
            if names := bands_of(trained):
                config.bands = names
            model = _from_pretrained(
                pretrained_weights, AutoModelForSemanticSegmentation, new_head=True, config=config, **kwargs
            )
    if num_channels is not None:
        model = _with_bands(model, num_channels, bands, name_or_path)
    if model.config.model_type == "dpt" and not model.config.use_auxiliary_head:
        raise UserError(
            f"{name_or_path}: a DPT computes its loss only with use_auxiliary_head: true in its configuration"
        )
    for name in ("semantic_loss_ignore_index", "loss_ignore_index"):
        if hasattr(model.config, name):
            setattr(model.config, name, IGNORE_INDEX)
    _slow_down_batch_norm(model)
    if model.config.model_type in ("beit", "data2vec-vision"):
        _refuse_other_sizes(model)
    return model


def load_image_processor(
    name_or_path: str,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    pretrained_weights: str | None = None,
    bands: Sequence[str] | None = None,
    info: SegmentationInfo | None = None,
    **kwargs,
):
    """The image processor of a model, set to leave the size of images and the labels as they are.

    Tiles are seen at their native resolution in training and afterwards, and labels are final (0..K-1 and 255), so
    `do_resize`, `do_center_crop` and `do_reduce_labels` are off. An architecture file takes the processor of the
    checkpoint that it starts from; without one, it gets a `SegformerImageProcessor` with ImageNet statistics.

    Its mean and deviation fit the bands that it was made for: those in the configuration of its checkpoint, else red,
    green and blue. For other `bands` they become what was measured on the dataset; a processor that does not normalise
    stays so.

    Args:
        name_or_path: Hub id, folder, or architecture file.
        image_mean, image_std: one value a band each, for images scaled to 0..1; they go before all others.
        pretrained_weights: as in `load_student`.
        bands: names of the bands that the model is to read, in order. None: those that the processor was made for.
        info: of the dataset that has these bands.
        kwargs: passed to `from_pretrained` (revision, token, ...).

    Raises:
        UserError: no processor there, statistics of another number of bands, that are no finite numbers or a deviation
            of 0, or none known for the bands.
    """
    if str(name_or_path).endswith(".json") and pretrained_weights is not None:
        name_or_path = pretrained_weights
    own_bands = RGB
    if str(name_or_path).endswith((".json", ".safetensors")):
        processor = SegformerImageProcessor(image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(name_or_path, **kwargs)
        except (OSError, ValueError) as error:
            raise UserError(f"{name_or_path}: no usable preprocessor_config.json ({_first_line(error)})") from error
        if bands is not None:
            own_bands = bands_of(_read_config(name_or_path, "a segmentation model", **kwargs)) or RGB
    for switch in ("do_resize", "do_center_crop", "do_reduce_labels"):
        if hasattr(processor, switch):
            setattr(processor, switch, False)
    if bands is not None and len(bands) != 3 and getattr(processor, "do_flip_channel_order", False):
        raise UserError(
            f"{name_or_path}: its image processor reverses the order of three bands, the dataset gives {len(bands)}: "
            "choose three with --student_channels, or start from an architecture file"
        )
    if bands is not None and tuple(bands) != tuple(own_bands) and getattr(processor, "do_normalize", False):
        if image_mean is None:
            image_mean = _measured("band_mean", bands, info)
        if image_std is None:
            image_std = [value or 1.0 for value in _measured("band_std", bands, info)]  # 0 of a band of one value
    wanted = len(bands) if bands is not None else len(getattr(processor, "image_mean", None) or RGB)
    for name, values in (("image_mean", image_mean), ("image_std", image_std)):
        if values is not None:
            if len(values) != wanted:
                raise UserError(f"{name} {list(values)}: give {wanted} values, one for each band")
            if not all(math.isfinite(x) and (x > 0 or name == "image_mean") for x in values):
                kind = "numbers above 0" if name == "image_std" else "finite numbers"
                raise UserError(f"{name} {list(values)}: give {kind}, for images in 0..1")
            setattr(processor, name, [float(x) for x in values])
            processor.do_normalize = True
    return processor


def _measured(statistic: str, bands: Sequence[str], info: SegmentationInfo | None) -> list[float]:
    values = getattr(info, statistic, ())
    if not values:
        raise UserError(
            f"no {statistic} of the bands {', '.join(bands)} is known: give image_mean and image_std with "
            f"{len(bands)} values each, or prepare the dataset again"
        )
    return [values[info.bands.index(name)] for name in bands]


def bands_of(config) -> list[str] | None:
    """Names of the bands that a model reads, from its configuration; None where it does not name as many as it reads."""
    bands = getattr(config, "bands", None)
    named = isinstance(bands, (list, tuple)) and len(bands) == _channels(config)
    return [str(name) for name in bands] if named else None


def colors_of(config) -> list[tuple[int, int, int]] | None:
    """RGB colours, 0-255, of the classes in label order, from `class_colors` in a model's configuration.

    That key is where the colours of a published model travel. None where there is not one colour for each class.
    """
    colors = getattr(config, "class_colors", None)
    named = isinstance(colors, (list, tuple)) and len(colors) == config.num_labels
    if not named or not all(isinstance(c, (list, tuple)) and len(c) == 3 for c in colors):
        return None
    if not all(isinstance(value, int) and 0 <= value <= 255 for color in colors for value in color):
        return None
    return [tuple(color) for color in colors]


def select_bands(bands: Sequence[str], channels: Sequence[int] | None, option: str = "student_channels") -> list[str]:
    """Names of the chosen channels of a dataset; None are all.

    Raises:
        UserError: the dataset has no such channel.
    """
    if channels is None:
        return list(bands)
    if not channels or not all(0 <= channel < len(bands) for channel in channels):
        raise UserError(f"--{option} {list(channels)}: the dataset has the channels {_numbered(bands)}")
    return [bands[channel] for channel in channels]


def find_channels(
    model: PreTrainedModel,
    bands: Sequence[str],
    what: str,
    option: str | None = None,
    chosen: Sequence[int] | None = None,
    default: Sequence[int] | None = None,
) -> list[int] | None:
    """Which channels of a dataset a model reads: indices into `bands` in the model's order, None for those of `default`.

    They are found by name where the model's configuration has `bands`. A model without it reads the default if the
    number fits, else red, green and blue if it reads three, as models pretrained on photographs do.

    Args:
        model: any model of images.
        bands: names of the dataset's bands, in order.
        what, option: how messages call the model, and the option that chooses its channels, if there is one.
        chosen: channels that the user chose; only their number is checked.
        default: channels to read if nothing else is known. None: all.

    Raises:
        UserError: the dataset does not have what the model reads.
    """
    number, names = input_channels(model), bands_of(model.config)
    default = list(range(len(bands)) if default is None else default)
    remedy = f"choose channels with --{option}, or another model" if option else "give another model"
    remedy += f"; the dataset has {_numbered(bands)}"
    if chosen is not None:
        select_bands(bands, chosen, option or "channels")
        if len(chosen) != number:
            raise UserError(f"{what} reads {number} bands, --{option} names {len(chosen)}")
        channels = list(chosen)
    elif names is not None:
        missing = [name for name in names if name not in bands]
        if missing:
            raise UserError(f"{what} reads the bands {', '.join(names)}, and there is no {missing[0]}: {remedy}")
        channels = [list(bands).index(name) for name in names]
    else:
        channels = default
        if number == 3 != len(channels) and set(RGB) <= set(bands):
            channels = [list(bands).index(name) for name in RGB]
        if len(channels) != number:
            raise UserError(f"{what} reads {number} bands, of which it does not give the names: {remedy}")
    return None if channels == default else channels


def _numbered(bands: Sequence[str]) -> str:
    return ", ".join(f"{i} ({name})" for i, name in enumerate(bands))


def count_parameters(model: nn.Module) -> int:
    """Number of parameters, trainable or not."""
    return sum(p.numel() for p in model.parameters())


def _check_folder(name_or_path: str) -> None:
    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(f"{path}: not a model folder, it has no config.json")
    if not path.is_dir() and (path.is_absolute() or str(name_or_path).startswith(".") or path.is_file()):
        raise UserError(f"{path}: no such model folder")


def _read_config(name_or_path: str, kind: str = "a teacher", **kwargs):
    _check_folder(name_or_path)
    known = ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code")
    try:
        return AutoConfig.from_pretrained(name_or_path, **{k: v for k, v in kwargs.items() if k in known})
    except (OSError, ValueError, KeyError, HFValidationError) as error:
        raise UserError(f"{name_or_path}: cannot be loaded as {kind} ({_first_line(error)})") from error


def _class_and_config(config, name_or_path: str) -> tuple:
    """The Auto class of a teacher: of what its checkpoint was trained as, if that segments, else of the bare encoder."""
    trained_as = (getattr(config, "architectures", None) or [None])[0]
    semantic = MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES
    if trained_as in semantic.values() or (trained_as is None and config.model_type in semantic):
        return AutoModelForSemanticSegmentation, config
    if config.model_type in DEFAULT_FEATURE_LAYERS and type(config) in MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING:
        return AutoModelForUniversalSegmentation, config
    encoder = getattr(config, "vision_config", None) or config  # the image tower of a model of images and texts
    if encoder.model_type == "vit_mae":
        raise UserError(f"{name_or_path}: ViTMAE hides random patches of each image: save its weights as a ViTModel")
    for auto_class, mapping in ((AutoModel, MODEL_MAPPING), (AutoBackbone, MODEL_FOR_BACKBONE_MAPPING)):
        if getattr(mapping.get(type(encoder), None), "main_input_name", None) == "pixel_values":
            return auto_class, encoder
    raise UserError(
        f"{name_or_path}: a teacher segments or encodes images, which model type {config.model_type!r} does not"
    )


def _let_images_be_enough(teacher: PreTrainedModel) -> None:
    """Fill in, at each call, what the teacher wants beside `pixel_values`."""
    accepted = inspect.signature(teacher.forward).parameters
    size = _image_size(teacher)

    def fill(module, args, kwargs):
        images = kwargs.get("pixel_values")
        if images is None:
            return None
        if "interpolate_pos_encoding" in accepted and tuple(images.shape[-2:]) != size:
            kwargs = {"interpolate_pos_encoding": True} | kwargs
        if "task_inputs" in accepted:  # of OneFormer; they steer the queries, which come after the pixel decoder
            kwargs = {"task_inputs": images.new_zeros(len(images), teacher.config.task_seq_len)} | kwargs
        return args, kwargs

    if "interpolate_pos_encoding" in accepted or "task_inputs" in accepted:
        teacher.register_forward_pre_hook(fill, with_kwargs=True)


def _refuse_other_sizes(model: PreTrainedModel) -> None:
    """Say in one line what `transformers` says deep in the model, or not at all."""
    size = _image_size(model)

    def check(module, args, kwargs):
        images = kwargs.get("pixel_values")
        if images is not None and tuple(images.shape[-2:]) != size:
            given, wanted = ("x".join(map(str, shape)) for shape in (images.shape[-2:], size))
            raise UserError(
                f"{type(module).__name__} takes images of {wanted} pixels only, not of {given}: use crops and tiles of "
                "that size, or give an architecture file another image_size"
            )

    model.register_forward_pre_hook(check, with_kwargs=True)


def _image_size(model: PreTrainedModel) -> tuple:
    size = getattr(model.config, "image_size", None)
    return tuple(size) if isinstance(size, (list, tuple)) else (size, size)


def _from_pretrained(name_or_path: str, auto_class, new_head: bool = False, **kwargs) -> PreTrainedModel:
    _check_folder(name_or_path)
    kwargs.setdefault(
        "dtype", torch.float32
    )  # else a checkpoint in half precision stays so; mixed precision is the trainer's
    try:
        model, report = auto_class.from_pretrained(
            name_or_path, use_safetensors=True, ignore_mismatched_sizes=new_head, output_loading_info=True, **kwargs
        )
    except (OSError, ValueError, RuntimeError, SafetensorError, HFValidationError) as error:
        kind = "a segmentation model" if auto_class is AutoModelForSemanticSegmentation else "a teacher"
        raise UserError(f"{name_or_path}: cannot be loaded as {kind} ({_first_line(error)})") from error
    not_a_segmenter = auto_class in (AutoModel, AutoBackbone)
    # from_pretrained fills what the checkpoint lacks with random values and only prints a report.
    lacking = {
        key[0] if isinstance(key, tuple) else key for key in (*report["missing_keys"], *report["mismatched_keys"])
    }
    lacking = {key for key in lacking if not key.endswith(NOT_TRAINED)}
    if not_a_segmenter:  # its pooler is left out of many checkpoints, and follows after all feature maps
        lacking = {key for key in lacking if "pooler." not in key}
    if lacking and not new_head:
        raise UserError(
            f"{name_or_path}: {len(lacking)} tensors have no trained values, the first is {min(lacking)}: "
            f"give a checkpoint that was trained{'' if not_a_segmenter else ' for segmentation'}"
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


def _channel_holders(config) -> list:
    """The parts of a configuration that say how many bands the images have."""
    parts = (config, getattr(config, "backbone_config", None), getattr(config, "vision_config", None))
    return [part for part in parts if getattr(part, "num_channels", None) is not None]


def _channels(config) -> int:
    return next((part.num_channels for part in _channel_holders(config)), 3)


def _set_channels(config, num_channels: int, what: str) -> None:
    holders = _channel_holders(config)
    if not holders and num_channels != 3:
        raise UserError(
            f"{what}: model type {config.model_type!r} has no num_channels, so it reads three bands, not {num_channels}: "
            "choose three with --student_channels, or another model"
        )
    for part in holders:
        part.num_channels = num_channels


def _with_bands(model: PreTrainedModel, num_channels: int, bands: Sequence[str] | None, what: str) -> PreTrainedModel:
    """The model for images of these bands, see `load_student`; itself if it reads them already."""
    before, names = input_channels(model), bands_of(model.config)
    if names and bands is not None:
        kernels = [names.index(name) if name in names else None for name in bands]
    else:
        kernels = [i if i < before else None for i in range(num_channels)]
    if kernels != list(range(before)):
        state = model.state_dict()
        first = next((n for n, p in model.named_parameters() if p.ndim == 4 and p.shape[1] == before), None)
        if first is None:
            raise UserError(
                f"{what}: {type(model).__name__} has no convolution of {before} bands that could be changed"
            )
        weight = state[first]  # (out, I, h, w)
        taken = [weight.mean(dim=1) if kernel is None else weight[:, kernel] for kernel in kernels]
        state[first] = torch.stack(taken, dim=1) * (before / num_channels)
        config = copy.deepcopy(model.config)
        _set_channels(config, num_channels, what)
        changed = type(model)(config).to(model.dtype)
        try:
            changed.load_state_dict(state)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"{what}: {type(model).__name__} cannot be changed from {before} to {num_channels} bands ({reason})"
            ) from error
        logger.info("%s: kernels of %s changed from %d to %d bands", what, first, before, num_channels)
        model = changed
    if bands is not None:
        model.config.bands = list(bands)
    elif num_channels != before and hasattr(model.config, "bands"):
        del model.config.bands  # the names of others
    return model


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
