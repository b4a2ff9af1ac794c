"""A small HTTP server in a thread that serves objects by ranges, as S3 does, and records what it is asked."""

from __future__ import annotations

import functools
import re
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

from .http_server import Server

Hook = Callable[["Asked"], bool]


@functools.cache
def _loader(data_path: str | None) -> Any:
    from botocore import loaders

    return loaders.create_loader(data_path)


def share_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """botocore's description of S3 is parsed once for all tests of this process, not for each session: 55 ms
    of the 66 that a client costs."""
    monkeypatch.setattr("botocore.session.create_loader", _loader)


@dataclass
class Asked:
    """A request, and how to answer it otherwise."""

    handler: BaseHTTPRequestHandler
    method: str
    target: str
    headers: dict[str, str]

    @property
    def key(self) -> str:
        """Of a path-style target."""
        return unquote(urlsplit(self.target).path).split("/", 2)[2]

    @property
    def range(self) -> tuple[int, int]:
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["range"])
        assert match is not None
        return int(match[1]), int(match[2])

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.end_headers()
        if self.method != "HEAD":
            self.handler.wfile.write(body)

    def fail(self, status: int, code: str, **headers: str) -> None:
        self.answer(
            status, f"<Error><Code>{code}</Code></Error>".encode(), x_amz_request_id="REQ1", **headers
        )


@dataclass
class ObjectServer:
    """Objects by key, whatever the bucket. A hook that returns True has answered."""

    objects: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)
    hooks: list[Hook] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    """For an HTTPS server."""

    def __post_init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._serve(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = Server(("127.0.0.1", 0), Handler)
        if self.tls is not None:
            self._server.socket = self.tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"{'https' if self.tls else 'http'}://127.0.0.1:{self._server.server_port}"

    def put(self, key: str, content: bytes, *, etag: str | None = None) -> None:
        self.objects[key] = content
        self.etags[key] = f'"{hash(content) & 0xFFFFFFFF:x}"' if etag is None else etag

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        headers = {name.lower(): value for name, value in handler.headers.items()}
        asked = Asked(handler, handler.command, handler.path, headers)
        self.asked.append(asked)
        if any(hook(asked) for hook in list(self.hooks)):
            return
        content = self.objects.get(asked.key)
        if content is None:
            asked.fail(404, "NoSuchKey")
            return
        etag = self.etags[asked.key]
        if headers.get("if-match", etag) != etag:
            asked.fail(412, "PreconditionFailed")
            return
        about = {"ETag": etag} if etag else {}
        if asked.method == "HEAD":
            asked.answer(200, content, **about)
            return
        start, last = asked.range
        if start >= len(content):
            asked.fail(416, "InvalidRange")
            return
        part = content[start : last + 1]
        about["Content_Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        asked.answer(206, part, **about)
