"""Model cards from the facts of a run: a section without facts disappears, and nothing is invented."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from drd_hf.errors import UserError

SUMMARY_NAMES = {
    "mean_iou": "mIoU",
    "mean_f1": "mean F1",
    "mean_accuracy": "mean accuracy",
    "overall_accuracy": "overall accuracy",
    "kappa": "Cohen's kappa",
}
CLASS_SCORES = {"iou": "IoU", "f1": "F1", "accuracy": "accuracy"}
RGB = ("red", "green", "blue")

# How a path begins that tells about somebody's machine: absolute, home, parent folder, drive or network share.
_LOCAL = (
    r"(?:file://)?(?:/(?=[\w.-]+/|[\w.][\w.-])|~(?:[A-Za-z_][\w.-]*)?[\\/]|\.\.[\\/]|[A-Za-z]:[\\/](?!/)|\\\\(?=\w))"
)
_LOCAL_PATH = re.compile(
    rf"""(?P<quote>["'])(?P<quoted>{_LOCAL}[^"'\n]*)(?P=quote)|(?<![\w.~/\\-]){_LOCAL}[^\s"'`,;|()<>]*"""
)


@dataclass(frozen=True)
class MeasuredResult:
    """Scores of one evaluation, as `SegmentationMetrics.compute` returns them.

    `protocol` says how the pixels were counted, for example "tiles of 256, each pixel once". The teacher and the
    student trained alone, where known, were measured on the same data with the same protocol.
    """

    dataset: str
    split: str
    protocol: str
    metrics: Mapping[str, float]
    teacher_metrics: Mapping[str, float] | None = None
    student_alone_metrics: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Timing:
    """Measured milliseconds for one tile of `tile_size` x `tile_size` pixels on `device`, in words."""

    milliseconds: float
    tile_size: int
    device: str


@dataclass(frozen=True, kw_only=True)
class ModelCardFacts:
    """What is known about a trained model. Everything with a default may be left out; its section then disappears.

    Args:
        model_name: Hub id or plain name; it also stands in the code of the card.
        architecture: name of the model class.
        num_parameters: of the published model.
        id2label: class names; keys 0..K-1.
        colors: K RGB colours, 0-255, in label order.
        bands: names of the bands that the model reads, in order. None of them: taken for red, green, blue.
        image_mean, image_std: normalisation of values in 0..1, one value a band; none where it is scaled only.
        license: licence identifier of the model; never guessed.
        base_model: what the training started from; what is no Hub id is left out.
        tags: tags besides the usual ones.
        dataset_name, dataset_id, dataset_license, dataset_citation: name for readers, Hub id, terms, what to cite.
        teacher, teacher_num_parameters: Hub id or folder of the teacher (of a folder only the last name is shown).
        results: measured scores.
        distillation: settings of the distillation; None for a model that was trained without a teacher.
        dual_relation: whether the distillation used Dual Relation Distillation (its tag and citation).
        training, seed, steps, hardware, versions, command: how the model was trained.
        timing: measured speed.
    """

    model_name: str
    architecture: str
    num_parameters: int
    id2label: Mapping[int | str, str]
    colors: Sequence[tuple[int, int, int]] | None = None
    bands: Sequence[str] = ()
    image_mean: Sequence[float] = ()
    image_std: Sequence[float] = ()
    license: str | None = None
    base_model: Sequence[str] = ()
    tags: Sequence[str] = ()
    dataset_name: str | None = None
    dataset_id: str | None = None
    dataset_license: str | None = None
    dataset_citation: str | None = None
    teacher: str | None = None
    teacher_num_parameters: int | None = None
    results: Sequence[MeasuredResult] = ()
    distillation: Mapping[str, Any] | None = None
    dual_relation: bool = True
    training: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    steps: int | None = None
    hardware: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    timing: Timing | None = None

    @property
    def class_names(self) -> list[str]:
        return [str(name) for _, name in sorted(self.id2label.items(), key=lambda item: int(item[0]))]


def hub_id(name: str | os.PathLike | None) -> str | None:
    """`name` if it is a Hub id (`namespace/name`) and not a local file or folder, else None."""
    name = str(name or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if "/" in name and not os.path.exists(name) else None


def render_model_card(facts: ModelCardFacts) -> str:
    """The README.md of a model: YAML metadata for the Hub, then Markdown.

    Text of users (names, settings, terms) is escaped and cannot leave its place. Paths that tell about the machine of
    the run are cut to their last name.

    Raises:
        UserError: the colours do not fit the classes, the normalisation not the bands, or two results have the same
            dataset, split and protocol.
    """
    if facts.colors is not None and len(facts.colors) != len(facts.id2label):
        raise UserError(f"{len(facts.colors)} colours for {len(facts.id2label)} classes: give every class one colour")
    for name, values in (("image_mean", facts.image_mean), ("image_std", facts.image_std)):
        if len(values) not in (0, 1, len(facts.bands or RGB)):
            raise UserError(
                f"{name}: {len(values)} values for {len(facts.bands or RGB)} bands: give one for each band"
            )
    measured = [(r.dataset, r.split, r.protocol) for r in facts.results]
    for key in measured:
        if measured.count(key) > 1:
            raise UserError(f"two results are called {key}: name what differs in the protocol")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drd_hf", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML: the filters `text` and `code` escape it
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": _text, "code": _code, "score": _score, "count": _count}
    model_name = _short(facts.model_name)
    results = [_tables(facts, result) for result in facts.results]
    return environment.get_template("model_card.md.jinja").render(
        facts=facts,
        header=_header(facts),
        model_name=model_name,
        model_literal=json.dumps(model_name, ensure_ascii=False),
        teacher=(hub_id(facts.teacher) or _last_part(str(facts.teacher))) if facts.teacher else None,
        teacher_on_hub=hub_id(facts.teacher),
        dataset_name=_short(facts.dataset_name) if facts.dataset_name else None,
        dataset_on_hub=hub_id(facts.dataset_id),
        results=results,
        bands=_bands(facts),
        band_names=", ".join(" ".join(str(name).split()) for name in facts.bands or RGB),
        compared={column for result in results for column in result["columns"]},
        distillation=_settings(facts.distillation or {}),
        training=_settings(
            {
                **facts.training,
                **{name: value for name, value in (("steps", facts.steps), ("seed", facts.seed)) if value is not None},
            }
        ),
        versions=_settings(facts.versions),
        hardware=_without_paths(facts.hardware) if facts.hardware else None,
        timing_device=_without_paths(facts.timing.device) if facts.timing else None,
        dataset_license=_without_paths(facts.dataset_license) if facts.dataset_license else None,
        dataset_citation=_without_paths(facts.dataset_citation) if facts.dataset_citation else None,
        command=_without_paths(facts.command).strip() if facts.command else None,
        fence="`" * max(3, 1 + _longest_run_of_backticks(facts.command or "")),
    )


def write_model_card(folder: str | os.PathLike, facts: ModelCardFacts) -> Path:
    """Write the card of `facts` to `folder/README.md`, which appears only when it is whole, and return its path."""
    card = render_model_card(facts)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "README.md"
    partial = folder / f".README.md.{os.getpid()}.tmp"
    try:
        partial.write_text(card, encoding="utf-8", newline="\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def _header(facts: ModelCardFacts) -> str:
    """The YAML metadata, without the lines of dashes."""
    tags = ["semantic-segmentation", "remote-sensing"]
    if facts.distillation is not None:
        tags[1:1] = ["knowledge-distillation"] + ["dual-relation-distillation"] * facts.dual_relation
    dataset = hub_id(facts.dataset_id)
    eval_results = [entry for result in facts.results for entry in _eval_results(facts, result)]
    data = ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=tags + [str(tag) for tag in facts.tags],
        base_model=[name for name in map(hub_id, facts.base_model) if name] or None,
        datasets=[dataset] if dataset else None,
        model_name=_short(facts.model_name) if eval_results else None,
        eval_results=eval_results or None,
    )
    return yaml.safe_dump(data.to_dict(), sort_keys=False, allow_unicode=True, width=1000).strip()


def _eval_results(facts: ModelCardFacts, result: MeasuredResult) -> list[EvalResult]:
    dataset, split, protocol = _short(result.dataset), _short(result.split), _without_paths(result.protocol)
    on_hub = hub_id(facts.dataset_id) if result.dataset == facts.dataset_name else None
    names = SUMMARY_NAMES | {
        f"{score}_{name}": f"{score_name} of {name}"
        for name in facts.class_names
        for score, score_name in CLASS_SCORES.items()
    }
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type=on_hub or dataset,
            dataset_name=dataset,
            dataset_split=split,
            metric_type=str(key),
            metric_name=f"{names.get(key, key)} ({split}, {protocol})",
            metric_value=float(value),
        )
        for key, value in result.metrics.items()
        if math.isfinite(value)
    ]


