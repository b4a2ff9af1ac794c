"""A Hub for tests: repositories with commits, its API, and storage on another host. A test has
huggingface_hub use it.

Weights and large files lie in storage, to which the Hub leads by signed addresses. Others it gives itself,
whole, behind a redirect to a path of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, quote, unquote, urlsplit

import pytest
from huggingface_hub import constants

from .http_server import Server

STORAGE_HOST = "127.0.0.2"
LARGE_BYTES = 100_000
_numbers = itertools.count(1)


@contextlib.contextmanager
def huggingface_hub_online() -> Iterator[None]:
    """While it lasts, huggingface_hub asks its Hub in this process. Other tests make it offline before they
    import transformers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield


@dataclass
class Call:
    """A request, and how to answer it."""

    handler: BaseHTTPRequestHandler
    method: str
    target: str
    headers: dict[str, str]

    @property
    def path(self) -> str:
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        return {name: values[0] for name, values in parse_qs(urlsplit(self.target).query).items()}

    @property
    def is_resolve(self) -> bool:
        return "/resolve/" in self.path

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.handler.send_header(name, value)
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(body)

    def refuse(self, status: int, code: str, headers: Mapping[str, str] | None = None) -> None:
        said = {"X-Error-Code": code, "X-Error-Message": "as the test wants it"} if code else {}
        self.answer(status, b"{}", {**said, **(headers or {})})


Hook = Callable[[Call], bool]


@dataclass
class Repository:
    gated: bool = False
    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def find(self, revision: str) -> str | None:
        found = self.refs.get(revision, revision)
        return found if found in self.commits else None


