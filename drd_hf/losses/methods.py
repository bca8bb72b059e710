"""Distillation methods by name, as `DistillationConfig.method` and `--method` give them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from drd_hf.errors import UserError, nearest
from drd_hf.features import layers_in_order
from drd_hf.losses import (
    AfDCDLoss,
    AlignedRelationLoss,
    ATLoss,
    CIRKDLoss,
    ClassRelationLoss,
    CWDLogitLoss,
    CWDLoss,
    DistillationLoss,
    DISTLoss,
    DSDLoss,
    DualRelationLoss,
    FitNetLoss,
    ICKDLoss,
    IFVDLoss,
    MGDLoss,
    PixelLogitLoss,
    SKDLoss,
    SPLoss,
)
from drd_hf.models import default_feature_layer, stage_pairs


@dataclass(frozen=True)
class Method:
    """How a method is built: `build(args, layer pairs, weight)`, args being a `DistillationConfig`; None distils nothing."""

    build: Callable[..., DistillationLoss | None]
    weight: float  # the default; of a method with several terms it multiplies their own weights
    layers: int = 1  # number of layer pairs that it reads by default
    stages: bool = False  # whether `build` also takes pairs of stages of the encoders


def _dual_relation(args, layers, weight: float) -> DualRelationLoss | None:
    weights = _relation_weights(args, weight, 3.0, 3.0)
    return weights and DualRelationLoss(
        layers,
        **weights,
        relation=args.relation,
        temperature=args.temperature,
        resize_relations_to=args.resize_relations_to or None,
    )


def _aligned_relation(args, layers, weight: float, stages=()) -> AlignedRelationLoss | None:
    weights = _relation_weights(args, weight, 2.0, 10.0)
    return weights and AlignedRelationLoss(
        layers, stages, **weights, resize_relations_to=args.resize_relations_to or None
    )


def _aligned_channels(args, layers, weight: float) -> AlignedRelationLoss:
    resized = args.resize_relations_to or None
    return AlignedRelationLoss(layers, spatial_weight=0, channel_weight=10 * weight, resize_relations_to=resized)


def _relation_weights(args, factor: float, spatial: float, channel: float) -> dict[str, float] | None:
    """Of the config, or else these; None where both are 0."""
    if args.spatial_relation_weight is not None:
        spatial = args.spatial_relation_weight
    if args.channel_relation_weight is not None:
        channel = args.channel_relation_weight
    weights = {"spatial_weight": factor * spatial, "channel_weight": factor * channel}
    return weights if any(weights.values()) else None


METHODS = {
    "drd": Method(_dual_relation, 1.0),
    "drd_aligned": Method(_aligned_relation, 1.0, stages=True),
    "drd_channels": Method(_aligned_channels, 1.0),
    "drd_classes": Method(lambda args, layers, weight: ClassRelationLoss(2 * weight, 6 * weight), 1.0, layers=0),
    "kd": Method(lambda args, layers, weight: PixelLogitLoss(weight, args.logit_temperature), 1.0, layers=0),
    "skd": Method(lambda args, layers, weight: SKDLoss(layers, weight), 10.0),
    "ifvd": Method(lambda args, layers, weight: IFVDLoss(layers, weight), 20.0),
    "cwd": Method(lambda args, layers, weight: CWDLoss(layers, weight), 50.0),
    "cwd_logits": Method(lambda args, layers, weight: CWDLogitLoss(weight), 3.0, layers=0),
    "at": Method(lambda args, layers, weight: ATLoss(layers, weight), 10000.0),
    "fitnet": Method(lambda args, layers, weight: FitNetLoss(layers, weight), 10.0),
    "dsd": Method(lambda args, layers, weight: DSDLoss(layers, 1000 * weight, 10 * weight), 1.0, layers=2),
    "cirkd": Method(
        lambda args, layers, weight: CIRKDLoss(
            layers, weight, max_positions=(args.resize_relations_to or 0) ** 2 or None
        ),
        1.0,
    ),
    "dist": Method(lambda args, layers, weight: DISTLoss(weight, weight), 1.0, layers=0),
    "mgd": Method(lambda args, layers, weight: MGDLoss(layers, weight), 2e-5),
    "afdcd": Method(lambda args, layers, weight: AfDCDLoss(layers, 2e-6 * weight, 5e-3 * weight), 1.0),
    "ickd": Method(lambda args, layers, weight: ICKDLoss(layers, weight), 2.5),
    "sp": Method(lambda args, layers, weight: SPLoss(layers, weight), 3000.0),
}

# What is distilled unless a method is named: where the teacher has scores of the student's classes, and where not.
DEFAULT_METHODS, DEFAULT_OF_FEATURES = ("drd_channels", "drd_classes"), ("drd_aligned",)
# The methods that read `spatial_relation_weight` and `channel_relation_weight`.
OF_RELATION_WEIGHTS = ("drd", "drd_aligned")


def parse_methods(texts: Iterable[str]) -> dict[str, float]:
    """{name: weight} of texts like ``skd`` or ``skd=10``.

    Raises:
        UserError: an unknown name (the nearest ones are listed), a name that is there twice, a weight that is no number
            above 0.
    """
    weights = {}
    for text in texts:
        name, equals, weight = (part.strip() for part in text.partition("="))
        if name == "none":
            raise UserError("method 'none' distils nothing: train a student alone with train_teacher.py")
        if name not in METHODS:
            raise UserError(f"method {name!r} is not known; nearest: {nearest(name, METHODS)}")
        if name in weights:
            raise UserError(f"method {name!r} is given twice, give it once")
        try:
            weights[name] = float(weight) if equals else METHODS[name].weight
        except ValueError:
            raise UserError(f"method {text!r}: {weight!r} is no number, give {name}=WEIGHT") from None
        if not 0 < weights[name] < float("inf"):
            raise UserError(f"method {text!r}: the weight must be a number above 0, leave the method out for 0")
    if "drd_aligned" in weights and "drd_channels" in weights:
        raise UserError("method drd_channels is a part of drd_aligned: leave one of them out")
    return weights


def methods_of(args, student: PreTrainedModel, teacher: PreTrainedModel) -> tuple[list[str], str | None]:
    """The methods of a `DistillationConfig`, and why they are not the default ones where none is named.

    Without a name they are `DEFAULT_METHODS`, or `DEFAULT_OF_FEATURES` where class scores cannot be compared or a weight of
    relations is given, which these methods alone read.
    """
    if args.method is not None:
        return list(args.method), None
    reason = unlike_scores(student, teacher)
    if reason is not None:
        reason = f"class scores cannot be compared, {reason}"
    elif (args.spatial_relation_weight, args.channel_relation_weight) != (None, None):
        reason = "a weight of relations is given"
    return list(DEFAULT_METHODS if reason is None else DEFAULT_OF_FEATURES), reason


def unlike_scores(student: PreTrainedModel, teacher: PreTrainedModel) -> str | None:
    """Why the class scores of the two cannot be compared; None where they can."""
    logits = getattr(layers_in_order(teacher)[1], "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 4:  # (B, classes, h, w)
        return "the teacher has none"
    ours, theirs = ({int(i): n for i, n in m.config.id2label.items()} for m in (student, teacher))
    if ours != theirs:
        return f"they need equal labels: the student has {list(ours.values())} and the teacher {list(theirs.values())}"
    return None


def losses_from_config(args, student: PreTrainedModel, teacher: PreTrainedModel) -> list[DistillationLoss]:
    """The losses that a `DistillationConfig` asks for: its methods, and `PixelLogitLoss` where it has a logit weight."""
    losses = []
    methods, _ = methods_of(args, student, teacher)
    for name, weight in parse_methods(methods).items():
        method = METHODS[name]
        if name == "sp" and args.per_device_train_batch_size < 2:
            raise UserError(
                "method sp compares the images of a batch: give a per_device_train_batch_size of 2 or more"
            )
        layers = _layers(args, method.layers, student, teacher)
        # Layers that the user names take the place of all others.
        stages = {"stages": stage_pairs(student, teacher)} if method.stages and not args.feature_layers else {}
        loss = method.build(args, layers, weight, **stages)
        losses += [] if loss is None else [loss]
    if args.logit_weight:
        losses.append(PixelLogitLoss(args.logit_weight, args.logit_temperature))
    return losses


def _layers(args, count: int, student, teacher) -> list[tuple]:
    """The layer pairs of the config, or by default the one before the classifier, after the encoder's end where two are read."""
    if not count:
        return []
    if args.feature_layers:
        return [_layer_pair(text) for text in args.feature_layers]
    pairs = [(default_feature_layer(student), default_feature_layer(teacher))]
    if count == 2 and None not in (ends := tuple(_end_of_encoder(model) for model in (student, teacher))):
        pairs.insert(0, ends)
    return pairs


def _end_of_encoder(model) -> str | None:
    """The last layer of a segmenter's encoder that gives a feature map; None where it has no encoder by a known name."""
    model = getattr(model, "_orig_mod", model)  # of torch.compile
    children = {name for name, _ in model.named_children()}
    encoder = next((name for name in (model.base_model_prefix, "backbone") if name in children), None)
    order, _ = layers_in_order(model)
    return next((run.name for run in reversed(order) if run.width and run.name.startswith(f"{encoder}.")), None)


def _layer_pair(text: str) -> tuple[str, str] | tuple[str, str, float]:
    layers, colon, weight = text.partition(":")
    student, _, teacher = layers.partition("=")
    pair = student.strip(), (teacher or student).strip()
    if not colon:
        return pair
    try:
        return *pair, float(weight)
    except ValueError:
        raise UserError(f"feature_layers {text!r}: {weight!r} is no number, give STUDENT=TEACHER:WEIGHT") from None
