"""Pushes to a local server that speaks the Hub's protocol, by the unmodified client in processes of their own."""

import inspect
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from drd_hf.data import load_splits
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.scenes import SCENES, SceneReader, scene_records
from drd_hf.errors import UserError
from drd_hf.hub import push_dataset

from .hub_server import (  # noqa: F401  (hub is a fixture)
    READ_TOKEN,
    TOKEN,
    Client,
    as_a_stranger,
    client_environment,
    holds_a_token,
    hub,
)

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "prepare_dataset.py"
TERMS = "No part of the images may be handed on."
# Answers a question a line: options of `push_dataset`, or of `check_push`, or words of the script prepare_dataset.py.
PUSHER = """
import contextlib, io, json, runpy, sys
from dataclasses import replace
from drd_hf import hub
from drd_hf.data.scenes import SCENES
from drd_hf.errors import UserError
from drd_hf.hub import client
client.PAUSE = 0.05

def check(facts, **options):
    hub.check_push(replace(SCENES, **facts), **options)

def script(words):
    sys.argv = ["prepare_dataset.py", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(sys.orig_argv[-1], run_name="__main__")
        except SystemExit as end:
            assert end.code == 2, end.code
            return {"error": err.getvalue().splitlines()[-1]}  # below the progress bars
    return {"said": out.getvalue()}

for line in sys.stdin:
    question, options = json.loads(line)
    try:
        answer = {"said": {"push": hub.push_dataset, "check": check, "script": script}[question](**options)}
    except UserError as error:
        answer = {"error": str(error)}
    print(json.dumps(answer["said"] if question == "script" else answer), flush=True)
"""
# Reads what its arguments name, and says for every split its length and the sums of its first tile.
READER = """
import json, os, sys
import numpy as np
from drd_hf.data import load_splits
from drd_hf.data.prepare import prepare_dataset
from drd_hf.data.scenes import SCENES, SceneReader, scene_records
from drd_hf.errors import UserError
public, private, token, *options = sys.argv[1:]

def told(repo, **options):
    try:
        splits = load_splits(repo, **options)
    except UserError as error:
        return {"error": str(error)}
    found = {}
    for name, rows in splits.items():
        first = next(iter(rows))
        sums = [int(np.asarray(first[column], np.int64).sum()) for column in ("image", "label")]
        found[name] = [sum(1 for _ in rows), *sums]
    return found

answers = {"public": told(public), "private without a token": told(private)}
os.environ["HF_TOKEN"] = token
answers["private"] = told(private)
if options:
    answers["streamed"] = told(private, streaming=True)
print(json.dumps(answers))
"""


# Reads a dataset with nothing but the library `datasets`.
STRANGER = """
import json
import numpy as np
from datasets import load_dataset
found = {}
for name, rows in load_dataset(sys.argv[1]).items():
    sums = [int(np.asarray(rows[0][column], np.int64).sum()) for column in ("image", "label")]
    found[name] = [len(rows), *sums]
first = next(iter(load_dataset(sys.argv[1], split="train", streaming=True)))
found["streamed"] = [first["image"].mode, first["label"].mode]
print(json.dumps(found))
"""


class Pusher(Client):
    """One client process for all pushes of this module."""

    def push(self, folder: Path, repo_id: str, **options) -> str:
        return self.said("push", folder=str(folder), repo_id=repo_id, **options)

    def refusal(self, folder: Path, repo_id: str, **options) -> str:
        return self.refused("push", folder=str(folder), repo_id=repo_id, **options)

    def check(self, repo_id: str, facts: dict | None = None, **options) -> None:
        assert self.said("check", facts=facts or {}, repo_id=repo_id, **options) is None

    def checked_refusal(self, repo_id: str, facts: dict | None = None, **options) -> str:
        return self.refused("check", facts=facts or {}, repo_id=repo_id, **options)

    def script(self, *words) -> str:
        return self.said("script", words=[str(word) for word in words])

    def script_refusal(self, *words) -> str:
        return self.refused("script", words=[str(word) for word in words])