def _bands(facts: ModelCardFacts) -> list[tuple[str, list[float]]]:
    """Name, mean and deviation of each band; without the numbers where values are not normalised."""
    statistics = [values for values in (facts.image_mean, facts.image_std) if len(values) == len(facts.bands)]
    return [(name, [values[i] for values in statistics]) for i, name in enumerate(facts.bands)]


def _tables(facts: ModelCardFacts, result: MeasuredResult) -> dict[str, Any]:
    """Rows of the table over all classes and of the table per class."""
    columns = {
        "This model": result.metrics,
        "Teacher": result.teacher_metrics,
        "Student alone": result.student_alone_metrics,
    }
    columns = {title: metrics for title, metrics in columns.items() if metrics}
    parameters = {
        "This model": facts.num_parameters,
        "Teacher": facts.teacher_num_parameters,
        "Student alone": facts.num_parameters,
    }
    per_class = {f"{score}_{name}" for name in facts.class_names for score in CLASS_SCORES}
    summary = [
        (SUMMARY_NAMES.get(key, key), [metrics.get(key) for metrics in columns.values()])
        for key in result.metrics
        if key not in per_class
    ]
    classes = [
        (name, [result.metrics.get(f"{score}_{name}") for score in CLASS_SCORES])
        for name in facts.class_names
        if any(f"{score}_{name}" in result.metrics for score in CLASS_SCORES)
    ]
    return {
        "dataset": _short(result.dataset),
        "split": _short(result.split),
        "protocol": _without_paths(result.protocol),
        "columns": list(columns),
        "parameters": [parameters[title] for title in columns],
        "summary": summary,
        "classes": classes,
    }


