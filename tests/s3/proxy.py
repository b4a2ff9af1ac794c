"""An HTTP/1.1 proxy before an S3 server that keeps what it was asked and does faults on cue.

A test adds rules (`FaultProxy.on`): which requests, how many of them, and the fault. A fault is a function
of an `Exchange`, which can get the true answer, send all, a part or something else, stall, or drop the
connection.
The faults themselves are in `faults.py`.
"""

from __future__ import annotations

import contextlib
import http.client
import re
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from urllib.parse import parse_qsl, unquote

from ..e2e.support import DEADLINE_SECONDS, wait_until

Headers = list[tuple[str, str]]
_HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "date", "server"}
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends RST."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked. `target` is as it was on the wire, but for scheme and host, which some clients name."""

    method: str
    target: str
    headers: http.client.HTTPMessage
    connection: int
    """Counts the connections of the proxy: the same number is the same connection."""

    @property
    def path(self) -> str:
        return unquote(self.target.partition("?")[0])

    @property
    def bucket(self) -> str:
        """Of a path-style request."""
        return self.path.split("/", 2)[1]

    @property
    def key(self) -> str:
        """Of a path-style request; empty for one about the bucket."""
        return self.path.partition("/")[2].partition("/")[2]

    @property
    def closes(self) -> bool:
        """It is the last of its connection."""
        return self.headers.get("Connection", "").lower() == "close"

    @property
    def query(self) -> dict[str, str]:
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True))

    @property
    def range(self) -> tuple[int, int] | None:
        """First and last byte asked for."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Headers
    body: bytes

    def header(self, name: str) -> str:
        return next(value for key, value in self.headers if key.lower() == name.lower())

    def with_header(self, name: str, value: str) -> Answer:
        """With that header instead of what it said there."""
        kept = [(key, old) for key, old in self.headers if key.lower() != name.lower()]
        return replace(self, headers=[*kept, (name, value)])


@dataclass
class Exchange:
    """One request and the connection it came on."""

    request: Request
    _proxy: FaultProxy
    _connection: socket.socket
    _released: threading.Event
    """Set: it stalls no longer. As it was when the request came: it may be released before it stalls."""

    def upstream(self) -> Answer:
        """What the server behind says, whole."""
        with contextlib.closing(self._proxy.connection_upstream()) as connection:
            connection.putrequest(
                self.request.method, self.request.target, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.request.headers.items():
                if name.lower() not in _HOP_BY_HOP:
                    connection.putheader(name, value)
            connection.endheaders()
            response = connection.getresponse()
            headers = [pair for pair in response.getheaders() if pair[0].lower() not in _HOP_BY_HOP]
            return Answer(response.status, headers, response.read())

    def pass_on(self) -> None:
        """No fault."""
        self.send(self.upstream())

    def send(self, answer: Answer) -> None:
        """`Content-Length` is added unless the headers have one. A body to HEAD is left out."""
        self.send_head(answer)
        if self.request.method != "HEAD":
            self.send_body(answer.body)

    def send_head(self, answer: Answer) -> None:
        phrase = http.client.responses.get(answer.status, "Unknown")
        lines = [
            f"HTTP/1.1 {answer.status} {phrase}",
            *(f"{name}: {value}" for name, value in answer.headers),
        ]
        if not any(name.lower() == "content-length" for name, _ in answer.headers):
            lines.append(f"Content-Length: {len(answer.body)}")
        if self.request.closes:
            lines.append("Connection: close")
        self._connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))

    def send_body(self, body: bytes) -> None:
        self._connection.sendall(body)
        self._proxy.count(self.request, len(body))

    def stall(self) -> None:
        """Sends nothing more until the test releases the proxy or the client closes the connection."""
        with contextlib.suppress(OSError):
            # The client has nothing to send meanwhile: this returns when it closes.
            while not self._released.is_set():
                self._connection.settimeout(0.05)
                try:
                    if not self._connection.recv(1):
                        break
                except TimeoutError:
                    continue
        self.drop()

    def drop(self) -> None:
        """Closes the connection in good order."""
        raise _ConnectionOver

    def reset(self) -> None:
        """Closes the connection with RST, and what was sent and not yet read is lost."""
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        raise _ConnectionOver

    def close_proxy(self) -> None:
        """From now on connections are refused, until `FaultProxy.open`. Only the first time."""
        if not self._proxy.refusing:
            self._proxy.refuse()
        self.reset()


class _ConnectionOver(Exception):
    pass


Fault = Callable[[Exchange], None]
Match = Callable[[Request], bool]


@dataclass
class Rule:
    match: Match
    fault: Fault
    skip: int
    """So many requests that match are passed on first."""
    times: int | None
    """So many then get the fault; None: all."""
    hits: list[Request] = field(default_factory=list)
    """Requests that got the fault, or are getting it."""

    def wait_hit(self, count: int = 1) -> None:
        wait_until(lambda: len(self.hits) >= count, f"{count} requests to meet the fault")


class FaultProxy:
    """Listens on the loopback until `close`. With `tls` it is an HTTPS server, and with `upstream_tls` it is
    before one."""

    def __init__(
        self,
        upstream_port: int,
        *,
        tls: ssl.SSLContext | None = None,
        upstream_tls: ssl.SSLContext | None = None,
    ) -> None:
        self.upstream_port = upstream_port
        self._upstream_tls = upstream_tls
        self.released = threading.Event()
        """Set: stalled requests end."""
        self._tls = tls
        self._lock = threading.Lock()
        self._rules: list[Rule] = []
        self._requests: list[Request] = []
        self._sent: dict[tuple[str, str], int] = {}
        self._open: set[socket.socket] = set()
        self._connections = 0
        self.port = 0
        self.refusing = False
        self.open()

    @property
    def endpoint(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    # ---- for tests ------------------------------------------------------------------------------

    def connection_upstream(self) -> http.client.HTTPConnection:
        """A new one, for one request."""
        if self._upstream_tls is None:
            return http.client.HTTPConnection("127.0.0.1", self.upstream_port, timeout=60)
        return http.client.HTTPSConnection(
            "127.0.0.1", self.upstream_port, timeout=60, context=self._upstream_tls
        )

    def on(self, match: Match, fault: Fault, *, skip: int = 0, times: int | None = 1) -> Rule:
        """Rules are asked in the order in which they were added; the first that applies is the one."""
        rule = Rule(match, fault, skip, times)
        with self._lock:
            self._rules.append(rule)
        return rule

    def requests(self, match: Match = lambda request: True) -> list[Request]:
        """All that came since `reset`, in order."""
        with self._lock:
            return [request for request in self._requests if match(request)]

    def sent_bytes(self, bucket: str, key: str) -> int:
        """Of bodies that were sent for that object."""
        with self._lock:
            return self._sent.get((bucket, key), 0)

    def reset(self) -> None:
        """Forgets rules and requests; stalled requests end."""
        with self._lock:
            self._rules.clear()
            self._requests.clear()
            self._sent.clear()
            self.released.set()
            self.released = threading.Event()

    def refuse(self) -> None:
        """Connections are refused; those that are open are not touched."""
        # Closing alone would not wake the thread that accepts.
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.refusing = True

    def open(self) -> None:
        """Listens, again on the same port."""
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=256)
        self.port = self._listener.getsockname()[1]
        self.refusing = False
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def drop_connections(self) -> None:
        """Closes what is open."""
        with self._lock:
            connections = list(self._open)
        for connection in connections:
            with contextlib.suppress(OSError):
                # Not SSLSocket's own, which takes the encryption away from under a thread that reads.
                socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def close(self) -> None:
        self.released.set()
        self.refuse()
        self.drop_connections()
        wait_until(lambda: not self._open, "the proxy's connections to end")

    # ---- inside ---------------------------------------------------------------------------------

    def count(self, request: Request, size_bytes: int) -> None:
        with self._lock:
            place = (request.bucket, request.key)
            self._sent[place] = self._sent.get(place, 0) + size_bytes

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed
                return
            with self._lock:
                self._connections += 1
                number = self._connections
                self._open.add(connection)
            threading.Thread(target=self._serve, args=(connection, number), daemon=True).start()

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            connection.settimeout(DEADLINE_SECONDS)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                encrypted = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
                with self._lock:
                    self._open.discard(connection)
                    self._open.add(encrypted)
                connection = encrypted
                encrypted.do_handshake()
            for request in _requests(connection, number):
                self._answer(request, connection)
                if request.closes:
                    return
        except (OSError, _ConnectionOver):
            return  # the client went, or the fault was to go
        finally:
            connection.close()
            with self._lock:
                self._open.discard(connection)

    def _answer(self, request: Request, connection: socket.socket) -> None:
        with self._lock:
            self._requests.append(request)
            fault = self._fault(request)
            exchange = Exchange(request, self, connection, self.released)
        fault(exchange)

    def _fault(self, request: Request) -> Fault:
        for rule in self._rules:
            if rule.times == 0 or not rule.match(request):
                continue
            if rule.skip:
                rule.skip -= 1
                continue
            if rule.times is not None:
                rule.times -= 1
            rule.hits.append(request)
            return rule.fault
        return Exchange.pass_on


def _requests(connection: socket.socket, number: int) -> Iterator[Request]:
    """As they come, until the client closes. None of them has a body."""
    with connection.makefile("rb") as reader:
        while line := reader.readline(65537):
            method, target, _ = line.decode("latin-1").split()
            target = re.sub(r"^https?://[^/]*", "", target)
            yield Request(method, target, http.client.parse_headers(reader), number)


def asks(
    method: str | Iterable[str] = ("GET", "HEAD"),
    *,
    bucket: str | None = None,
    key: str | None = None,
    start: int | None = None,
    beyond: int | None = None,
) -> Match:
    """Requests by method, bucket, key, first byte of the range; `beyond`: ranges that start after it."""
    methods = {method} if isinstance(method, str) else set(method)

    def match(request: Request) -> bool:
        first = request.range[0] if request.range else None
        return (
            request.method in methods
            and (bucket is None or request.bucket == bucket)
            and (key is None or request.key == key)
            and (start is None or first == start)
            and (beyond is None or (first is not None and first > beyond))
        )

    return match
