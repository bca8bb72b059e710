"""A small Hugging Face Hub on 127.0.0.1: enough of its HTTP protocol for the unmodified `huggingface_hub` client.

It creates repositories, takes commits (small files inline, large ones by LFS, in one part or in several), and serves
files with ETag, commit id, ranges and redirects to a second host name that must never see a token. It keeps every
request and can fail on demand. Clients run in other processes (`HF_ENDPOINT` is read when the library is imported),
with the environment that `HubServer.environment` gives. Xet is off there: the client then speaks LFS.
"""

import base64
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

TOKEN = "hf_" + "TestTokenThatMayWrite" + "0" * 13
READ_TOKEN = "hf_" + "TestTokenThatMayRead" + "0" * 14
USER, ORGANISATION = "tester", "org"
# The client logs what it can, requests as curl commands. Its first versions fail to log a request, and with it.
VERBOSE = {"HF_HUB_VERBOSITY": "debug"} | ({} if version("huggingface_hub").startswith("1.") else {"HF_DEBUG": "1"})
LFS_SUFFIXES = (".parquet", ".safetensors", ".bin", ".png", ".tif")


@dataclass(frozen=True)
class Request:
    """What a client sent. `path` has no query."""

    method: str
    path: str
    authorization: str | None
    body: bytes

    @property
    def to_cdn(self) -> bool:
        return self.path.startswith(("/cdn/", "/upload/"))


@dataclass(frozen=True)
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Commit:
    """`files[path]` is the content; `lfs` names the paths that are stored by LFS."""

    id: str
    title: str
    files: dict[str, bytes]
    lfs: frozenset[str]


@dataclass
class Repo:
    kind: str  # models, datasets or spaces
    name: str
    private: bool
    commits: list[Commit]
    sdk: str | None = None  # of a Space

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1].files

    def find(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.id == revision), None)


@dataclass
class Failure:
    """What happens to the next `times` requests that match.

    `how` is the status of the answer; or "cut": the connection breaks before anything is done; or "lost": it breaks
    when everything is done; or a function that is called first, to change what the client believes to know.
    """

    method: str
    path: str
    how: int | str | Callable[[], None]
    times: int


class HubServer:
    """State of the Hub. Tests read `repos["datasets/org/name"]`, `requests` and `failures`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.failures: list[Failure] = []
        self.blobs: dict[str, bytes] = {}  # LFS objects by sha256
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_size: int | None = None  # above it, LFS objects must come in parts of this many bytes
        self.lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str | os.PathLike, token: str | None = TOKEN) -> dict[str, str]:
        """Environment of a client process: this Hub only, its own caches below `home`, no proxy, no one's token."""
        ours = ("HF_", "HUGGING_FACE_", "HUGGINGFACE_", "TRANSFORMERS_")
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(ours) and not name.lower().endswith("_proxy")
        }
        settings = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        }
        return kept | settings | ({"HF_TOKEN": token} if token else {})

    def fail(self, method: str, path: str, how: int | str | Callable[[], None], times: int = 1) -> None:
        """Let the next `times` requests whose path matches the regular expression fail, see `Failure`."""
        self.failures.append(Failure(method, path, how, times))

    def next_failure(self, method: str, path: str) -> int | str | Callable[[], None] | None:
        with self.lock:
            for failure in self.failures:
                if failure.times and failure.method == method and re.search(failure.path, path):
                    failure.times -= 1
                    return failure.how
        return None

    def sent(self, method: str, path: str) -> list[Request]:
        """The requests whose path matches the regular expression."""
        return [request for request in self.requests if request.method == method and re.search(path, request.path)]


