"""Keep-alive HTTP/1.1 connections, through a proxy if the environment names one, and exchanges on them. Bytes
go from the socket to the caller's memory. Only a few kilobytes are buffered.

Connections do not belong to threads. A thread takes an idle one, or makes one, and puts it back when it has
read the answer to its end.
"""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from urllib.parse import SplitResult, urlsplit

from ...errors import SourceUnavailableError
from ...system.progress import beat
from . import addresses, proxies
from .faults import Transient
from .response import Response, TooSlow

MAX_ERROR_BODY_BYTES = 64 << 10
"""Most bytes of an error answer that are read to find its code."""
BUFFER_BYTES = 64 << 10
"""The HTTP parser reads less than this ahead."""
BURST_BYTES = 1 << 20
"""Most bytes that are decrypted in one turn."""
LOW_WATER_BYTES = 256 << 10
"""The kernel wakes a thread that waits for bytes of a body when so many are there. Woken for each packet, the
thread and the sender both took a quarter more processor time (`benchmarks/stores.py`)."""
SLOW_TURN_BYTES = 4 * LOW_WATER_BYTES
"""A connection that brings less in `TURN_SECONDS` is slow: its thread may be woken for each packet. Or its
sender waits, because the window is too small for so many bytes."""
TURN_SECONDS = 0.25
"""A read tells at least so often that bytes come: well within `schedule.STALL_SECONDS`."""
_TURN = struct.pack("ll", 0, int(TURN_SECONDS * 1e6))

# OpenSSL returns 16 KiB at a time, and each piece takes a turn of the interpreter's lock. Dozens of threads
# that take turns spend more time on waking each other than on decrypting. So only as many as there are cores
# decrypt at a time, each a burst.
_decrypting = threading.BoundedSemaphore(len(os.sched_getaffinity(0)))


_Origin = tuple[str, bool]
"""Scheme, host and port, and whether connections go to public addresses only."""


