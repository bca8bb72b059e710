"""Whether a model folder has what the Hub's inference widget needs."""

import json
import re
from pathlib import Path
from typing import Any

from drd_hf.errors import UserError
from drd_hf.hub.client import one_line
from drd_hf.hub.models import NEEDED, WEIGHTS, card_metadata

LARGEST = 10e9  # bytes: "too large to be loaded automatically", says the Hub above it
ODD_SIZE = (151, 203)  # height and width of the image that is tried: people do not cut theirs for a model


def check_widget_ready(folder: str | Path) -> list[str]:
    """What keeps a model from working in the Hub's inference widget, and in `pipeline("image-segmentation")`.

    Looked at are the card (`pipeline_tag`, `library_name`, widget examples whose images are there), the configuration
    (architecture, names of the classes, their colours, bands), the weights (safetensors, size), and the image
    processor. Then the pipeline runs once, on the CPU, on a blank image of an odd size.

    The widget itself draws in colours of its own. Those of the classes travel in `config.json` as `class_colors`, a list
    of [red, green, blue], 0-255, in the order of the labels; `drd_hf.models.colors_of` reads it.

    Args:
        folder: with config.json, model.safetensors, preprocessor_config.json and README.md, as the training scripts
            write it.

    Returns:
        The problems, one line each; none if the widget works.

    Raises:
        UserError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the output folder of distill.py or train_teacher.py")
    missing = [f"{name} is missing" for name in NEEDED if not (folder / name).is_file()]
    problems = _of_card(folder) + missing
    if not missing:
        problems += _of_config(folder / "config.json") + _of_size(folder / WEIGHTS)
    return problems if missing else problems + _of_pipeline(folder)


def _of_card(folder: Path) -> list[str]:
    path = folder / "README.md"
    try:
        card = card_metadata(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        return ["README.md is missing"]
    except (OSError, UnicodeDecodeError, UserError) as error:
        return [f"README.md cannot be read ({one_line(error)})"]
    problems = [
        f"README.md: {key} is {card.get(key)!r}, not {wanted!r}"
        for key, wanted in (("pipeline_tag", "image-segmentation"), ("library_name", "transformers"))
        if card.get(key) != wanted
    ]
    examples = card.get("widget") or []
    for example in examples if isinstance(examples, list) else [examples]:
        source = example.get("src") if isinstance(example, dict) else None
        if not isinstance(source, str):
            problems.append("README.md: a widget example has no src")
        elif not re.match(r"https?://", source) and not (folder / source).is_file():
            problems.append(f"README.md: the widget example {source} is not there")
    return problems


def _of_config(path: Path) -> list[str]:
    from transformers import AutoConfig  # here, as it takes seconds to import
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES

    from drd_hf.models import colors_of

    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True)
        names = [str(name) for _, name in sorted(config.id2label.items())]
    except Exception as error:  # of the configuration's own checks: any class
        return [f"config.json cannot be loaded ({one_line(error)})"]
    problems = []
    known = MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES.values()
    if not set(values.get("architectures") or ()) & set(known):
        problems.append(
            f"config.json: architectures {values.get('architectures')} name no semantic segmentation model"
        )
    if any(re.fullmatch(r"LABEL_\d+", name) or not name.strip() for name in names):
        problems.append("config.json: id2label does not name the classes")
    if len(set(names)) < len(names):
        problems.append("config.json: two classes have the same name in id2label")
    if colors_of(config) is None:
        problems.append("config.json: class_colors does not give every class a [red, green, blue], 0-255")
    return problems


def _of_size(path: Path) -> list[str]:
    size = path.stat().st_size
    return (
        [f"{path.name}: {size / 1e9:.1f} GB, the Hub loads at most {LARGEST / 1e9:.0f} GB"] if size > LARGEST else []
    )


def _of_pipeline(folder: Path) -> list[str]:
    import numpy as np
    from PIL import Image
    from transformers import pipeline

    from drd_hf.features import input_channels

    height, width = ODD_SIZE
    try:
        segment = pipeline("image-segmentation", model=str(folder), device="cpu")
        if (channels := input_channels(segment.model)) != 3:
            return [f"the model reads {channels} bands, and images of the widget have three"]
        segments = segment(Image.fromarray(np.zeros((height, width, 3), np.uint8)))
    except Exception as error:  # of any processor and any model: any class
        return [f'pipeline("image-segmentation") fails on an image of {width} x {height} pixels ({one_line(error)})']
    if not segments or any(segment["mask"].size != (width, height) for segment in segments):
        return ["the masks of the pipeline do not have the size of the image"]
    return []
