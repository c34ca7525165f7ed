"""A small Hub on loopback, for tests that push and load with the real clients and without a network.

It speaks what huggingface_hub, transformers, diffusers and datasets ask of a Hub: user, repositories of models and data
sets, preupload, large files, atomic commits, tags, file lists, and downloads with ranges. It keeps every request, and
answers some of them wrongly, late or not at all when a test asks for it. It does not speak Xet: clients run without.
"""

import base64
import contextlib
import dataclasses
import hashlib
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
TOKEN = "hf_" + "CanaryTokenThatMustNeverBeShown123"
LARGE_FILE = re.compile(r"\.(safetensors|bin|pt|png|jpg|parquet|arrow|zip|gz)$")
LARGE_TEXT = 10_000_000  # bytes from which any file is a large one

Files = dict[str, bytes]  # path -> content


@dataclasses.dataclass
class Request:
    """What a client sent; the names of headers are in lower case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes

    @property
    def has_token(self) -> bool:
        """Whether the user's token came with it."""
        return self.headers.get("authorization") == f"Bearer {TOKEN}"


@dataclasses.dataclass
class Answer:
    """What the server sends back; anything but bytes goes as JSON."""

    body: Any
    status: int = 200
    headers: dict[str, str] = dataclasses.field(default_factory=dict)


class Refusal(Exception):
    """An error answer, with the code that clients turn into their exceptions."""

    def __init__(self, status: int, code: str, message: str, **headers: str) -> None:
        """Make the answer."""
        super().__init__(message)
        fields = {"X-Error-Code": code, "X-Error-Message": message, **headers}
        self.answer = Answer({"error": message}, status, fields)


@dataclasses.dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD path" matches `pattern`."""

    pattern: str
    times: int
    status: int
    delay: float
    drop: str


class Repository:
    """The history of one repository; each commit is the state of all files."""

    def __init__(self, private: bool) -> None:
        """Start with an empty commit."""
        self.private = private
        self.commits: dict[str, Files] = {}
        self.messages: list[str] = []
        self.tags: dict[str, str] = {}
        self.head = ""
        self.commit({}, "initial commit")

    def commit(self, files: Files, message: str) -> str:
        """Make `files` the newest state and return its id."""
        self.head = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[self.head] = files
        self.messages.append(message)
        return self.head

    def resolve(self, revision: str) -> str:
        """The commit id of a branch, a tag or a commit."""
        commit = self.head if revision == "main" else self.tags.get(revision, revision)
        if commit not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"no revision {revision}")
        return commit


class Hub:
    """The state of the server; tests read it, and use `fail` to make requests go wrong."""

    def __init__(self) -> None:
        """Take a free port."""
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.read_only: set[str] = set()
        self.large_files: Files = {}  # SHA-256 -> content
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self._home = tempfile.TemporaryDirectory(prefix="hub_home_")
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def environment(self) -> dict[str, str]:
        """The environment of a client process: this process's, without its own Hub settings, pointed at this server."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        own = {"HF_ENDPOINT": self.url, "HF_TOKEN": TOKEN, "HF_HOME": self._home.name, "NO_PROXY": "127.0.0.1"}
        off = ("XET", "TELEMETRY", "UPDATE_CHECK", "PROGRESS_BARS")
        return kept | own | {f"HF_HUB_DISABLE_{name}": "1" for name in off}

    def fail(self, pattern: str, *, times: int = 1, status: int = 0, delay: float = 0.0, drop: str = "") -> None:
        """Make requests go wrong.

        Args:
            pattern: regular expression that is searched for in "METHOD path".
            times: number of requests that it happens to.
            status: answer with this status code. 0 = do not.
            delay: seconds to wait first.
            drop: close the connection without an answer, "before" or "after" doing what was asked. "" = do not.
        """
        self.faults.append(Fault(pattern, times, status, delay, drop))

    def model(self, repo_id: str) -> Repository:
        """A model's history."""
        return self.repositories["models", repo_id]

    def files(self, repo_id: str) -> Files:
        """A model's newest files."""
        return self.model(repo_id).commits[self.model(repo_id).head]

    def sent(self, pattern: str) -> list[Request]:
        """The requests so far whose "METHOD path" matches."""
        return [request for request in self.requests if re.search(pattern, f"{request.method} {request.path}")]

    def stop(self) -> None:
        """Stop serving."""
        self.server.shutdown()
        self.server.server_close()
        self._home.cleanup()


def start_hub() -> Hub:
    """Serve on a free port of 127.0.0.1 until `stop` is called."""
    hub = Hub()
    threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    return hub


# ---------------------------------------------------------------------------------------------------------------------
# Routes: each takes the hub, the request and the named parts of its path, and returns the answer.

ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Answer]]] = []
API = r"/api/(?P<kind>models|datasets)/(?P<repo_id>[^/]+/[^/]+)"
FILE = r"/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+)"


def _route(method: str, path: str) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        ROUTES.append((method, re.compile(path), function))
        return function

    return register