class Connections:
    """Idle connections by origin. Thread-safe."""

    def __init__(self, *, timeout_seconds: float, idle: int, tls: ssl.SSLContext) -> None:
        """At most `idle` connections are kept open while nothing is requested."""
        self._timeout_seconds = timeout_seconds
        self._max_idle = idle
        self._tls = tls
        self._lock = threading.Lock()
        self._idle: list[tuple[_Origin, http.client.HTTPConnection]] = []
        self._busy: set[http.client.HTTPConnection] = set()
        self._closed = False

    @contextlib.contextmanager
    def exchange(
        self, what: str, method: str, url: str, headers: Mapping[str, str], *, public_only: bool = False
    ) -> Iterator[Exchange]:
        """Sends a request and gives its answer. The body must be read within the context. Raises Transient,
        also from within the context, and SourceUnavailableError, which names `what`. With `public_only` it
        raises AccessDeniedError for a host that has an address that is not public."""
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{proxies.authority(parts)}", public_only
        connection = self._take(origin) or self._new(parts, public_only)
        exchange, reusable = None, False
        try:
            with _network_errors(what, parts, connection):
                self._connect(connection)
                exchange = _send(connection, method, parts, headers)
                if exchange.status == 407:  # a status of proxies alone
                    raise proxies.refusal(407, what, parts, connection)
                yield exchange
            reusable = exchange.complete
        except Transient:
            self._forget(origin)
            raise
        finally:
            if exchange is not None and not reusable:
                exchange.abandon()
            self._put(origin, connection, reusable=reusable)

    def close(self) -> None:
        """Ends every exchange that is under way, with an error."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for connection in self._busy:
                sock = connection.sock  # its thread may close it meanwhile
                if sock is not None:
                    # Not SSLSocket's own method, which ends the encryption under a read: the caller would get
                    # ciphertext after that.
                    with contextlib.suppress(OSError):
                        socket.socket.shutdown(sock, socket.SHUT_RDWR)
        for _, connection in idle:
            connection.close()

    def _take(self, origin: _Origin) -> http.client.HTTPConnection | None:
        while True:
            with self._lock:
                position = next((at for at, idle in enumerate(self._idle) if idle[0] == origin), None)
                if position is None:
                    return None
                connection = self._idle.pop(position)[1]
                self._busy.add(connection)
            if not _readable(connection):
                return connection
            self._put(origin, connection, reusable=False)

    def _forget(self, origin: _Origin) -> None:
        """Closes idle connections of an origin. They may be as broken as the one that just failed, so the
        next attempt gets a new one."""
        with self._lock:
            forgotten = [connection for at, connection in self._idle if at == origin]
            self._idle = [idle for idle in self._idle if idle[0] != origin]
        for connection in forgotten:
            connection.close()

    def _put(self, origin: _Origin, connection: http.client.HTTPConnection, *, reusable: bool) -> None:
        surplus: http.client.HTTPConnection | None = connection
        with self._lock:
            self._busy.discard(connection)
            if reusable and not self._closed:
                self._idle.insert(0, (origin, connection))
                # The oldest one goes, whatever its origin. Connections of a bucket that is no longer used
                # would otherwise keep the place of useful ones.
                surplus = self._idle.pop()[1] if len(self._idle) > self._max_idle else None
        if surplus is not None:
            surplus.close()

    def _connect(self, connection: http.client.HTTPConnection) -> None:
        if connection.sock is None and not self._closed:
            connection.connect()
        if self._closed:  # possibly before there was a socket to shut down
            raise Transient("connection", "penstockd stops")

    def _new(self, parts: SplitResult, public_only: bool) -> http.client.HTTPConnection:
        proxy = proxies.find(parts)
        connection = self._of_kind(parts, proxy)
        if public_only and proxy is None:
            connection._create_connection = addresses.create_connection  # type: ignore[attr-defined]
        elif public_only:
            addresses.check_name(parts)
        connection.response_class = Response
        with self._lock:
            self._busy.add(connection)
        return connection

    def _of_kind(self, parts: SplitResult, proxy: SplitResult | None) -> http.client.HTTPConnection:
        host, port = parts.hostname or "", parts.port
        if proxy is None:
            if parts.scheme == "https":
                return self._https(host, port)
            return Plain(host, port, timeout=self._timeout_seconds)
        if parts.scheme == "https":
            connection = self._https(proxy.hostname or "", proxy.port or 80)
            connection.set_tunnel(host, port, proxies.headers(proxy))
            return connection
        return proxies.Forwarded(proxy, timeout=self._timeout_seconds)

    def _https(self, host: str, port: int | None) -> http.client.HTTPSConnection:
        return http.client.HTTPSConnection(host, port, timeout=self._timeout_seconds, context=self._tls)


class Plain(http.client.HTTPConnection):
    """A connection without TLS and without a proxy."""

    low_water_bytes = LOW_WATER_BYTES
    """From how many bytes on a thread that waits for a body is woken; 1 once the connection was slow."""


class Exchange:
    """An answer: status, headers, and a body to be read into the caller's memory."""

    def __init__(self, connection: http.client.HTTPConnection, response: Response) -> None:
        self.connection = connection
        self.status = response.status
        self.headers: Mapping[str, str] = response.fields
        """By their names in lower case."""
        self.length = response.length
        """The length of the body; None if the server does not say it."""
        self._response = response
        self._left = response.length
        self._drained = False
        """Whether nothing of the body is left in the parser's buffer, so the rest is in the socket."""

    @property
    def complete(self) -> bool:
        """Whether it was read to its end, and the connection can be used again."""
        return self._response.isclosed() and self.connection.sock is not None

    def abandon(self) -> None:
        """Closes the socket that the parser keeps for itself if the connection ends with this answer."""
        self._response.close()

    def read_into(self, view: memoryview) -> int:
        """Reads some bytes of the body, as they come. Returns their number, 0 at the end."""
        if self._left is None or self._response.chunked:
            # The response's readinto returns only when the view is full. Until then nobody would notice
            # whether bytes come, and how slowly, and an error would lose those that came. The frame of a
            # chunk may come slowly too.
            self._response.hurry()
            some = self._response.read1(min(len(view), BUFFER_BYTES))
            count = len(some)
            view[:count] = some
        else:
            view = view[: self._left]
            if self._drained and isinstance(self.connection.sock, ssl.SSLSocket):
                count = _read_burst(self.connection.sock, view)
            elif self._drained and isinstance(self.connection.sock, socket.socket):
                count = self._receive(self.connection.sock, view)
            else:
                # Not the response's own readinto: an error would lose the bytes that came before it.
                count = self._response.fp.readinto1(view) if view else 0
                self._drained = len(view) >= BUFFER_BYTES
            self._left -= count
            if not self._left:
                self._response.close()
        if count:
            beat()
        return count

    def _receive(self, sock: socket.socket, view: memoryview) -> int:
        """Reads some bytes of the body, which is in the socket as far as it has come."""
        connection, left_bytes = self.connection, self._left or 0
        low_water_bytes = 1
        if isinstance(connection, Plain) and left_bytes > 2 * LOW_WATER_BYTES:
            low_water_bytes = connection.low_water_bytes
            view = view[: left_bytes - low_water_bytes]  # or the kernel would wait for more than still comes
        count = _receive(sock, view, low_water_bytes)
        if isinstance(connection, Plain) and count < min(len(view), SLOW_TURN_BYTES):
            connection.low_water_bytes = 1
        return count

    def finish(self) -> None:
        """Reads the end of the body, which should be here. If it is not, the connection cannot be used
        again."""
        if not self._response.isclosed():
            self._response.hurry()
            self._response.read(1)

    def whole(self, limit_bytes: int, hold: Callable[[int], None] = lambda size_bytes: None) -> bytes:
        """The whole body. It must come within the timeout. `hold` is called before that many more bytes are
        held, and may raise. Raises Transient, also if the body is longer."""
        announced_bytes = self.length or 0
        if announced_bytes <= limit_bytes:
            body = self._body(limit_bytes + 1, hold)
            if len(body) < announced_bytes:
                raise Transient("short_body", "the answer ended early")
            if len(body) <= limit_bytes:
                return body
        raise Transient("bad_response", f"the answer has more than {limit_bytes} bytes")

    def text(self) -> bytes:
        """The body of an error answer, or the beginning of it if it is long."""
        return self._body(MAX_ERROR_BODY_BYTES)

    def _body(self, most_bytes: int, hold: Callable[[int], None] = lambda size_bytes: None) -> bytes:
        """Not by one `read`, which would hold each chunk as an object, however small it is."""
        self._response.hurry()
        body = bytearray()
        while len(body) < most_bytes:
            some = self._response.read1(min(most_bytes - len(body), BUFFER_BYTES))
            if not some:
                self._response.read(1)  # after which the connection is good for more
                break
            hold(len(some))
            body += some
        return bytes(body)