class HubServer:
    """Hooks that return True have answered. `asked` and `stored` are the requests of both servers."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.renamed: dict[str, str] = {}
        self.tokens: set[str] = set()
        self.page_size = 1000
        self.signature = "first"
        """What storage accepts."""
        self.valid_seconds = 3600
        self.hooks: list[Hook] = []
        self.storage_hooks: list[Hook] = []
        self.asked: list[Call] = []
        self.stored: list[Call] = []
        self._blobs: dict[str, bytes] = {}
        self._hub = _serve("127.0.0.1", self._answer, self.asked, self.hooks)
        self._storage = _serve(STORAGE_HOST, self._answer_stored, self.stored, self.storage_hooks)
        self.url = f"http://127.0.0.1:{self._hub.server_port}"
        self.storage_url = f"http://{STORAGE_HOST}:{self._storage.server_port}"

    def commit(
        self, repository: str, files: Mapping[str, bytes], *, ref: str = "main", rewrite: bool = False
    ) -> str:
        """These files and those that the branch had. With `rewrite` there are no other commits afterwards."""
        repo = self.repositories.setdefault(repository, Repository())
        before = repo.commits.get(repo.refs.get(ref, ""), {})
        sha = hashlib.sha1(f"{repository} {next(_numbers)}".encode()).hexdigest()
        if rewrite:
            repo.commits.clear()
            self._blobs.clear()
        repo.commits[sha] = {**before, **files}
        repo.refs[ref] = sha
        for one in self.repositories.values():
            for content in (content for tree in one.commits.values() for content in tree.values()):
                self._blobs[hashlib.sha256(content).hexdigest()] = content
        return sha

    def asks(self, part: str) -> int:
        """How many requests to the Hub had that in their path."""
        return sum(part in call.path for call in self.asked)

    def expire(self) -> None:
        """Addresses that were given out are good no more."""
        self.signature += "x"

    def close(self) -> None:
        for server in (self._hub, self._storage):
            server.shutdown()
            server.server_close()

    # ---- the Hub --------------------------------------------------------------------------------

    def _answer(self, call: Call) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)", call.path):
            self._about(call, match[1], "revision", "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", call.path):
            self._about(call, match[1], match[2], unquote(match[3]))
        elif match := re.fullmatch(r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", call.path):
            self._small(call, match[1], match[2], unquote(match[3]))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", call.path):
            self._resolve(call, match[1], unquote(match[2]), unquote(match[3]))
        else:
            call.refuse(404, "")

    def _open(self, call: Call, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """The commit and its files; None where the answer was an error."""
        if name in self.renamed:
            call.answer(307, b"", {"Location": call.target.replace(name, self.renamed[name], 1)})
            return None
        token = call.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.tokens:
            call.refuse(401, "")
            return None
        repo = self.repositories.get(name)
        if repo is None or (repo.private and not token):
            call.refuse(404 if token else 401, "RepoNotFound")
        elif repo.gated and not token and "/api/models/" not in call.path:
            call.refuse(401, "GatedRepo")
        elif (sha := repo.find(revision)) is None:
            call.refuse(404, "RevisionNotFound")
        else:
            return sha, repo.commits[sha]
        return None

    def _about(self, call: Call, name: str, what: str, revision: str) -> None:
        opened = self._open(call, name, revision)
        if opened is None:
            return
        sha, files = opened
        if what == "revision":
            siblings = [{"rfilename": path} for path in files]
            about = {"_id": "1", "id": name, "sha": sha, "siblings": siblings}
            call.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
            return
        items = [*_directories(files), *(_item(path, content) for path, content in files.items())]
        start = int(call.query.get("cursor", "0"))
        headers = {"Content-Type": "application/json"}
        if start + self.page_size < len(items):
            following = f"{self.url}{call.path}?recursive=true&expand=false&cursor={start + self.page_size}"
            headers["Link"] = f'<{following}>; rel="next"'
        call.answer(200, json.dumps(items[start : start + self.page_size]).encode(), headers)

    def _resolve(self, call: Call, name: str, revision: str, path: str) -> None:
        opened = self._open(call, name, revision)
        if opened is None:
            return
        sha, files = opened
        content = files.get(path)
        if content is None:
            call.refuse(404, "EntryNotFound")
            return
        about = {"X-Repo-Commit": sha}
        if not _is_large(path, content):
            call.answer(
                307, b"", {**about, "Location": f"/api/resolve-cache/models/{name}/{sha}/{quote(path)}"}
            )
            return
        digest = hashlib.sha256(content).hexdigest()
        expires = int(time.time()) + self.valid_seconds
        location = f"{self.storage_url}/blobs/{digest}?Expires={expires}&Signature={self.signature}"
        about |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": f'"{digest}"', "Location": location}
        call.answer(302, b"Found", about)

    def _small(self, call: Call, name: str, sha: str, path: str) -> None:
        opened = self._open(call, name, sha)
        if opened is not None:
            content = opened[1][path]
            call.answer(200, content, {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"'})

    # ---- its storage ----------------------------------------------------------------------------

    def _answer_stored(self, call: Call) -> None:
        digest = call.path.rpartition("/")[2]
        content = self._blobs.get(digest)
        if call.query.get("Signature") != self.signature or content is None:
            call.answer(403, b"<Error><Code>AccessDenied</Code></Error>")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", call.headers.get("range", ""))
        if asked is None:
            call.answer(200, content, {"ETag": f'"{digest}"'})
            return
        start, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if start > last:
            call.answer(416, b"")
            return
        call.answer(
            206,
            content[start : last + 1],
            {"ETag": f'"{digest}"', "Content-Range": f"bytes {start}-{last}/{len(content)}"},
        )


def _is_large(path: str, content: bytes) -> bool:
    return path.endswith(".safetensors") or len(content) >= LARGE_BYTES


def git_oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _item(path: str, content: bytes) -> dict[str, object]:
    item: dict[str, object] = {
        "type": "file",
        "oid": git_oid(content),
        "size": len(content),
        "path": path,
    }
    if _is_large(path, content):
        item["oid"] = hashlib.sha1(path.encode()).hexdigest()  # of the pointer
        item["lfs"] = {
            "oid": hashlib.sha256(content).hexdigest(),
            "size": len(content),
            "pointerSize": 134,
        }
    return item


def _directories(files: Mapping[str, bytes]) -> list[dict[str, object]]:
    found = sorted({path.rpartition("/")[0] for path in files} - {""})
    return [
        {"type": "directory", "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0, "path": path}
        for path in found
    ]


def _serve(host: str, answer: Callable[[Call], None], asked: list[Call], hooks: list[Hook]) -> Server:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            call = Call(self, self.command, self.path, headers)
            asked.append(call)
            if not any(hook(call) for hook in list(hooks)):
                answer(call)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = Server((host, 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server