@pytest.fixture(scope="module")
def pusher(hub, tmp_path_factory):  # noqa: F811
    pusher = Pusher(hub, tmp_path_factory.mktemp("pusher"), PUSHER, str(SCRIPT))
    yield pusher
    pusher.close()


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    """A prepared dataset of three scenes of four tiles."""
    output = tmp_path_factory.mktemp("prepared") / "scenes"
    sources = scene_records({"train": 2, "validation": 1})
    prepare_dataset(sources, SceneReader(128), SCENES, output, tile_size=64)
    return output


@pytest.fixture
def dataset(scenes, tmp_path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(scenes, tmp_path / "dataset"))


@pytest.fixture
def restricted(dataset) -> Path:
    """A dataset whose card says that it may not be shared."""
    change_card(dataset, may_be_shared=False, terms=f"{TERMS}\nNot even a part.")
    return dataset


def change_card(folder: Path, **changes) -> None:
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    content = yaml.safe_load(head)
    content["segmentation"] |= changes
    head = yaml.safe_dump(content, sort_keys=False)
    (folder / "README.md").write_text(f"---\n{head}---\n{text}", encoding="utf-8")


def in_two_shards(folder: Path, split: str) -> None:
    (path,) = (folder / "data").glob(f"{split}-*.parquet")
    table = pq.read_table(path)
    path.unlink()
    half = len(table) // 2
    for i, part in enumerate((table.slice(0, half), table.slice(half))):
        pq.write_table(part, folder / "data" / f"{split}-{i:05d}-of-00002.parquet")


def new_content(folder: Path, mark: str) -> None:
    """Files that no test has uploaded before."""
    for shard in (folder / "data").glob("*.parquet"):
        table = pq.read_table(shard)
        pq.write_table(table.replace_schema_metadata(table.schema.metadata | {b"mark": mark.encode()}), shard)