class Client:
    """A process that answers a question a line by the program `code`; importing takes longer than most answers do.

    A question is [name, options] as JSON, an answer {"said": ...} or {"error": the line of a `UserError`}. What the
    process writes to stderr, with all logs of the Hub's client, stands in the file `log`.
    """

    def __init__(self, server: HubServer, folder: Path, code: str, *words: str):
        self.home, self.log = folder / "home", folder / "log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *words],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=client_environment(server, self.home, TOKEN),
            )

    def ask(self, question: str, **options) -> dict:
        print(json.dumps([question, options]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        assert answer, self.log.read_text()[-3000:]
        return json.loads(answer)

    def said(self, question: str, **options):
        answer = self.ask(question, **options)
        assert "said" in answer, answer
        return answer["said"]

    def refused(self, question: str, **options) -> str:
        answer = self.ask(question, **options)
        assert "error" in answer, answer
        assert len(answer["error"].splitlines()) == 1
        assert TOKEN not in answer["error"]
        return answer["error"]

    def close(self):
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def client_environment(server: HubServer, home: Path, token: str | None) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return server.environment(home, token) | {"PYTHONPATH": root} | VERBOSE


def as_a_stranger(server: HubServer, folder: Path, code: str, *words: str, token: str | None = None):
    """What the program `code` prints as its last line, JSON, in a new process of somebody who never had `drd_hf`.

    It has the installed packages, an empty cache, and nothing of this repository: neither PYTHONPATH nor the .pth files
    of editable installations count.
    """
    packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    head = f"import sys\nsys.path += {packages!r}\ntry:\n    import drd_hf\nexcept ImportError:\n    pass\nelse:\n    sys.exit('drd_hf')\n"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", head + code, *words],
        env=server.environment(folder / "home", token) | VERBOSE,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert TOKEN not in done.stdout + done.stderr
    assert not holds_a_token(folder)
    return json.loads(done.stdout.splitlines()[-1])


def holds_a_token(folder: Path) -> list[Path]:
    """The files of a folder in which a token stands."""
    contents = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return [path for path, content in contents.items() if TOKEN.encode() in content or READ_TOKEN.encode() in content]


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    yield server
    server.close()


def _json(content, status: int = 200, **headers: str) -> Response:
    return Response(status, json.dumps(content).encode(), {"Content-Type": "application/json"} | headers)


def _error(status: int, message: str, code: str | None = None, **headers: str) -> Response:
    headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}
    return _json({"error": message}, status, **headers)


def _oid(content: bytes, lfs: bool) -> str:
    """What the Hub calls a file: git's blob id of it, or its sha256 where it is in LFS."""
    return (
        hashlib.sha256(content).hexdigest() if lfs else hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    )


def _address(hub: HubServer, kind: str, name: str) -> str:
    return f"{hub.endpoint}/{'' if kind == 'models' else f'{kind}/'}{name}"


def _commit_id(repo: str, number: int) -> str:
    return hashlib.sha1(f"{repo} {number}".encode()).hexdigest()


def _entries(commit: Commit, folder: str = "", recursive: bool = True) -> list[dict]:
    """Files, and where they are not all below `folder`, the folders between."""
    prefix, entries, folders = f"{folder}/" if folder else "", [], set()
    for path, content in sorted(commit.files.items()):
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        folders |= {prefix + "/".join(parts[:i]) for i in range(1, len(parts)) if recursive or i == 1}
        if recursive or len(parts) == 1:
            entries.append(_file_entry(commit, path, content))
    return entries + [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]


def _file_entry(commit: Commit, path: str, content: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(content), "oid": _oid(content, False)}
    if path in commit.lfs:
        entry["lfs"] = {"oid": _oid(content, True), "size": len(content), "pointerSize": 130}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *args):
        pass

    def _handle(self):
        hub: HubServer = self.server.hub
        url = urlsplit(self.path)
        how = hub.next_failure(self.command, url.path)
        if how == "cut":
            self.rfile.read(min(1000, int(self.headers.get("Content-Length", 0))))
            return self._cut()
        if callable(how):
            how()
        request = Request(self.command, url.path, self.headers.get("Authorization"), self._body())
        with hub.lock:
            hub.requests.append(request)
            if isinstance(how, int):
                response = _error(how, f"the test asked for {how}")
            else:
                response = self._route(hub, request, parse_qs(url.query))
        if how == "lost":
            return self._cut()
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in response.headers:
            self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _cut(self):
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset, no goodbye
        self.connection.close()

    def _route(self, hub: HubServer, request: Request, query: dict[str, list[str]]) -> Response:
        path = request.path
        if path.startswith("/cdn/"):
            return self._content(hub.blobs[path.split("/")[2]])
        if path.startswith("/upload/"):
            return _receive(hub, request)
        if request.authorization not in (None, f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"):
            return _error(401, "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            if request.authorization is None:
                return _error(401, "Invalid username or password.")
            role = {"accessToken": {"displayName": "test", "role": "write" if _may_write(request) else "read"}}
            return _json({"type": "user", "name": USER, "orgs": [{"name": ORGANISATION}], "auth": role})
        if path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            return _create(hub, request)
        if match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/(batch|verify)", path):
            name = f"{match[1] or 'models/'}{match[2]}"
            return _with_repo(hub, request, name, lambda repo: _lfs(hub, request, repo, match[3]))
        if match := re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            name = f"{match[1] or 'models/'}{match[2]}"
            return _with_repo(
                hub, request, name, lambda repo: self._resolve(hub, repo, unquote(match[3]), unquote(match[4]))
            )
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)(?:/(.+))?", path):
            action, _, rest = (match[3] or "revision/main").partition("/")
            return _with_repo(
                hub, request, f"{match[1]}/{match[2]}", lambda repo: _api(hub, request, query, repo, action, rest)
            )
        return _error(404, f"Sorry, this test server has no {path}")

    def _resolve(self, hub: HubServer, repo: Repo, revision: str, path: str) -> Response:
        commit = repo.find(revision)
        if commit is None:
            return _error(404, "Invalid rev id", "RevisionNotFound")
        if path not in commit.files:
            return _error(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.id})
        content, headers = commit.files[path], {"X-Repo-Commit": commit.id}
        if path not in commit.lfs:
            return self._content(content, headers | {"ETag": f'"{_oid(content, False)}"'})
        oid = _oid(content, True)
        hub.blobs[oid] = content
        # Another host than the endpoint's, as the Hub's CDN is: a client must not take its token there.
        headers["Location"] = f"http://localhost:{hub.port}/cdn/{oid}?Signature=none"
        headers |= {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{oid}"'}
        return Response(302, b"", headers)

    def _content(self, content: bytes, headers: dict[str, str] | None = None) -> Response:
        """The whole content, or with a Range header a part of it."""
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{_oid(content, True)}"', **(headers or {})}
        match = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not match:
            return Response(200, content, headers | {"Content-Length": str(len(content))})
        first = int(match[1]) if match[1] else max(0, len(content) - int(match[2]))
        last = min(int(match[2]), len(content) - 1) if match[1] and match[2] else len(content) - 1
        if first >= len(content):
            return _error(416, "Range not satisfiable", **{"Content-Range": f"bytes */{len(content)}"})
        part = content[first : last + 1]
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Content-Length": str(len(part))}
        return Response(206, part, headers)


def _with_repo(hub: HubServer, request: Request, name: str, answer) -> Response:
    """`answer(repo)`, unless the client may not see the repository."""
    repo = hub.repos.get(unquote(name))
    if repo is None or (repo.private and request.authorization is None):
        return _error(404 if request.authorization else 401, "Repository not found", "RepoNotFound")
    return answer(repo)


def _may_write(request: Request) -> bool:
    return request.authorization == f"Bearer {TOKEN}"


def _create(hub: HubServer, request: Request) -> Response:
    content = json.loads(request.body)
    if request.authorization is None:
        return _error(401, "Invalid username or password.")
    owner = content.get("organization") or USER
    if not _may_write(request) or owner not in (USER, ORGANISATION):
        return _error(403, f"You don't have the rights to create a repo under the namespace {owner!r}")
    kind = f"{content.get('type') or 'model'}s"
    name = f"{kind}/{owner}/{content['name']}"
    url = _address(hub, kind, f"{owner}/{content['name']}")
    if kind == "spaces" and not content.get("sdk"):
        return _error(400, "a Space needs an sdk")
    if name in hub.repos:
        return _json({"error": "You already created this repo", "url": url}, 409)
    private = content.get("private", content.get("visibility") == "private")
    first = Commit(_commit_id(name, 0), "initial commit", {".gitattributes": b"*.parquet filter=lfs\n"}, frozenset())
    hub.repos[name] = Repo(kind, f"{owner}/{content['name']}", bool(private), [first], content.get("sdk"))
    return _json({"url": url, "name": f"{owner}/{content['name']}", "id": "0"})


def _api(
    hub: HubServer, request: Request, query: dict[str, list[str]], repo: Repo, action: str, rest: str
) -> Response:
    if action == "refs":
        head = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.commits[-1].id}
        return _json({"branches": [head], "converts": [], "tags": [], "pullRequests": []})
    revision, _, path = rest.partition("/")
    commit = repo.find(unquote(revision))
    if commit is None:
        return _error(404, f"Invalid rev id: {unquote(revision)}", "RevisionNotFound")
    if action == "revision":
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        facts = {"id": repo.name, "sha": commit.id, "private": repo.private, "siblings": siblings, "tags": []}
        return _json(facts | {"downloads": 0, "likes": 0, "disabled": False, "gated": False})
    if action == "commits":
        shown = [{"id": c.id, "title": c.title, "message": "", "authors": []} for c in reversed(repo.commits)]
        return _json([entry | {"date": "2024-01-01T00:00:00.000Z"} for entry in shown])
    if action == "tree":
        entries = _entries(commit, unquote(path), query.get("recursive", ["false"])[0].lower() == "true")
        return _json(entries) if entries or not path else _error(404, "Path not found", "EntryNotFound")
    if action == "paths-info":
        everything = {entry["path"]: entry for entry in _entries(commit)}
        wanted = parse_qs(request.body.decode())["paths"]
        return _json([everything[name.rstrip("/")] for name in wanted if name.rstrip("/") in everything])
    if not _may_write(request):
        return _error(403 if request.authorization else 401, "This token may only read")
    if action == "preupload":
        return _json({"files": [_preupload(commit, file) for file in json.loads(request.body)["files"]]})
    if action == "commit":
        return _commit(hub, request, repo)
    return _error(404, f"Sorry, this test server has no {request.path}")


