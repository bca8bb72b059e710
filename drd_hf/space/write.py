"""The folder of a Space."""

import ast
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import yaml

from drd_hf.cards import hub_id
from drd_hf.errors import UserError
from drd_hf.space.images import thumbnail

SDK_VERSION = "6.31.0"  # of gradio, with which the app is tested
ENDINGS = {".png", ".jpg", ".jpeg", ".tif", ".tiff"}
EMOJI, COLOR_FROM, COLOR_TO = "🛰️", "green", "blue"
PACKAGE = Path(__file__).resolve().parents[1]

README = """
# {heading}

Upload an aerial image of up to 40 million pixels, or pick an example: the Space shows the class of every pixel over the
image, and the share of each class. The class map is there to download; a GeoTIFF gives a GeoTIFF with its place on Earth.

{model}

Run it on your own machine:

```bash
pip install -r requirements.txt
python app.py
```

The code of this Space, with the sources of `drd_hf` that it needs, is under the Apache-2.0 licence (`LICENSE`). The model
and the example images have their own terms: see the card of the model.
"""
FROM_HUB = """\
The model is [{0}](https://huggingface.co/{0}). If its repository is private, give the Space a secret `HF_TOKEN` with a
token that may read it."""
FROM_FOLDER = "The model is a folder on the machine where this Space was written: it runs there alone."


def write_space(
    folder: str | Path,
    model: str | Path,
    *,
    title: str | None = None,
    examples: str | Path | Iterable[str | Path] | None = None,
    license: str | None = None,
) -> list[Path]:
    """Write a complete Gradio Space for one model: app, requirements, card with the Space's metadata, example images.

    The sources of `drd_hf` that the app needs, and their licence, travel in the folder. `python app.py` in it runs the
    Space on any machine that has the requirements.

    Args:
        folder: new or empty folder; it appears when it is whole.
        model: Hub id ORG/NAME, or a local folder to try a Space on this machine (not to be pushed: the Space then reads
            that folder). The model is read when the Space starts, so it need not be on the Hub yet.
        title: of the page. None: the last part of `model`.
        examples: image files (PNG, JPEG, TIFF) to pick from, or a folder of them. None: those in `examples/` of a local
            `model`, if there are any.
        license: identifier for the card of the Space; left out if not given.

    Returns:
        The files of the Space, in order of their names; `path.relative_to(folder)` is the name in the Space.

    Raises:
        UserError: `folder` holds something already or cannot be written, `model` is neither a folder of a checkpoint
            nor a Hub id, or an example is no image.
    """
    folder, is_local = Path(folder), Path(model).is_dir()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something already, give a new or empty folder for the Space")
    if is_local and not (Path(model) / "config.json").is_file():
        raise UserError(f"{model}: has no config.json, give the folder of a trained model or its Hub id ORG/NAME")
    if not is_local and hub_id(model) is None:
        raise UserError(f"{model}: is neither a folder nor a Hub id ORG/NAME")
    name = Path(model).resolve().name if is_local else str(model)
    title = _line(title or "") or name.rpartition("/")[2]
    files = _package_files() | {f: PACKAGE / "space/templates" / f for f in ("app.py", "requirements.txt", "LICENSE")}
    pictures = _examples(examples, Path(model) if is_local else None)
    settings = {
        "model": str(Path(model).resolve()) if is_local else name,
        "name": name,
        "is_hub_id": not is_local,
        "title": title,
        "examples": list(pictures),
    }
    texts = {
        "space.json": json.dumps(settings, indent=2) + "\n",
        "README.md": _readme(title, name, is_local, license),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            whole = Path(temporary) / "space"
            for file, source in (files | pictures).items():
                (whole / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, whole / file)
            for file, text in texts.items():
                (whole / file).write_text(text, encoding="utf-8")
            os.replace(whole, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error
    return sorted(folder / file for file in [*files, *pictures, *texts])


def _examples(examples, model: Path | None) -> dict[str, Path]:
    """Example images by their names in the Space."""
    if examples is None:
        examples = [model / "examples"] if model and (model / "examples").is_dir() else []
    elif isinstance(examples, (str, Path)):
        examples = [examples]
    paths = []
    for path in map(Path, examples):
        inside = sorted(path.iterdir()) if path.is_dir() else []
        paths += [file for file in inside if file.suffix.lower() in ENDINGS] if path.is_dir() else [path]
    for path in paths:
        thumbnail(path)  # refuses what is no image
    # Numbered: names of files are the user's, and two may be the same.
    return {f"examples/{i:02}{path.suffix.lower()}": path for i, path in enumerate(paths, 1)}


def _package_files() -> dict[str, Path]:
    """The sources of the package that the app imports, by their names in the Space."""
    found, waiting = {}, ["drd_hf.space.app"]
    while waiting:
        name = waiting.pop()
        base = PACKAGE.joinpath(*name.split(".")[1:])
        path = next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)
        if path is None or path in found.values():
            continue
        found[str(path.relative_to(PACKAGE.parent))] = path
        waiting.append(name.rpartition(".")[0] or name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("drd_hf"):
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    style = PACKAGE / "space/style.css"
    return found | {str(style.relative_to(PACKAGE.parent)): style}


def _readme(title: str, name: str, is_local: bool, license: str | None) -> str:
    """The card of the Space. What is the user's stands in the YAML alone, which has signs for everything."""
    header = {
        "title": title,
        "emoji": EMOJI,
        "colorFrom": COLOR_FROM,
        "colorTo": COLOR_TO,
        "sdk": "gradio",
        "sdk_version": SDK_VERSION,
        "app_file": "app.py",
        "short_description": "Segment aerial images",
    }
    header |= {} if is_local else {"models": [name]}
    header |= {"license": license} if license else {}
    body = README.format(
        heading="Segmentation of aerial images", model=FROM_FOLDER if is_local else FROM_HUB.format(name)
    )
    return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True, width=1000)}---\n{body}"


def _line(text: str) -> str:
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
