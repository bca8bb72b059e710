"""The one way to the Hub: files that belong together in one commit, tried again, refused in one line.

`push_files` and `check_access` know the Hub and nothing of what is pushed; `drd_hf.hub.datasets` and
`drd_hf.hub.models` know what belongs to a dataset and to a model.
"""

import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or of httpx2, as the version of huggingface_hub has it
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from drd_hf.errors import UserError

TRIES = 3
PAUSE = 2.0  # seconds before the second try, doubled before each further one


def push_files(
    files: Mapping[str, Path | bytes],
    repo_id: str,
    *,
    repo_type: str,
    message: str,
    private: bool | None = None,
    stale: str = "",
    may_replace: Callable[[Mapping[str, Any]], bool] = lambda card: True,
    token: str | None = None,
    space_sdk: str | None = None,
) -> str:
    """Make the repository if need be, and put `files` (path there -> local file, or content) into it in one commit.

    Files there that match the regular expression `stale` and are not among `files` are deleted by the same commit.
    `may_replace` is asked with the metadata of the card ({} if there is none) of a repository that has files.
    A failure that may pass is tried again; what has been uploaded by then is not sent again.

    Args:
        repo_id: repository as ORG/NAME.
        repo_type: "model", "dataset", or "space" with its `space_sdk`, for example "gradio".
        private: whether a new repository is private; None: what the Hub makes of new ones of the owner. A repository
            that exists must already be what is asked for.
        token: token of the Hub that may write; the saved one or `HF_TOKEN` if not given.

    Returns:
        The address of the repository.

    Raises:
        UserError: the Hub refuses or is not reached. The message is one line, without the token.
    """
    api = _api(repo_id, token)
    _tried(
        lambda: _push_once(api, files, repo_id, repo_type, message, private, stale, may_replace, space_sdk),
        repo_id,
        api,
    )
    return f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"


def check_access(
    repo_id: str,
    *,
    repo_type: str,
    private: bool | None = None,
    may_replace: Callable[[Mapping[str, Any]], bool] = lambda card: True,
    token: str | None = None,
) -> None:
    """Refuse what `push_files` would refuse: name, token, and the privacy and content of a repository that exists.

    Nothing is made or changed. Not foreseen are a full storage and the finer limits of fine-grained tokens.
    """
    api = _api(repo_id, token)

    def check() -> None:
        user = api.whoami()
        role = ((user.get("auth") or {}).get("accessToken") or {}).get("role")
        if role == "read":
            raise UserError(f"{repo_id}: the token may only read; give one with write access")
        if _existing(api, repo_id, repo_type, private, may_replace) or role != "write":
            return
        # What a token of the role "write" may make is known; a fine-grained one may tell less than it may do.
        owners = [user["name"], *(organisation["name"] for organisation in user.get("orgs", ()))]
        if repo_id.split("/")[0].lower() not in [owner.lower() for owner in owners]:
            raise UserError(f"{repo_id}: the token may not make it; give a repository of {' or '.join(owners)}")

    _tried(check, repo_id, api)


def _api(repo_id: str, token: str | None) -> HfApi:
    """The client of the Hub with a token that can be one; `UserError` without, or if `repo_id` cannot be one."""
    _check_repo_id(repo_id)
    token = (token or get_token() or "").strip()
    if not token:
        raise UserError(f"{repo_id}: no token for the Hub; run `hf auth login`, or set HF_TOKEN to one that may write")
    if not re.fullmatch(r"[!-~]+", token):  # a header would refuse it with a message that shows it
        raise UserError(f"{repo_id}: the token holds spaces or signs that no token has; copy it again")
    return HfApi(token=token)


def _tried(ask: Callable[[], None], repo_id: str, api: HfApi) -> None:
    """`ask()`, again after a failure that may pass; one that does not becomes a `UserError` without the token."""
    for attempt in range(TRIES):
        try:
            return ask()
        except UserError:
            raise
        except (HTTPError, OSError, ValueError, RuntimeError) as error:
            cause = _http_cause(error)
            if attempt == TRIES - 1 or not _may_pass(cause):
                raise UserError(f"{repo_id}: {_explain(cause, api)}".replace(api.token, "***")) from None
            time.sleep(PAUSE * 2**attempt)