@_route("GET", "/api/whoami-v2")
def _whoami(hub: Hub, request: Request) -> Answer:
    _require_token(request)
    token = {"accessToken": {"role": "write"}}
    return Answer({"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": token})


@_route("POST", "/api/repos/create")
def _create_repository(hub: Hub, request: Request) -> Answer:
    _require_token(request)
    asked = json.loads(request.body)
    kind, owner = asked.get("type", "model") + "s", asked.get("organization") or USER
    repo_id = f"{owner}/{asked['name']}"
    answer = {"url": f"{hub.url}/{'' if kind == 'models' else 'datasets/'}{repo_id}", "name": repo_id}
    if (kind, repo_id) in hub.repositories:
        return Answer({"error": "You already created this repository", **answer}, 409)
    if owner != USER:
        raise Refusal(403, "Forbidden", f"You have no rights to create a repository of {owner}")
    hub.repositories[kind, repo_id] = Repository(private=asked.get("visibility") == "private")
    return Answer(answer)


@_route("POST", "/api/validate-yaml")
def _validate_card(hub: Hub, request: Request) -> Answer:
    return Answer({"errors": [], "warnings": []})


@_route("GET", f"{API}/auth-check(?P<write>/write)?")
def _check_permission(hub: Hub, request: Request, kind: str, repo_id: str, write: str) -> Answer:
    _repository(hub, request, kind, repo_id, write=bool(write))
    return Answer({})


@_route("GET", f"{API}(/revision/(?P<revision>[^/]+))?")
def _describe(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id)
    commit = repository.resolve(revision or "main")
    date = "2026-01-01T00:00:00.000Z"
    facts = {"id": repo_id, "sha": commit, "private": repository.private, "lastModified": date, "createdAt": date}
    unused = {"tags": [], "downloads": 0, "likes": 0, "gated": False, "disabled": False}
    return Answer({**facts, **unused, "siblings": [{"rfilename": path} for path in sorted(repository.commits[commit])]})


@_route("GET", f"{API}/refs")
def _list_references(hub: Hub, request: Request, kind: str, repo_id: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id)
    branches = [{"name": "main", "ref": "refs/heads/main", "targetCommit": repository.head}]
    tags = [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit} for tag, commit in repository.tags.items()]
    return Answer({"branches": branches, "tags": tags, "converts": []})


@_route("GET", f"{API}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?")
def _list_files(hub: Hub, request: Request, kind: str, repo_id: str, revision: str, folder: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id)
    commit = repository.resolve(revision)
    prefix = folder.rstrip("/") + "/" if folder else ""
    recursive = request.query.get("recursive", [""])[0].lower() in ("true", "1")
    entries: dict[str, dict[str, Any]] = {}
    for path, content in sorted(repository.commits[commit].items()):
        parts = path.removeprefix(prefix).split("/")
        if not path.startswith(prefix):
            continue
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            name = prefix + "/".join(parts[:depth])
            entries[name] = {
                "type": "directory",
                "path": name,
                "size": 0,
                "oid": hashlib.sha1(name.encode()).hexdigest(),
            }
        if recursive or len(parts) == 1:
            entries[path] = _entry(path, content)
    if prefix and not entries:
        raise Refusal(404, "EntryNotFound", f"no folder {folder}")
    return Answer(list(entries.values()))


@_route("POST", f"{API}/paths-info/(?P<revision>[^/]+)")
def _describe_paths(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id)
    files = repository.commits[repository.resolve(revision)]
    entries = []
    for path in (path.rstrip("/") for path in parse_qs(request.body.decode()).get("paths", [])):
        if path in files:
            entries.append(_entry(path, files[path]))
        elif any(name.startswith(f"{path}/") for name in files):
            entries.append({"type": "directory", "path": path, "size": 0, "oid": "0" * 40})
    return Answer(entries)


@_route("POST", f"{API}/preupload/(?P<revision>[^/]+)")
def _sort_by_size(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id, write=True)
    present = repository.commits[repository.resolve(revision)]
    modes = []
    for file in json.loads(request.body)["files"]:
        path = file["path"]
        mode = {
            "path": path,
            "uploadMode": "lfs" if _is_large(path, file["size"]) else "regular",
            "shouldIgnore": False,
        }
        modes.append(mode | ({"oid": _oid(path, present[path])} if path in present else {}))
    return Answer({"files": modes})


@_route("POST", FILE + r"\.git/info/lfs/objects/batch")
def _plan_large_files(hub: Hub, request: Request, kind: str, repo_id: str) -> Answer:
    _repository(hub, request, kind, repo_id, write=True)
    plans = json.loads(request.body)["objects"]
    for plan in plans:
        if plan["oid"] not in hub.large_files:
            # Signed as on the real Hub, whose storage takes no token.
            plan["actions"] = {"upload": {"href": f"{hub.url}/large-files/{plan['oid']}?signature=secret"}}
    return Answer({"transfer": "basic", "objects": plans})


@_route("PUT", "/large-files/(?P<oid>[0-9a-f]{64})")
def _store_large_file(hub: Hub, request: Request, oid: str) -> Answer:
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise Refusal(400, "BadRequest", "the content has another checksum")
    hub.large_files[oid] = request.body
    return Answer({})


