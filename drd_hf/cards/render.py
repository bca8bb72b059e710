"""The text of a card: YAML metadata for the Hub, then Markdown for people."""

import json
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import EvalResult, ModelCardData

from drd_hf.cards.facts import (
    CLASS_RELATIONS,
    COMPARISON_NAME,
    CONFUSION_NAME,
    CURVES_NAME,
    DUAL_RELATION,
    FEATURE_RELATIONS,
    MeasuredResult,
    ModelCardFacts,
    is_hub_id,
)
from drd_hf.cards.text import code_block, last_part, markdown_code, markdown_text, short_name, without_paths
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


def render_model_card(facts: ModelCardFacts) -> str:
    """The README.md of a model: YAML metadata for the Hub, then Markdown.

    Text of users (names, settings, terms) is escaped and cannot leave its place. Paths that tell about the machine of
    the run are cut to their last name. Nothing but the facts decides: the same ones give the same card everywhere.

    Raises:
        UserError: the colours do not fit the classes, the normalisation not the bands, or two results have the same
            dataset, split and protocol.
    """
    _check(facts)
    model_name = short_name(facts.model_name)
    results = [_tables(facts, result) for result in facts.results]
    return _template().render(
        facts=facts,
        header=_header(facts),
        other_losses=any(str(n).endswith(" weight") and n not in DUAL_RELATION for n in facts.distillation or ()),
        related=[
            what
            for what, names in (("features", FEATURE_RELATIONS), ("class probabilities", CLASS_RELATIONS))
            if any(name in (facts.distillation or ()) for name in names)
        ]
        or ["features"],  # of cards from before their terms were kept
        model_name=model_name,
        model_literal=json.dumps(model_name, ensure_ascii=False),
        base_models=_base_models(facts),
        teacher=facts.teacher_id or (facts.teacher and last_part(facts.teacher)),
        teacher_on_hub=_on_hub(facts.teacher_id),
        dataset_name=short_name(facts.dataset_name) if facts.dataset_name else None,
        dataset_on_hub=_on_hub(facts.dataset_id),
        dataset_description=without_paths(facts.dataset_description) if facts.dataset_description else None,
        distance=_distance(facts.ground_sampling_distance),
        results=results,
        confusion=without_paths(facts.confusion) if facts.confusion else None,
        pictures={"confusion": CONFUSION_NAME, "curves": CURVES_NAME, "comparison": COMPARISON_NAME},
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
        hardware=without_paths(facts.hardware) if facts.hardware else None,
        profile_device=without_paths(facts.profile.device) if facts.profile else None,
        dataset_license=without_paths(facts.dataset_license) if facts.dataset_license else None,
        dataset_citation=without_paths(facts.dataset_citation) if facts.dataset_citation else None,
        command=code_block(without_paths(facts.command).strip(), "bash") if facts.command else None,
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


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("drd_hf", "templates"),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML: the filters `text` and `code` escape it
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": markdown_text, "code": markdown_code, "score": _score, "count": _count}
    environment.filters |= {"time": _time, "giga": _giga}
    return environment.get_template("model_card.md.jinja")


def _check(facts: ModelCardFacts) -> None:
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


class _Dumper(yaml.SafeDumper):
    """Text with line breaks in one line of escapes: YAML 1.1 and 1.2 do not agree on what breaks a line."""


def _represent_text(dumper: yaml.SafeDumper, text: str):
    broken = re.search("[\n\r\x85\u2028\u2029]", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if broken else None)


_Dumper.add_representer(str, _represent_text)


def _header(facts: ModelCardFacts) -> str:
    """The YAML metadata, without the lines of dashes."""
    tags = ["semantic-segmentation", "remote-sensing"]
    if facts.distillation is not None:
        tags[1:1] = ["knowledge-distillation"] + ["dual-relation-distillation"] * facts.dual_relation
    dataset, base_models = _on_hub(facts.dataset_id), _base_models(facts)
    eval_results = [entry for result in facts.results for entry in _eval_results(facts, result)]
    data = ModelCardData(
        license=facts.license,
        library_name="transformers",
        pipeline_tag="image-segmentation",
        tags=tags + [str(tag) for tag in facts.tags],
        base_model=base_models or None,
        # The Hub has one relation for the whole list, and would take two models for a merge.
        base_model_relation="finetune" if base_models else None,
        datasets=[dataset] if dataset else None,
        widget=[{"src": str(e.path), "example_title": str(e.title)} for e in facts.examples] or None,
        model_name=short_name(facts.model_name) if eval_results else None,
        eval_results=eval_results or None,
    )
    return yaml.dump(data.to_dict(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf).strip()


def _base_models(facts: ModelCardFacts) -> list[str]:
    """Hub ids of what the model comes from: its start, and its teacher."""
    return [name for name in dict.fromkeys([*facts.base_model, facts.teacher_id]) if is_hub_id(name)]


def _on_hub(name: str | None) -> str | None:
    return name if is_hub_id(name) else None


def _eval_results(facts: ModelCardFacts, result: MeasuredResult) -> list[EvalResult]:
    dataset, split, protocol = short_name(result.dataset), short_name(result.split), without_paths(result.protocol)
    on_hub = _on_hub(facts.dataset_id) if result.dataset == facts.dataset_name else None
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
            metric_type=_score_and_group(key)[0],
            metric_name=f"{_named(key, names)} ({split}, {protocol})",
            metric_value=float(value),
        )
        for key, value in result.metrics.items()
        if value is not None and math.isfinite(value)
    ]


def _score_and_group(key: str) -> tuple[str, str]:
    """`5_classes/mean_iou` -> ("mean_iou", "5 classes"); without a group -> (key, "")."""
    match = re.fullmatch(r"(\d+)_classes/(.+)", key, re.DOTALL)
    return (match[2], f"{match[1]} classes") if match else (key, "")


def _named(key: str, names: Mapping[str, str]) -> str:
    score, group = _score_and_group(key)
    return f"{names.get(score, score)}{f' over {group}' if group else ''}"


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
    per_class = {f"{score}_{name}" for name in facts.class_names for score in CLASS_SCORES}
    summary = [
        (_named(key, SUMMARY_NAMES), [metrics.get(key) for metrics in columns.values()])
        for key in result.metrics
        if key not in per_class
    ]
    classes = [
        (name, [result.metrics.get(f"{score}_{name}") for score in CLASS_SCORES])
        for name in facts.class_names
        if any(f"{score}_{name}" in result.metrics for score in CLASS_SCORES)
    ]
    return {
        "dataset": short_name(result.dataset),
        "split": short_name(result.split),
        "protocol": without_paths(result.protocol),
        "columns": list(columns),
        "summary": summary,
        "classes": classes,
    }


def _settings(settings: Mapping[str, Any]) -> dict[str, str]:
    return {str(name): _setting(value) for name, value in settings.items()}


def _setting(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return short_name(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_setting(item)}" for name, item in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_setting, value))
    return str(value)


def _distance(metres: float | None) -> str | None:
    if metres is None:
        return None
    return f"{100 * metres:.3g} cm" if metres < 1 else f"{metres:.3g} m"


def _score(value: float | None) -> str:
    return "–" if value is None or not math.isfinite(value) else f"{value:.4f}"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _time(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"


def _giga(value: int | None) -> str:
    return "–" if value is None else f"{value / 1e9:.2f}"