def _preupload(commit: Commit, file: dict) -> dict:
    lfs = file["path"].endswith(LFS_SUFFIXES)
    there = commit.files.get(file["path"])
    oid = None if there is None else _oid(there, file["path"] in commit.lfs)
    ignored = file["path"] in commit.files.get(".gitignore", b"").decode().splitlines()
    return {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored, "oid": oid}


def _lfs(hub: HubServer, request: Request, repo: Repo, action: str) -> Response:
    if not _may_write(request):
        return _error(403, "This token may only read")
    content = json.loads(request.body)
    if action == "verify":
        stored = hub.blobs.get(content["oid"])
        right = stored is not None and len(stored) == content["size"]
        return _json({}) if right else _error(404, "the object was not uploaded")
    objects = []
    for wanted in content["objects"]:
        oid, size = wanted["oid"], wanted["size"]
        entry = {"oid": oid, "size": size, "authenticated": True}
        if oid not in hub.blobs:
            url = f"http://localhost:{hub.port}/upload/{oid}"
            header = {}
            if hub.part_size and size > hub.part_size:
                count = -(-size // hub.part_size)
                header = {"chunk_size": str(hub.part_size)} | {f"{i + 1:05d}": f"{url}/{i + 1}" for i in range(count)}
            base = hub.endpoint + request.path.removesuffix("/batch")
            entry["actions"] = {"upload": {"href": url, "header": header}, "verify": {"href": f"{base}/verify"}}
        objects.append(entry)
    multipart = any("chunk_size" in entry.get("actions", {}).get("upload", {}).get("header", {}) for entry in objects)
    return _json({"transfer": "multipart" if multipart else "basic", "objects": objects})


def _receive(hub: HubServer, request: Request) -> Response:
    """A whole LFS object, one part of it, or the list of its parts that says that it is complete."""
    _, _, oid, *part = request.path.split("/")
    if part:
        hub.parts.setdefault(oid, {})[int(part[0])] = request.body
        return Response(200, b"", {"ETag": f'"{hashlib.md5(request.body).hexdigest()}"'})
    content = request.body
    if request.method == "POST":
        parts = hub.parts.pop(oid)
        content = b"".join(parts[entry["partNumber"]] for entry in json.loads(request.body)["parts"])
    if hashlib.sha256(content).hexdigest() != oid:
        return _error(400, "the content does not have the announced sha256")
    hub.blobs[oid] = content
    return _json({})


def _commit(hub: HubServer, request: Request, repo: Repo) -> Response:
    lines = [json.loads(line) for line in request.body.splitlines()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    head = repo.commits[-1]
    if header.get("parentCommit") not in (None, head.id):
        return _error(412, "A commit has happened since. Please refresh and try again.")
    files, lfs = dict(head.files), set(head.lfs)
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "file":
            files[value["path"]] = base64.b64decode(value["content"])
            lfs.discard(value["path"])
        elif key == "lfsFile":
            if value["oid"] not in hub.blobs:
                return _error(400, f"{value['path']}: the LFS object does not exist")
            files[value["path"]] = hub.blobs[value["oid"]]
            lfs.add(value["path"])
        elif key == "deletedFile":
            if value["path"] not in files:
                return _error(404, "A file with this name doesn't exist", "EntryNotFound")
            del files[value["path"]]
            lfs.discard(value["path"])
        elif key != "header":
            return _error(400, f"this test server does not know the operation {key}")
    new = Commit(_commit_id(f"{repo.kind}/{repo.name}", len(repo.commits)), header["summary"], files, frozenset(lfs))
    repo.commits.append(new)
    url = f"{_address(hub, repo.kind, repo.name)}/commit/{new.id}"
    return _json({"success": True, "commitUrl": url, "commitOid": new.id})
