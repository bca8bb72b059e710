"""What a card is made of, and how it is kept with a run."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from drd_hf.errors import UserError

RUN_NAME, CARD_KEY, CARD_HASH_KEY = "run.json", "card", "card_sha256"
# What is known of a training before its model is scored: stands for `RUN_NAME` until that is there.
TRAINED_NAME, ORIGINS_KEY = "trained.json", "origins"
# Pictures of a card by their places in the folder of the model.
CONFUSION_NAME, CURVES_NAME, COMPARISON_NAME = "figures/confusion.png", "figures/curves.png", "figures/examples.png"
# Settings of a distillation that show that it is Dual Relation Distillation.
FEATURE_RELATIONS = (
    *("spatial_relation weight", "channel_relation weight"),
    *("spatial_alignment weight", "channel_alignment weight"),
)
CLASS_RELATIONS = ("spatial_class_alignment weight", "channel_class_alignment weight")
DUAL_RELATION = (*FEATURE_RELATIONS, *CLASS_RELATIONS)
REMEDY = "give the output folder of a finished train_teacher.py or distill.py"


@dataclass(frozen=True)
class MeasuredResult:
    """Scores of one evaluation under the keys of `SegmentationMetrics.compute`.

    A mean over some of the classes has the number of these before its key: `5_classes/mean_iou`. `protocol` says how the
    pixels were counted, for example "tiles of 256, each pixel once". The teacher and the student trained alone, where
    known, were measured on the same data with the same protocol. A score that is not defined is NaN or None.
    """

    dataset: str
    split: str
    protocol: str
    metrics: Mapping[str, float | None]
    teacher_metrics: Mapping[str, float | None] | None = None
    student_alone_metrics: Mapping[str, float | None] | None = None


@dataclass(frozen=True)
class Profile:
    """What one forward pass costs on one tile of `tile_size` x `tile_size` pixels.

    Milliseconds are measured on `device`, in words; floating-point operations are counted, with 2 for a multiplication
    and an addition (see `drd_hf.profiling`).
    """

    tile_size: int
    device: str
    milliseconds: float
    flops: int | None = None
    teacher_milliseconds: float | None = None
    teacher_flops: int | None = None


@dataclass(frozen=True)
class Example:
    """An image to try the model on: its place in the folder of the model, and a title."""

    path: str
    title: str


@dataclass(frozen=True, kw_only=True)
class ModelCardFacts:
    """What is known about a trained model. Everything with a default may be left out; its section then disappears.

    Args:
        model_name: Hub id or plain name; it also stands in the code of the card.
        architecture: name of the model class.
        num_parameters: of the published model.
        id2label: class names; keys 0..K-1.
        colors: K RGB colours, 0-255, in label order.
        colors_in_config: whether `config.json` has them as `class_colors`.
        bands: names of the bands that the model reads, in order. None of them: taken for red, green, blue.
        image_mean, image_std: normalisation of values in 0..1, one value a band; none where it is scaled only.
        license: licence identifier of the model; never guessed.
        base_model: Hub ids of what the training started from.
        tags: tags besides the usual ones.
        dataset_name, dataset_id: name for readers, Hub id.
        dataset_description, dataset_license, dataset_citation: what it is, its terms, what to cite.
        tile_size, num_tiles: side of the tiles in pixels, {split: tiles}.
        ground_sampling_distance: metres that a pixel of a tile is wide.
        teacher, teacher_id, teacher_num_parameters: name of the teacher for readers, its Hub id if it has one, its size.
        results: measured scores.
        confusion: what the confusion matrix in `CONFUSION_NAME` was counted on.
        comparison: whether there is `COMPARISON_NAME`, examples beside reference and prediction.
        curves: whether there is `CURVES_NAME`, what was logged in training.
        examples: images beside the model.
        distillation: settings of the distillation; None for a model that was trained without a teacher.
        dual_relation: whether the distillation used Dual Relation Distillation (its tag and citation).
        training, seed, steps, hardware, versions, command: how the model was trained.
        profile: measured cost.
    """

    model_name: str
    architecture: str
    num_parameters: int
    id2label: Mapping[int | str, str]
    colors: Sequence[Sequence[int]] | None = None
    colors_in_config: bool = False
    bands: Sequence[str] = ()
    image_mean: Sequence[float] = ()
    image_std: Sequence[float] = ()
    license: str | None = None
    base_model: Sequence[str] = ()
    tags: Sequence[str] = ()
    dataset_name: str | None = None
    dataset_id: str | None = None
    dataset_description: str | None = None
    dataset_license: str | None = None
    dataset_citation: str | None = None
    tile_size: int | None = None
    num_tiles: Mapping[str, int] = field(default_factory=dict)
    ground_sampling_distance: float | None = None
    teacher: str | None = None
    teacher_id: str | None = None
    teacher_num_parameters: int | None = None
    results: Sequence[MeasuredResult] = ()
    confusion: str | None = None
    comparison: bool = False
    curves: bool = False
    examples: Sequence[Example] = ()
    distillation: Mapping[str, Any] | None = None
    dual_relation: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    profile: Profile | None = None

    @property
    def class_names(self) -> list[str]:
        return [str(name) for _, name in sorted(self.id2label.items(), key=lambda item: int(item[0]))]


def is_hub_id(name: str | os.PathLike | None) -> bool:
    """Whether `name` can be a Hub id, `namespace/name`."""
    try:
        validate_repo_id(str(name or ""))
    except HFValidationError:
        return False
    return "/" in str(name)


def hub_id(name: str | os.PathLike | None) -> str | None:
    """`name` if it is a Hub id and not a local file or folder, else None.

    To be asked where the run is: elsewhere its relative folders look like Hub ids of strangers.
    """
    return str(name) if is_hub_id(name) and not os.path.exists(name) else None


def facts_to_json(facts: ModelCardFacts) -> dict[str, Any]:
    """Facts as JSON can hold them; `facts_from_json` gives facts that make the same card."""
    return json.loads(json.dumps(_finite(asdict(facts))))


def facts_from_json(content: Mapping[str, Any]) -> ModelCardFacts:
    """Facts from what `facts_to_json` gave.

    Raises:
        TypeError, KeyError, ValueError: it is something else.
    """
    content = dict(content)
    content["results"] = [MeasuredResult(**result) for result in content.get("results", ())]
    content["examples"] = [Example(**example) for example in content.get("examples", ())]
    if content.get("profile") is not None:
        content["profile"] = Profile(**content["profile"])
    for entry in fields(ModelCardFacts):
        plain = entry.type in (str, int, bool, str | None, int | None)
        if plain and entry.name in content and not isinstance(content[entry.name], entry.type):
            raise TypeError(f"{entry.name} is {content[entry.name]!r}")
    facts = ModelCardFacts(**content)
    if sorted(map(int, facts.id2label)) != list(range(len(facts.id2label))):
        raise ValueError("id2label has other keys than 0..K-1")
    return facts


def read_run(folder: str | os.PathLike, scored: bool = True) -> dict[str, Any]:
    """`run.json` of a finished run.

    Args:
        scored: False also takes what is known of a model that was trained, and whose scores are missing.

    Raises:
        UserError: `folder` holds no finished run, or a damaged record of it.
    """
    path, trained = Path(folder) / RUN_NAME, Path(folder) / TRAINED_NAME
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: there is no such folder; {REMEDY}")
    if not path.is_file() and trained.is_file():
        if scored:
            raise UserError(
                f"{folder}: its model is trained and has no scores; make_card.py --run {folder} --dataset DATASET "
                "measures them"
            )
        path = trained
    if not path.is_file():
        raise UserError(f"{folder}: holds no finished run, it has no {RUN_NAME}; {REMEDY}")
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: is damaged ({_line(error)}); {REMEDY}") from None
    if not isinstance(run, dict):
        raise UserError(f"{path}: is no record of a run; {REMEDY}")
    return run


def read_facts(folder: str | os.PathLike) -> ModelCardFacts:
    """What the card of a finished run was made from: `render_model_card` gives the same card again.

    Raises:
        UserError: `folder` holds no finished run, one that did not keep these facts, or a damaged record.
    """
    kept, remedy = read_run(folder).get(CARD_KEY), f"make_card.py --run {folder} --dataset DATASET measures it anew"
    if kept is None:
        raise UserError(f"{folder}: an older version finished this run and kept no facts for a card; {remedy}")
    try:
        return facts_from_json(kept)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"{Path(folder) / RUN_NAME}: the facts for its card are damaged or of another version ({_line(error)}); {remedy}"
        ) from None


def _finite(value):
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, int)) else str(value)


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
