"""Datasets on the Hub: what belongs to a prepared one, and who may see it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from drd_hf.data.facts import DatasetFacts
from drd_hf.data.splits import SegmentationInfo, read_info
from drd_hf.errors import UserError
from drd_hf.hub.client import check_access, one_line, push_files


def push_dataset(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    i_have_the_right: bool = False,
    overwrite: bool = False,
    token: str | None = None,
) -> str:
    """Push a dataset that `prepare_dataset` wrote: `README.md` and `data/*.parquet` in one commit.

    Args:
        folder: output folder of `prepare_dataset`. Other files in it stay where they are.
        repo_id: dataset repository as ORG/NAME; made if it does not exist.
        private: whether a new repository is private. Not given, it is what the Hub makes of new repositories of the
            owner (public, unless an organisation says otherwise), but private where the terms of the dataset do not
            allow to hand it on. A repository that exists must already be what is asked for.
        i_have_the_right: push although the card says that the pixels may not be shared.
        overwrite: replace another dataset that is in the repository.
        token: token of the Hub that may write; the saved one or `HF_TOKEN` if not given.

    Parquet files of an earlier version go in the same commit, so the repository never holds parts of two versions.

    Returns:
        The address of the repository.

    Raises:
        UserError: the folder is no complete dataset, its terms forbid the push, or the Hub refuses or is not reached.
            The message is one line, without the token.
    """
    folder = Path(folder)
    info, files = _prepared_dataset(folder)
    private = _privacy(info.facts, private, i_have_the_right)
    return push_files(
        files,
        repo_id,
        repo_type="dataset",
        message=f"Push {info.name}",
        private=private,
        stale=r"data/[^/]*\.parquet",
        may_replace=_may_replace(info.name, overwrite),
        token=token,
    )


def check_push(
    facts: DatasetFacts,
    repo_id: str,
    *,
    private: bool | None = None,
    i_have_the_right: bool = False,
    overwrite: bool = False,
    token: str | None = None,
) -> None:
    """Refuse what `push_dataset` would refuse of a dataset that is still to be prepared. Nothing is made or changed.

    Looked at are the terms, the name of the repository, the token, and a repository that exists: its privacy and what
    it holds. Not foreseen are a full storage and the finer limits of fine-grained tokens.

    Args:
        facts: of the dataset; the other arguments are those of `push_dataset`.

    Raises:
        UserError: see `push_dataset`.
    """
    check_access(
        repo_id,
        repo_type="dataset",
        private=_privacy(facts, private, i_have_the_right),
        may_replace=_may_replace(facts.name, overwrite),
        token=token,
    )


def _privacy(facts: DatasetFacts, private: bool | None, i_have_the_right: bool) -> bool | None:
    """Whether the repository is to be private, None if all the same; `UserError` if the terms forbid to push at all."""
    if facts.may_be_shared is True:  # anything unclear that somebody wrote into a card is a no
        return private
    if not i_have_the_right:
        terms = one_line(facts.terms or "its card gives none")
        raise UserError(
            f"the terms of {facts.name} do not let you hand it on ({terms}); give --i_have_the_right (in Python "
            "i_have_the_right=True) if you have the right to, then the repository is private unless you say otherwise"
        )
    return True if private is None else private


def _may_replace(name: str, overwrite: bool) -> Callable[[Mapping[str, Any]], bool]:
    """Whether the dataset `name` may go where a card of these metadata is: where it was before, or anywhere."""

    def may_replace(card: Mapping[str, Any]) -> bool:
        there = card.get("segmentation")
        return overwrite or (isinstance(there, dict) and there.get("name") == name)

    return may_replace


def _prepared_dataset(folder: Path) -> tuple[SegmentationInfo, dict[str, Path]]:
    """What the card in a folder of `prepare_dataset` says, and the folder's files by their path in a repository."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the output folder of prepare_dataset.py")
    info, files = read_info(folder), {"README.md": folder / "README.md"}
    for split, expected in info.num_tiles.items():
        shards = sorted((folder / "data").glob(f"{split}-*.parquet"))
        found = sum(_num_rows(path) for path in shards)
        if found != expected:
            raise UserError(f"{folder}: {split} has {found} of its {expected} tiles; prepare it again")
        files |= {f"data/{path.name}": path for path in shards}
    return info, files


def _num_rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: is damaged ({one_line(error)}); prepare the dataset again") from None