def contents(folder: Path) -> dict[str, bytes]:
    files = [folder / "README.md", *(folder / "data").glob("*.parquet")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def without_attributes(files: dict[str, bytes]) -> dict[str, bytes]:
    return {path: content for path, content in files.items() if path != ".gitattributes"}


def test_card_and_tiles_arrive_in_one_commit_and_nothing_else_does(hub, pusher, dataset):  # noqa: F811
    expected = contents(dataset)
    (dataset / ".env").write_text("SECRET=1")
    (dataset / "data" / "notes.txt").write_text("mine")
    (dataset / "data" / "other").mkdir()
    shutil.copy(
        next((dataset / "data").glob("*.parquet")), dataset / "data" / "other" / "train-00000-of-00001.parquet"
    )

    url = pusher.push(dataset, "org/everything")

    repo = hub.repos["datasets/org/everything"]
    assert url == f"{hub.endpoint}/datasets/org/everything"
    assert len(repo.commits) == 2  # the first is the Hub's own
    assert without_attributes(repo.files) == expected
    assert not repo.private
    assert repo.commits[-1].lfs == {path for path in expected if path.endswith(".parquet")}


def test_pushed_tiles_load_in_another_process_and_only_for_who_may_see_them(hub, pusher, dataset, tmp_path):  # noqa: F811
    pusher.push(dataset, "org/public")
    pusher.push(dataset, "org/private", private=True)
    streaming = ["streaming"] if "streaming" in inspect.signature(load_splits).parameters else []
    sent_before = len(hub.requests)

    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-c", READER, "org/public", "org/private", TOKEN, *streaming],
        env=client_environment(hub, home, token=None),
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    answers = json.loads(done.stdout)
    local = load_splits(dataset)
    expected = {
        split: [len(rows)] + [int(np.asarray(rows[0][column], np.int64).sum()) for column in ("image", "label")]
        for split, rows in local.items()
    }
    assert answers["public"] == expected
    assert answers["private"] == expected
    if streaming:
        assert answers["streamed"] == expected
    assert answers["private without a token"]["error"].startswith("org/private: ")
    assert len(answers["private without a token"]["error"].splitlines()) == 1
    reads = [request for request in hub.requests[sent_before:] if request.to_cdn]
    assert reads and all(request.authorization is None for request in reads)
    assert not holds_a_token(home)


def test_a_stranger_loads_the_dataset_without_this_package(hub, pusher, scenes, tmp_path):  # noqa: F811
    pusher.push(scenes, "org/plain")
    found = as_a_stranger(hub, tmp_path, STRANGER, "org/plain")
    assert found.pop("streamed") == ["RGB", "L"]
    assert found == {
        split: [len(rows)] + [int(np.asarray(rows[0][column], np.int64).sum()) for column in ("image", "label")]
        for split, rows in load_splits(scenes).items()
    }


def test_dataset_that_may_not_be_shared_sends_nothing(hub, pusher, restricted):  # noqa: F811
    sent_before = len(hub.requests)

    message = pusher.refusal(restricted, "org/kept")

    assert TERMS in message and "i_have_the_right" in message
    assert len(hub.requests) == sent_before
    assert "datasets/org/kept" not in hub.repos


@pytest.mark.parametrize("private, found", [(None, True), (True, True), (False, False)])
def test_with_the_right_to_share_it_is_private_unless_public_is_asked_for(hub, pusher, restricted, private, found):  # noqa: F811
    repo_id = f"org/right-{private}"
    pusher.push(restricted, repo_id, i_have_the_right=True, private=private)
    assert hub.repos[f"datasets/{repo_id}"].private is found


def test_terms_without_a_clear_yes_are_a_no(pusher, dataset):
    change_card(dataset, may_be_shared="only at home")
    assert "do not let you hand it on (its card gives none)" in pusher.refusal(dataset, "org/unclear")


def test_restricted_pixels_do_not_go_into_a_public_repository_that_exists(hub, pusher, restricted):  # noqa: F811
    pusher.push(restricted, "org/open", i_have_the_right=True, private=False)
    change_card(restricted, stride=32)

    message = pusher.refusal(restricted, "org/open", i_have_the_right=True)

    assert message.startswith("org/open: the repository is public, and the push is to be private")
    assert "or ask for a public push (--public, in Python private=False)" in message
    assert len(hub.repos["datasets/org/open"].commits) == 2


def test_check_refuses_what_the_push_would_refuse_and_makes_nothing(hub, pusher, scenes):  # noqa: F811
    # A conversion took hours, and its push ended in a refusal that could have been known before.
    pusher.push(scenes, "org/mine")
    repos, sent_before = dict(hub.repos), len(hub.requests)
    kept, right = {"may_be_shared": False, "terms": TERMS}, {"i_have_the_right": True}

    assert pusher.checked_refusal("nobody").startswith("'nobody' does not say whose repository it is")
    assert pusher.checked_refusal("org/new", token="a b").startswith("org/new: the token holds spaces")
    assert TERMS.rstrip(".") in pusher.checked_refusal("org/new", kept)
    assert len(hub.requests) == sent_before

    unknown = "hf_" + "unknown" * 5
    assert pusher.checked_refusal("org/new", token=unknown).startswith("org/new: the Hub does not know the token")
    assert pusher.checked_refusal("org/new", token=READ_TOKEN).startswith("org/new: the token may only read")
    assert pusher.checked_refusal("stranger/new").startswith("stranger/new: the token may not make it")
    assert pusher.checked_refusal("org/mine", kept, **right).startswith("org/mine: the repository is public")
    assert pusher.checked_refusal("org/mine", private=True).startswith("org/mine: the repository is public")
    assert pusher.checked_refusal("org/mine", {"name": "other"}).startswith("org/mine: holds something else")

    pusher.check("org/mine")
    pusher.check("org/mine", {"name": "other"}, overwrite=True)
    pusher.check("org/new")
    pusher.check("Org/new")  # names of owners do not differ by case
    pusher.check("tester/new", kept, private=False, **right)
    assert hub.repos == repos
    assert {request.method for request in hub.requests[sent_before:]} <= {"GET", "HEAD"}


def test_check_asks_again_after_a_failure_that_passes(hub, pusher):  # noqa: F811
    hub.fail("GET", "whoami", 503, times=2)
    pusher.check("org/new")
    assert all(failure.times == 0 for failure in hub.failures)


SCENE_OPTIONS = (
    "--dataset scenes --tile_size 64 --scene_size 64 --scenes_train 1 --scenes_validation 1 --scenes_test 0"
)


def test_script_asks_the_hub_before_it_prepares(hub, pusher, dataset, tmp_path):  # noqa: F811
    change_card(dataset, name="another")
    pusher.push(dataset, "org/script-taken")
    command = [*SCENE_OPTIONS.split(), "--output", tmp_path / "out", "--push_to_hub"]

    assert "org/script-taken: holds something else" in pusher.script_refusal(*command, "org/script-taken")
    assert "stranger/new: the token may not" in pusher.script_refusal(*command, "stranger/new")
    assert not (tmp_path / "out").exists()

    assert "uploaded to" in pusher.script(*command, "org/script-taken", "--overwrite")
    assert without_attributes(hub.repos["datasets/org/script-taken"].files) == contents(tmp_path / "out")


def test_script_uploads_what_is_prepared_without_preparing_it_again(hub, pusher, tmp_path):  # noqa: F811
    # After a push that failed, the same command said that the output exists, and only a whole new conversion helped.
    output = tmp_path / "out"
    command = [*SCENE_OPTIONS.split(), "--seed", 7, "--output", output, "--push_to_hub", "org/script-later"]
    hub.fail("POST", "org/script-later/commit/", 413)

    message = pusher.script_refusal(*command)
    assert message.endswith(
        f"; the dataset is complete in {output}, --push_only uploads it without preparing it again"
    )
    assert len(hub.repos["datasets/org/script-later"].commits) == 1
    prepared = contents(output)

    message = pusher.script_refusal(*command)
    assert f"{output}: exists already" in message and "--push_only" in message

    said = pusher.script("--push_only", "--output", output, "--push_to_hub", "org/script-later")
    assert said == f"uploaded to {hub.endpoint}/datasets/org/script-later\n"
    assert without_attributes(hub.repos["datasets/org/script-later"].files) == prepared == contents(output)


@pytest.mark.parametrize("words, expected", [
    (["--push_only"], "--push_only needs --push_to_hub"),
    ([], "give --dataset, one of potsdam, "),
    (["--push_only", "--push_to_hub", "org/none"], "there is no such folder"),
])  # fmt: skip
def test_script_says_what_an_upload_alone_needs(pusher, tmp_path, words, expected):
    message = pusher.script_refusal("--output", tmp_path / "none", *words)
    assert message.startswith("error: ") and expected in message


def test_new_version_leaves_no_shard_of_the_old_one_in_its_single_commit(hub, pusher, dataset, scenes):  # noqa: F811
    in_two_shards(dataset, "train")
    pusher.push(dataset, "org/versions")
    assert without_attributes(hub.repos["datasets/org/versions"].files) == contents(dataset)

    pusher.push(scenes, "org/versions")

    assert len(hub.repos["datasets/org/versions"].commits) == 3
    assert without_attributes(hub.repos["datasets/org/versions"].files) == contents(scenes)


def test_same_version_again_makes_no_commit(hub, pusher, scenes):  # noqa: F811
    pusher.push(scenes, "org/twice")
    uploads = len(hub.sent("PUT", "/upload/"))
    pusher.push(scenes, "org/twice")
    assert len(hub.repos["datasets/org/twice"].commits) == 2
    assert len(hub.sent("PUT", "/upload/")) == uploads


def test_repository_of_another_dataset_is_replaced_only_if_asked(hub, pusher, scenes, dataset):  # noqa: F811
    pusher.push(scenes, "org/taken")
    change_card(dataset, name="another")

    message = pusher.refusal(dataset, "org/taken")
    assert message.startswith("org/taken: holds something else already")
    assert len(hub.repos["datasets/org/taken"].commits) == 2

    pusher.push(dataset, "org/taken", overwrite=True)
    assert without_attributes(hub.repos["datasets/org/taken"].files) == contents(dataset)


@pytest.mark.parametrize("readme", [None, b"no head", b"---\nlicense: mit\n---\n", b"---\n[broken\n---\n"])
def test_repository_without_a_card_of_ours_is_not_touched(hub, pusher, scenes, readme):  # noqa: F811
    repo_id = f"org/foreign-{len(readme or b'')}"
    pusher.push(scenes, repo_id)
    files = hub.repos[f"datasets/{repo_id}"].files
    del files["README.md"]
    files |= {"README.md": readme} if readme else {}

    assert "holds something else already" in pusher.refusal(scenes, repo_id)
    assert len(hub.repos[f"datasets/{repo_id}"].commits) == 2


@pytest.mark.parametrize(
    "damage", ["no shard", "no card", "cut shard", "foreign card", "one shard of two", "old shard", "no folder"]
)
def test_incomplete_folder_sends_nothing(hub, pusher, dataset, damage):  # noqa: F811
    sent_before = len(hub.requests)
    (shard,) = (dataset / "data").glob("train-*.parquet")
    expected = str(dataset)
    if damage == "no shard":
        shard.unlink()
        expected = f"{dataset}: train has 0 of its 8 tiles"
    elif damage == "no card":
        (dataset / "README.md").unlink()
        expected = f"{dataset}: has no dataset card README.md"
    elif damage == "cut shard":
        shard.write_bytes(shard.read_bytes()[:-100])
        expected = f"{shard}: is damaged"
    elif damage == "foreign card":
        (dataset / "README.md").write_text("---\nlicense: mit\n---\n# Cats\n")
        expected = f"{dataset}: its card has no key 'segmentation'"
    elif damage == "one shard of two":
        in_two_shards(dataset, "train")
        (dataset / "data" / "train-00001-of-00002.parquet").unlink()
        expected = f"{dataset}: train has 4 of its 8 tiles"
    elif damage == "no folder":
        shutil.rmtree(dataset)
        expected = f"{dataset}: there is no such folder"
    else:
        shutil.copy(shard, dataset / "data" / "train-00001-of-00002.parquet")
        expected = f"{dataset}: train has 16 of its 8 tiles"

    assert pusher.refusal(dataset, "org/incomplete").startswith(expected)
    assert len(hub.requests) == sent_before


@pytest.mark.parametrize("method, path, how", [
    ("PUT", "/upload/", "cut"),
    ("POST", "/preupload/", 503),
    ("POST", "/commit/", 503),
    ("POST", "/commit/", "cut"),
    ("POST", "/commit/", "lost"),
    ("POST", "/repos/create", "lost"),
    ("GET", "/api/datasets/", 502),
])  # fmt: skip
def test_failure_that_passes_leaves_one_whole_commit(hub, pusher, dataset, method, path, how):  # noqa: F811
    # "lost": the Hub has done what was asked, and the answer did not come back; asked again it must not do it twice.
    repo_id = f"org/shaky-{method}{path.replace('/', '-')}-{how}".rstrip("-").replace("--", "-")
    change_card(dataset, name=repo_id)
    in_two_shards(dataset, "train")
    new_content(dataset, repo_id)
    hub.fail(method, path, how)

    pusher.push(dataset, repo_id)

    assert all(failure.times == 0 for failure in hub.failures)
    assert len(hub.repos[f"datasets/{repo_id}"].commits) == 2
    assert without_attributes(hub.repos[f"datasets/{repo_id}"].files) == contents(dataset)


@pytest.mark.parametrize("how", [503, "cut"])
def test_failure_that_stays_leaves_the_old_version_whole(hub, pusher, scenes, dataset, how):  # noqa: F811
    repo_id = f"org/stays-{how}"
    pusher.push(scenes, repo_id)
    in_two_shards(dataset, "train")
    hub.fail("POST", f"{repo_id}/commit/", how, times=3)

    message = pusher.refusal(dataset, repo_id)

    assert all(failure.times == 0 for failure in hub.failures)
    assert message.startswith(f"{repo_id}: {hub.endpoint} does not answer as it should")
    assert without_attributes(hub.repos[f"datasets/{repo_id}"].files) == contents(scenes)


def test_large_files_go_up_in_parts_where_the_hub_wants_it(hub, pusher, dataset, monkeypatch):  # noqa: F811
    in_two_shards(dataset, "train")
    new_content(dataset, "parts")
    size = 10_000
    monkeypatch.setattr(hub, "part_size", size)

    pusher.push(dataset, "org/parts")

    assert without_attributes(hub.repos["datasets/org/parts"].files) == contents(dataset)
    parts = sum(-(-len(content) // size) for path, content in contents(dataset).items() if path != "README.md")
    assert len(hub.sent("PUT", "/upload/[0-9a-f]+/[0-9]+$")) == parts > 6


@pytest.mark.parametrize("repo_id, options, expected", [
    ("org/new", {"token": READ_TOKEN}, "org/new: the token may not do this (You don't have the rights"),
    ("stranger/new", {}, "stranger/new: the token may not do this (You don't have the rights"),
    ("org/new", {"token": "hf_" + "unknown" * 5}, "org/new: the Hub does not know the token"),
    ("org/new", {"token": f"{TOKEN} and more"}, "org/new: the token holds spaces"),
    ("new", {}, "'new' does not say whose repository it is; give ORG/NAME"),
    ("org/new/er", {}, "'org/new/er' is no name of a repository"),
    ("org/-new", {}, "'org/-new' is no name of a repository"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_clear_line(hub, pusher, scenes, repo_id, options, expected):  # noqa: F811
    message = pusher.refusal(scenes, repo_id, **options)
    assert message.startswith(expected)
    assert options.get("token", TOKEN) not in message
    assert f"datasets/{repo_id}" not in hub.repos


def test_token_from_a_file_with_a_line_end_is_taken(hub, pusher, scenes):  # noqa: F811
    pusher.push(scenes, "org/line-end", token=f"{TOKEN}\n")
    assert len(hub.repos["datasets/org/line-end"].commits) == 2


def test_token_of_a_reader_does_not_write_into_a_repository_that_exists(hub, pusher, scenes, dataset):  # noqa: F811
    pusher.push(scenes, "org/readable")
    in_two_shards(dataset, "train")
    message = pusher.refusal(dataset, "org/readable", token=READ_TOKEN)
    assert message.startswith("org/readable: the token may not do this (This token may only read)")
    assert len(hub.repos["datasets/org/readable"].commits) == 2


@pytest.mark.parametrize("method, path", [("POST", "/info/lfs/objects/batch"), ("PUT", "/upload/")])
def test_full_storage_is_told_in_the_words_of_the_hub(hub, pusher, dataset, method, path):  # noqa: F811
    new_content(dataset, f"full {method}")
    hub.fail(method, path, 413)
    message = pusher.refusal(dataset, f"org/full-{method}")
    assert message.startswith(f"org/full-{method}: ") and "the test asked for 413" in message


def test_push_of_somebody_else_at_the_same_time_is_not_mixed_with_ours(hub, pusher, scenes, dataset):  # noqa: F811
    pusher.push(scenes, "org/busy")
    repo = hub.repos["datasets/org/busy"]
    theirs = replace(repo.commits[-1], id="f" * 40, files=repo.files | {"data/train-00001-of-00002.parquet": b"new"})
    in_two_shards(dataset, "train")
    hub.fail("POST", "org/busy/commit/", lambda: repo.commits.append(theirs))

    message = pusher.refusal(dataset, "org/busy")

    assert message.startswith("org/busy: the repository has changed meanwhile") and message.endswith("push again")
    assert repo.commits[-1] is theirs


def test_shard_that_a_gitignore_keeps_out_is_told(hub, pusher, scenes, dataset):  # noqa: F811
    pusher.push(scenes, "org/ignoring")
    in_two_shards(dataset, "train")
    hub.repos["datasets/org/ignoring"].files[".gitignore"] = b"data/train-00001-of-00002.parquet"
    message = pusher.refusal(dataset, "org/ignoring")
    assert message.startswith("org/ignoring: its .gitignore keeps data/train-00001-of-00002.parquet out")


def test_no_token_and_no_network_are_told(scenes, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    with pytest.raises(UserError, match="^org/new: no token for the Hub; run `hf auth login`"):
        push_dataset(scenes, "org/new")
    with pytest.raises(UserError, match="^org/new: the Hub is not asked while HF_HUB_OFFLINE is set"):
        push_dataset(scenes, "org/new", token=TOKEN)


def test_token_goes_to_the_hub_alone_and_into_no_log(hub, pusher, dataset):  # noqa: F811
    in_two_shards(dataset, "train")
    pusher.push(dataset, "org/secret", private=True)

    uploads = [request for request in hub.requests if request.to_cdn]
    assert uploads and all(request.authorization is None for request in uploads)
    assert all(TOKEN.encode() not in request.body for request in hub.requests)
    log = pusher.log.read_text()
    assert "org/secret" in log  # the client did log what it did
    assert TOKEN not in log and READ_TOKEN not in log
    assert not holds_a_token(pusher.home)
