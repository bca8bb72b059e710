"""Spaces on the Hub: an app in which anybody tries a model in the browser."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from drd_hf.cards import read_facts
from drd_hf.errors import UserError
from drd_hf.hub.client import check_access, push_files
from drd_hf.space import write_space

STALE = r"drd_hf/.*|examples/.*"  # of an earlier version of the app


def write_model_space(folder: str | Path, model: str | Path, repo_id: str) -> dict[str, Path]:
    """Write the Space of a model that is, or will be, on the Hub as `repo_id`: {path in the Space: local file}.

    Args:
        folder: new or empty folder for the Space.
        model: output folder of the run, whose example images and licence the Space gets.

    Raises:
        UserError: see `write_space` and `read_facts`.
    """
    if Path(repo_id).is_dir():  # the Space would read that folder instead of the Hub
        raise UserError(f"{repo_id}: a folder here has the name of the repository; call this from another folder")
    facts = read_facts(model)  # what else lies in the folder of the examples may be nobody's to hand on
    examples = [Path(model) / example.path for example in facts.examples]
    written = write_space(folder, repo_id, examples=examples, license=facts.license)
    return {path.relative_to(folder).as_posix(): path for path in written}


def push_space(
    model: str | Path,
    repo_id: str,
    space_id: str | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> str:
    """Write the Space of the model `repo_id` and push it in one commit; returns its address.

    Args:
        model: output folder of the run.
        space_id: Space as ORG/NAME; None: the name of the model's repository.
        private, token: as in `push_model`. A private model needs a secret `HF_TOKEN` in the settings of its Space.
        overwrite: replace a Space of something else. An earlier one of this model is replaced without.

    Raises:
        UserError: see `push_model`.
    """
    with tempfile.TemporaryDirectory() as temporary:
        return push_files(
            write_model_space(Path(temporary) / "space", model, repo_id),
            space_id or repo_id,
            repo_type="space",
            space_sdk="gradio",
            message=f"Push the Space of {repo_id}",
            private=private,
            stale=STALE,
            may_replace=_may_replace(repo_id, overwrite),
            token=token,
        )


def check_space_push(
    repo_id: str,
    space_id: str | None = None,
    *,
    private: bool | None = None,
    token: str | None = None,
    overwrite: bool = False,
) -> None:
    """Refuse what `push_space` would refuse, before the model is pushed. Nothing is made or changed."""
    may_replace = _may_replace(repo_id, overwrite)
    check_access(space_id or repo_id, repo_type="space", private=private, may_replace=may_replace, token=token)


def _may_replace(repo_id: str, overwrite: bool) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the Space may go where a card of these metadata is: where an app for this model was, or anywhere."""

    def may_replace(card: Mapping[str, Any]) -> bool:
        models = card.get("models")
        return overwrite or (isinstance(models, list) and repo_id in models and card.get("sdk") == "gradio")

    return may_replace
