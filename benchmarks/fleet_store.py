"""A store for `fleet.py`, in the same process, with the ranges, lists, versions and conditions of S3.

It serves `benchmarks/.data`, and records all requests. All nodes share a limited rate. It may refuse requests
when there are too many at once. It does not check signatures, and tells nodes apart by their access keys.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import BinaryIO

from benchmarks import objects
from benchmarks.fleet_formulas import Count

LIST, INDEX, WEIGHTS = "list", "index", "weights"
_PART_BYTES = 256 << 10
_ACCESS_KEY = re.compile(r"Credential=([^/]+)/")
_REFUSAL = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


@dataclass(frozen=True, slots=True)
class Request:
    """A request, recorded when its answer begins."""

    node: int
    kind: str
    method: str
    status: int
    body_bytes: int
    """Of an object, that the answer has; 0 for lists."""
    at: float
    """When it arrived, by the monotonic clock."""


def count(requests: Sequence[Request]) -> Count:
    """Those that were not refused."""
    served = [request for request in requests if request.status < 300]
    asked = [request for request in served if request.kind != LIST]
    return Count(
        lists=len(served) - len(asked),
        heads=sum(request.method == "HEAD" for request in asked),
        gets=sum(request.method == "GET" for request in asked),
        body_bytes=sum(request.body_bytes for request in asked),
    )


def refused(requests: Sequence[Request]) -> int:
    return sum(request.status == 503 for request in requests)


def node_of(authorization: str) -> int:
    """The number in an access key of `FleetStore.environment`."""
    found = _ACCESS_KEY.search(authorization)
    if found is None:
        raise ValueError("a request without a signature; the daemons of a fleet sign theirs")
    return int(found[1].removeprefix("AKIAFLEET"))


class _Link:
    """A rate that all connections share, first come, first served."""

    def __init__(self, rate_bytes: float) -> None:
        self._rate_bytes = rate_bytes
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pass_through(self, size_bytes: int) -> None:
        with self._lock:
            self._free_at = max(time.monotonic(), self._free_at) + size_bytes / self._rate_bytes
            wait_seconds = self._free_at - time.monotonic()
        time.sleep(max(0.0, wait_seconds))


class FleetStore:
    """Serves until the context ends."""

    def __init__(self, rate_bytes: float) -> None:
        self.most_at_once = 1 << 30
        """Requests for objects; more are refused."""
        self.peak = 0
        """Of requests for objects at once, since `reset`."""
        self._link = _Link(rate_bytes)
        self._lock = threading.Lock()
        self._requests: list[Request] = []
        self._at_once = 0
        self._version = 0
        self._connections: set[socket.socket] = set()

    @property
    def endpoint(self) -> str:
        host, port = self._listener.getsockname()
        return f"http://{host}:{port}"

    def environment(self, node: int, proxy: str = "") -> dict[str, str]:
        """For the daemon of that node, which asks through the proxy if there is one."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": f"AKIAFLEET{node:011}",
            "AWS_SECRET_ACCESS_KEY": "benchmarks-only",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            # Lower case comes first for those who read both.
            "HTTP_PROXY": proxy,
            "http_proxy": proxy,
            "NO_PROXY": "" if proxy else "127.0.0.1",
            "no_proxy": "" if proxy else "127.0.0.1",
        }

    def requests(self) -> list[Request]:
        """All since `reset`, in the order in which they arrived."""
        with self._lock:
            return sorted(self._requests, key=lambda request: request.at)

    def reset(self) -> None:
        with self._lock:
            self._requests.clear()
            self.peak = self._at_once

    def publish(self) -> None:
        """From now on every object is another version, of the same bytes."""
        with self._lock:
            self._version += 1

    def __enter__(self) -> FleetStore:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self._thread = threading.Thread(target=self._accept)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A thread in accept() does not notice close().
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):  # the other side has closed it
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:  # the end
                return
            with self._lock:
                self._connections.add(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A daemon that stops, or the end of this context, cuts connections.
        with connection, connection.makefile("rb") as requests, contextlib.suppress(ConnectionError):
            self._answer_all(connection, requests)
        with self._lock:
            self._connections.discard(connection)

    def _answer_all(self, connection: socket.socket, requests: BinaryIO) -> None:
        while asked := objects.read_request(requests):
            method, target, headers = asked
            at, node = time.monotonic(), node_of(headers.get("authorization", ""))
            prefix = objects.listed_prefix(target)
            if prefix is not None:
                self._add(Request(node, LIST, method, 200, 0, at))
                connection.sendall(objects.page(prefix, self._etag))
                continue
            kind = INDEX if target.endswith(".json") else WEIGHTS
            if self._enter():
                try:
                    self._answer(connection, target, headers, Request(node, kind, method, 0, 0, at))
                finally:
                    self._leave()
            else:
                self._add(Request(node, kind, method, 503, 0, at))
                connection.sendall(_refusal(method))

    def _answer(
        self, connection: socket.socket, target: str, headers: Mapping[str, str], request: Request
    ) -> None:
        """Records the request before it sends anything: whoever has the answer finds it counted."""
        with objects.file_of(target).open("rb") as file:
            stat = os.fstat(file.fileno())
            answer = objects.answer(request.method, headers, stat.st_size, self._etag(stat))
            self._add(replace(request, status=answer.status, body_bytes=answer.end - answer.start))
            connection.sendall(answer.head)
            at = answer.start
            while at < answer.end:
                part_bytes = min(_PART_BYTES, answer.end - at)
                self._link.pass_through(part_bytes)
                at += os.sendfile(connection.fileno(), file.fileno(), at, part_bytes)

    def _etag(self, stat: os.stat_result) -> str:
        return f'"{self._version}-{objects.etag_of(stat)[1:]}'

    def _enter(self) -> bool:
        with self._lock:
            if self._at_once >= self.most_at_once:
                return False
            self._at_once += 1
            self.peak = max(self.peak, self._at_once)
            return True

    def _leave(self) -> None:
        with self._lock:
            self._at_once -= 1

    def _add(self, request: Request) -> None:
        with self._lock:
            self._requests.append(request)


def _refusal(method: str) -> bytes:
    body = b"" if method == "HEAD" else _REFUSAL
    lines = ["HTTP/1.1 503 Slow Down", "Content-Type: application/xml", f"Content-Length: {len(_REFUSAL)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body