def _existing(
    api: HfApi, repo_id: str, repo_type: str, private: bool | None, may_replace: Callable[[Mapping[str, Any]], bool]
) -> tuple[str, set[str]] | None:
    """Commit and files of the repository, None if there is none; `UserError` if the push must not go there."""
    try:
        repo = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        return None
    if private is not None and bool(repo.private) != private:
        is_, asked, ask = ("private", "public", "do not ask") if repo.private else ("public", "private", "ask")
        raise UserError(
            f"{repo_id}: the repository is {is_}, and the push is to be {asked}; give another repository, change this "
            f"one in its settings on the Hub, or {ask} for a public push (--public, in Python private=False)"
        )
    there = {sibling.rfilename for sibling in repo.siblings or ()} - {".gitattributes"}
    if there and not may_replace(_card(api, repo_id, repo_type, repo.sha) if "README.md" in there else {}):
        raise UserError(
            f"{repo_id}: holds something else already; give another repository, or replace it by --overwrite (in Python "
            "overwrite=True)"
        )
    return repo.sha, there


def _push_once(
    api: HfApi,
    files: Mapping[str, Path | bytes],
    repo_id: str,
    repo_type: str,
    message: str,
    private: bool | None,
    stale: str,
    may_replace: Callable[[Mapping[str, Any]], bool],
    space_sdk: str | None,
) -> None:
    # Looked at before the first byte goes up, also if it is new: what counts is what the Hub says it is.
    repo = _existing(api, repo_id, repo_type, private, may_replace)
    if repo is None:
        api.create_repo(repo_id, repo_type=repo_type, private=private, space_sdk=space_sdk)
        repo = _existing(api, repo_id, repo_type, private, may_replace)
    if repo is None:
        raise UserError(f"{repo_id}: was made and cannot be seen with this token; give one that may also read it")
    revision, there = repo
    deleted = [path for path in sorted(there) if re.fullmatch(stale, path) and path not in files]
    # Not `upload_folder`: it makes several commits of a large folder, and between two of them what is there is broken.
    # With the parent named, two pushes at the same time cannot mix either.
    commit = api.create_commit(
        repo_id,
        [CommitOperationDelete(path) for path in deleted]
        + [CommitOperationAdd(path, content) for path, content in files.items()],
        commit_message=message,
        repo_type=repo_type,
        parent_commit=revision,
    )
    arrived = api.list_repo_files(repo_id, repo_type=repo_type, revision=commit.oid)
    if missing := sorted(set(files) - set(arrived)):
        raise UserError(f"{repo_id}: its .gitignore keeps {missing[0]} out; remove the .gitignore and push again")


def _card(api: HfApi, repo_id: str, repo_type: str, revision: str) -> dict[str, Any]:
    """The metadata of the repository's card; {} if it is damaged."""
    path = api.hf_hub_download(repo_id, "README.md", repo_type=repo_type, revision=revision)
    try:
        return RepoCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (yaml.YAMLError, ValueError):
        return {}


def _check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is no name of a repository ({one_line(error)}); give ORG/NAME") from None
    if "/" not in repo_id:
        raise UserError(f"{repo_id!r} does not say whose repository it is; give ORG/NAME")


def _http_cause(error: BaseException) -> BaseException:
    """What went wrong beneath an error of an upload: huggingface_hub wraps the one of HTTP."""
    while not isinstance(error, HTTPError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def _status(error: BaseException) -> int | None:
    """Status of the answer; None where there was none."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _may_pass(error: BaseException) -> bool:
    status = _status(error)
    return isinstance(error, HTTPError) if status is None else status in (408, 500, 502, 503, 504)


def _explain(error: BaseException, api: HfApi) -> str:
    """One line: what the Hub or the connection said, and the remedy."""
    status = _status(error)
    said = one_line(getattr(error, "server_message", None) or error)
    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is not asked while HF_HUB_OFFLINE is set; unset it to push"
    if status == 401:
        return f"the Hub does not know the token ({said}); run `hf auth login` or renew HF_TOKEN"
    if status == 403:
        return f"the token may not do this ({said}); give one with write access to the owner of the repository"
    if isinstance(error, EntryNotFoundError) or status in (404, 409, 412):
        return f"the repository has changed meanwhile or cannot be seen with this token ({said}); push again"
    if status == 429:
        return f"the Hub asks for a pause ({said}); wait some minutes and push again"
    if _may_pass(error):
        return f"{api.endpoint} does not answer as it should ({said}); push again later, what is already up is not sent again"
    return f"the push failed ({said})"


def one_line(message: object) -> str:
    """A message as one line of bearable length."""
    words = " ".join(str(message).split()) or type(message).__name__
    return (words if len(words) <= 300 else f"{words[:297]}...").rstrip(".")