def _receive(sock: socket.socket, view: memoryview, low_water_bytes: int) -> int:
    """Fills the view with one call of the kernel, or as much of it as comes in `TURN_SECONDS`; 0 at the end.

    With a timeout of its own Python would ask the kernel twice for every few packets, each time with a turn
    of the interpreter's lock. Raises OSError, of which TimeoutError after the connection's timeout.
    """
    timeout_seconds = sock.gettimeout()
    until = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water_bytes)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TURN)
    sock.settimeout(None)
    try:
        while True:
            try:
                return sock.recv_into(view, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise TimeoutError from None
    finally:
        sock.settimeout(timeout_seconds)


def _read_burst(connection: ssl.SSLSocket, view: memoryview) -> int:
    """Reads the bytes that have come, at most a burst. Waits for the first. Returns 0 at the end. Raises
    OSError."""
    timeout_seconds = connection.gettimeout()
    connection.settimeout(0)
    try:
        while True:
            try:
                with _decrypting:
                    return _read_ready(connection, view[:BURST_BYTES])
            except ssl.SSLWantReadError:
                _wait_readable(connection, timeout_seconds)
    finally:
        connection.settimeout(timeout_seconds)


def _read_ready(connection: ssl.SSLSocket, view: memoryview) -> int:
    """Reads without waiting. Raises SSLWantReadError if no byte is there."""
    total = 0
    while total < len(view):
        try:
            count = connection.recv_into(view[total:])
        except OSError:  # also if there is no more: the bytes so far count, and the next read raises again
            if total:
                break
            raise
        if not count:
            break
        total += count
    return total


def _wait_readable(connection: socket.socket, timeout_seconds: float | None) -> None:
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(None if timeout_seconds is None else timeout_seconds * 1000):
        raise TimeoutError


def _send(
    connection: http.client.HTTPConnection, method: str, parts: SplitResult, headers: Mapping[str, str]
) -> Exchange:
    target = f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}"
    sent = dict(headers)
    if isinstance(connection, proxies.Forwarded):
        target = f"{parts.scheme}://{proxies.authority(parts)}{target}"
        sent.update(connection.proxy_headers)
    try:
        connection.request(method, target, headers=sent)
    except OSError:  # some of these are a ValueError too, such as those of certificates
        raise
    except ValueError as error:  # an ETag that cannot be sent in a header
        raise Transient("bad_response", "what the store said of the object is no valid header") from error
    beat()
    response = connection.getresponse()
    assert isinstance(response, Response)
    beat()
    return Exchange(connection, response)


def _readable(connection: http.client.HTTPConnection) -> bool:
    """Whether an idle connection has something to be read. Then the server closed it, or it is out of
    step."""
    if connection.sock is None:
        return True
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    return bool(poll.poll(0))


@contextlib.contextmanager
def _network_errors(what: str, parts: SplitResult, connection: http.client.HTTPConnection) -> Iterator[None]:
    """Turns errors of sockets, TLS and the HTTP parser into errors for clients. Texts that a server may have
    written are left out."""
    where = proxies.way(parts, connection)
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise SourceUnavailableError(
            f"{what}: the certificate of {where} is not trusted: {error.verify_message}; if its authority is "
            "private, name its bundle in AWS_CA_BUNDLE (S3) or REQUESTS_CA_BUNDLE"
        ) from error
    except TooSlow as error:
        raise Transient("timeout", f"the answer of {where} comes too slowly for --object-timeout") from error
    except TimeoutError as error:
        raise Transient("timeout", f"no byte from {where} for as long as --object-timeout") from error
    except socket.gaierror as error:
        raise Transient("connection", f"a host name does not resolve, {where}: {error.strerror}") from error
    except OSError as error:
        if (status := proxies.tunnel_status(error)) is not None:
            raise proxies.refusal(status, what, parts, connection) from None
        text = error.strerror or type(error).__name__
        raise Transient("connection", f"the connection to {where} failed: {text}") from error
    except http.client.IncompleteRead as error:
        raise Transient("short_body", "the answer ended early") from error
    except http.client.HTTPException as error:
        raise Transient("bad_response", f"{where} answered no valid HTTP ({type(error).__name__})") from error
