"""Trained models on the Hub: the files of a finished run that a stranger needs, and no others."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import RepoCard
from huggingface_hub.constants import ENDPOINT

from drd_hf.cards import CARD_HASH_KEY, read_facts, read_run, render_model_card
from drd_hf.errors import UserError
from drd_hf.hub.client import check_access, one_line, push_files

logger = logging.getLogger(__name__)

WEIGHTS = "model.safetensors"
NEEDED = ("config.json", "preprocessor_config.json", WEIGHTS)
# Pictures go along where the card shows them, whatever else lies in these folders.
PICTURE = r"(?:figures|examples)/[\w][\w.-]*\.(?:png|jpe?g)"
# What an earlier push, or the model that is replaced, must not leave beside the new one: pictures that no card shows,
# and files that `from_pretrained` would read instead of ours or with them.
STALE = (
    r"(?:figures|examples)/.*|(?:pytorch_)?model[^/]*\.(?:safetensors|bin)(?:\.index\.json)?|processor_config\.json"
)
LOCAL_PATH = re.compile(r"(?:file://|~?/|~\w*/|\.\.?/|[A-Za-z]:[\\/]|\\\\)")


@dataclass(frozen=True)
class PushedModel:
    """What was pushed, or in a dry run would be: bytes of every file by its path in the repository at `url`."""

    url: str
    sizes: Mapping[str, int]


def push_model(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> PushedModel:
    """Push the model of a finished run in one commit: see `model_files` for what goes along.

    Args:
        folder: output folder of a training script.
        repo_id: repository as ORG/NAME; made if it does not exist.
        private: whether a new repository is private. None: what the Hub makes of new ones of the owner. A repository
            that exists must already be what is asked for.
        token: token of the Hub that may write; the saved one or `HF_TOKEN` if not given.
        overwrite: replace another model that is in the repository. An earlier version of this one, known by the name
            in its card, is replaced without.
        dry_run: check the folder and tell the files, without the network or a token.

    Raises:
        UserError: the folder is no finished run, or holds what must not be published, or the Hub refuses or is not
            reached. The message is one line, without the token.
    """
    files = model_files(folder, repo_id)
    sizes = {path: len(file) if isinstance(file, bytes) else file.stat().st_size for path, file in files.items()}
    if dry_run:
        return PushedModel(f"{ENDPOINT}/{repo_id}", sizes)
    names = _names(card_metadata(files["README.md"].decode()))
    url = push_files(
        files,
        repo_id,
        repo_type="model",
        message=f"Push {Path(folder).resolve().name}",
        private=private,
        stale=STALE,
        may_replace=_may_replace({repo_id, *names}, overwrite),
        token=token,
    )
    return PushedModel(url, sizes)


def check_model_push(
    repo_id: str, *, private: bool | None = None, token: str | None = None, overwrite: bool = False
) -> None:
    """Refuse what `push_model` would refuse of a model that is still to be trained. Nothing is made or changed.

    Looked at are the name of the repository, the token, and a repository that exists: its privacy and what it holds.

    Raises:
        UserError: see `push_model`.
    """
    may_replace = _may_replace({repo_id}, overwrite)
    check_access(repo_id, repo_type="model", private=private, may_replace=may_replace, token=token)


def model_files(folder: str | Path, repo_id: str) -> dict[str, Path | bytes]:
    """What is published of the folder of a finished run: {path in the repository: local file, or content}.

    These are the configuration, the weights, the image processor, the card, and the pictures that the card shows.
    Checkpoints, optimizers, projectors, logs and everything else stay where they are.

    The card is rendered anew for `repo_id`. One that was edited by hand (it is neither what the run wrote nor what its
    facts give) is left as it is.

    Raises:
        UserError: the run is not finished, a file is missing, the weights are not those of the model alone, a
            configuration holds a path of this machine, or the card has no results or shows a picture that is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the output folder of distill.py or train_teacher.py")
    card = _card_text(folder, repo_id)
    if not _names(card_metadata(card, folder / "README.md")):
        raise UserError(f"{folder / 'README.md'}: has no results (model-index); a model is pushed with its scores")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: has no {name}, the run is not finished; train it, or resume it, to the end")
    for name in NEEDED[:2]:
        _refuse_local_paths(folder / name)
    _refuse_foreign_weights(folder)
    pictures = sorted(set(re.findall(rf"(?<![\w/.-])(?:\./)?({PICTURE})", card)))
    for name in pictures:
        if not (folder / name).is_file():
            raise UserError(f"{folder}: its card shows {name}, which is not there; run it again, or edit README.md")
    return {
        "README.md": card.encode(),
        **{name: folder / name for name in (*NEEDED, *pictures)},
    }