def _settings(settings: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): _setting(value) for name, value in settings.items()}


def _setting(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return _short(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_setting(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_setting, value))
    return str(value)


def _short(name: str | os.PathLike) -> str:
    """`name` as it is, or its last part where it is a path of this machine."""
    name = str(name).strip()
    is_path = re.match(_LOCAL, name) or (re.search(r"[\\/]", name) and os.path.exists(name))
    return _last_part(name) if is_path else _without_paths(name)


def _without_paths(text: str) -> str:
    """`text` with every path that tells about a machine cut to its last part. Links and relative paths stay."""

    def shorten(match: re.Match) -> str:
        if match["quote"]:
            return match["quote"] + _last_part(match["quoted"]) + match["quote"]
        return _last_part(match[0])

    return _LOCAL_PATH.sub(shorten, str(text))


def _last_part(path: str) -> str:
    return re.split(r"[\\/]", path.rstrip("\\/"))[-1]


def _text(value: Any) -> str:
    """`value` as one line of plain text in Markdown, safe in a table cell as well."""
    line = re.sub(r"([\\`*\[\]<>|~]|&(?=[#\w]+;))", r"\\\1", " ".join(str(value).split()))
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)  # low_vegetation stays, _emphasis_ does not


def _code(value: Any) -> str:
    """`value` as a code span in a table cell."""
    line = " ".join(str(value).split()).replace("|", "\\|")
    ticks = "`" * (1 + _longest_run_of_backticks(line))
    pad = " " if len(ticks) > 1 or not line else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def _longest_run_of_backticks(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def _score(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