@_route("POST", f"{API}/commit/(?P<revision>[^/]+)")
def _commit(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id, write=True)
    header, *changes = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    if header["value"].get("parentCommit", repository.head) != repository.head:
        raise Refusal(412, "PreconditionFailed", "A commit has happened since. Please refresh and try again.")
    files = dict(repository.commits[repository.resolve(revision)])
    for change in changes:
        action, value = change["key"], change["value"]
        if action == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif action == "lfsFile" and value["oid"] in hub.large_files:
            files[value["path"]] = hub.large_files[value["oid"]]
        elif action in ("deletedFile", "deletedFolder"):
            gone = value["path"].rstrip("/")
            files = {
                path: content for path, content in files.items() if path != gone and not path.startswith(f"{gone}/")
            }
        else:
            raise Refusal(400, "BadRequest", f"cannot apply {action} of {value.get('path')}")
    commit = repository.commit(files, header["value"]["summary"])
    return Answer({"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo_id}/commit/{commit}"})


@_route("POST", f"{API}/tag/(?P<revision>[^/]+)")
def _tag(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id, write=True)
    tag = json.loads(request.body)["tag"]
    if tag in repository.tags:
        raise Refusal(409, "Conflict", f"the tag {tag} exists")
    repository.tags[tag] = repository.resolve(revision)
    return Answer({})


@_route("GET", FILE + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def _download(hub: Hub, request: Request, kind: str, repo_id: str, revision: str, path: str) -> Answer:
    repository = _repository(hub, request, kind, repo_id)
    commit = repository.resolve(revision)
    if path not in repository.commits[commit]:
        raise Refusal(404, "EntryNotFound", f"no file {path}", **{"X-Repo-Commit": commit})
    content = repository.commits[commit][path]
    headers = {"ETag": f'"{_oid(path, content)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    if _is_large(path, len(content)):
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(content))}
    if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))):
        return Answer(content, 200, headers)
    first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Answer(content[first : last + 1], 206, headers)


def _require_token(request: Request) -> None:
    if not request.has_token:
        raise Refusal(401, "Unauthorized", "Invalid credentials in Authorization header")


def _repository(hub: Hub, request: Request, kind: str, repo_id: str, *, write: bool = False) -> Repository:
    repository = hub.repositories.get(((kind or "models").rstrip("/"), repo_id))
    if repository is None or (repository.private and not request.has_token):
        raise Refusal(404 if request.has_token else 401, "RepoNotFound", "Repository not found")
    if write:
        _require_token(request)
        if repo_id in hub.read_only:
            raise Refusal(403, "Forbidden", "You have no write access to this repository")
    return repository


def _is_large(path: str, size: int) -> bool:
    return bool(LARGE_FILE.search(path)) or size >= LARGE_TEXT


def _oid(path: str, content: bytes) -> str:
    if _is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # what git calls it


def _entry(path: str, content: bytes) -> dict[str, Any]:
    oid, size = _oid(path, content), len(content)
    large = {"lfs": {"oid": oid, "size": size, "pointerSize": 130}} if _is_large(path, size) else {}
    return {"type": "file", "path": path, "size": size, "oid": oid[:40], **large}


# ---------------------------------------------------------------------------------------------------------------------
# HTTP


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *values: object) -> None:
        """Print nothing."""

    def _serve(self) -> None:
        url = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, self._read_body())
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = self._next_fault(request)
        time.sleep(fault.delay)
        if fault.drop != "before":
            answer = _failure(request, fault.status) if fault.status else self._answer(request)
        if fault.drop:
            self.close_connection = True
        else:
            self._send(answer)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _next_fault(self, request: Request) -> Fault:
        for fault in self.hub.faults:
            if fault.times > 0 and re.search(fault.pattern, f"{request.method} {request.path}"):
                fault.times -= 1
                return fault
        return Fault("", 0, 0, 0.0, "")

    def _answer(self, request: Request) -> Answer:
        wanted = "GET" if request.method == "HEAD" else request.method
        for method, pattern, function in ROUTES:
            if method == wanted and (match := pattern.fullmatch(request.path)):
                parts = {name: unquote(value or "") for name, value in match.groupdict().items()}
                try:
                    with self.hub.lock:
                        return function(self.hub, request, **parts)
                except Refusal as refusal:
                    return refusal.answer
        return Answer({"error": f"no route for {request.method} {request.path}"}, 404)

    def _send(self, answer: Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        default = {"Content-Type": "application/octet-stream" if body is answer.body else "application/json"}
        self.send_response(answer.status)
        for name, value in (default | answer.headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        with contextlib.suppress(ConnectionError):  # the client may have gone while it was kept waiting
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else body)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def _failure(request: Request, status: int) -> Answer:
    if status >= 500:  # what a gateway in front of the Hub sends
        return Answer(b"<html>out of order</html>", status, {"Content-Type": "text/html"})
    # A careless server that repeats what it was sent: clients must not show it.
    return Answer({"error": f"refused: {request.headers.get('authorization')}"}, status)