def _card_text(folder: Path, repo_id: str) -> str:
    facts, path = read_facts(folder), folder / "README.md"
    if not facts.results:
        raise UserError(f"{folder}: was not scored; a model is pushed with its scores")
    rendered = render_model_card(replace(facts, model_name=repo_id))
    try:
        found = path.read_bytes() if path.exists() else None
        # An older version of the package may have rendered it in other words.
        if found is None or hashlib.sha256(found).hexdigest() == read_run(folder).get(CARD_HASH_KEY):
            return rendered
        found = found.decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    if found in (rendered, render_model_card(facts)):
        return rendered
    logger.warning("%s is not what the run gives: it counts as edited by hand and is pushed as it is", path)
    return found


def card_metadata(card: str, path: str | Path = "README.md") -> dict[str, Any]:
    """The YAML metadata of a card; `UserError`, naming `path`, if they cannot be read."""
    try:
        return RepoCard(card, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({one_line(error)})") from None


def _names(card: Mapping[str, Any]) -> set[str]:
    """Names of the models with results in the metadata of a card, which may be anybody's."""
    entries = card.get("model-index")
    entries = entries if isinstance(entries, list) else []
    return {str(entry.get("name")) for entry in entries if isinstance(entry, dict) and entry.get("results")}


def _may_replace(names: set[str], overwrite: bool) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the model may go where a card of these metadata is: where one of its names was before, or anywhere."""
    return lambda card: overwrite or bool(_names(card) & names)


def _refuse_local_paths(path: Path) -> None:
    """A backbone or a start that was read from a folder can leave its path in a configuration."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None

    for key, text in _texts(content):
        if LOCAL_PATH.match(text):
            raise UserError(f"{path}: {key} is {text!r}, a path of this machine; remove it before the push")


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in the content of a JSON file, with the key that it stands under; names of classes are anybody's."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name not in ("id2label", "label2id"):
                yield from _texts(item, name)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
    elif isinstance(value, str):
        yield key, value


def _refuse_foreign_weights(folder: Path) -> None:
    """`from_pretrained` must find exactly the model's own tensors: no teacher's, no projector's, and none missing."""
    from safetensors import SafetensorError  # here, as the modules that follow take seconds to import
    from transformers import AutoModelForSemanticSegmentation

    from drd_hf.models import NOT_TRAINED

    path = folder / WEIGHTS
    try:
        _, report = AutoModelForSemanticSegmentation.from_pretrained(
            folder,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # told below, by name
            output_loading_info=True,
            local_files_only=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be loaded ({one_line(error)})") from None
    foreign = sorted(report["unexpected_keys"])
    if foreign:
        raise UserError(
            f"{path}: {len(foreign)} tensors are not the model's own, the first is {foreign[0]}; push a folder that the "
            "training scripts wrote"
        )
    lacking = {key[0] if isinstance(key, tuple) else key for key in report["missing_keys"]}
    lacking |= {key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]}
    lacking = sorted(key for key in lacking if not key.endswith(NOT_TRAINED))
    if lacking:
        raise UserError(f"{path}: {len(lacking)} tensors are missing or do not fit, the first is {lacking[0]}")
