"""An answer on a connection, and how its body gets from the socket to the caller's memory. A reading thread
is woken when much of the body is there, or after a moment.
"""

from __future__ import annotations

import http.client
import math
import os
import select
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping

from ...system.progress import beat
from .faults import Transient
from .response import Response

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


class Watermarked:
    """A connection whose reader need not be woken for each packet."""

    low_water_bytes = LOW_WATER_BYTES
    """From how many bytes on a thread that waits for a body is woken; 1 once the connection was slow. They
    are encrypted ones with TLS."""


class Plain(Watermarked, http.client.HTTPConnection):
    """A connection without TLS and without a proxy."""


class Encrypted(Watermarked, http.client.HTTPSConnection):
    """A connection with TLS, perhaps through a proxy's tunnel."""


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
            if self._drained and isinstance(self.connection.sock, socket.socket):
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
        if isinstance(connection, Watermarked) and left_bytes > 2 * LOW_WATER_BYTES:
            low_water_bytes = connection.low_water_bytes
            view = view[: left_bytes - low_water_bytes]  # or the kernel would wait for more than still comes
        if isinstance(sock, ssl.SSLSocket):
            count, slow = _read_burst(sock, view, low_water_bytes)
        else:
            count = _receive(sock, view, low_water_bytes)
            slow = count < min(len(view), SLOW_TURN_BYTES)
        if slow and isinstance(connection, Watermarked):
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


def _read_burst(sock: ssl.SSLSocket, view: memoryview, low_water_bytes: int) -> tuple[int, bool]:
    """Reads the bytes that have come, at most a burst; 0 at the end. If none have, waits until there are
    `low_water_bytes`, or for `TURN_SECONDS` and then for any. Returns also whether it waited for so long.
    Raises OSError, of which TimeoutError after the connection's timeout."""
    timeout_seconds = sock.gettimeout()
    until = math.inf if timeout_seconds is None else time.monotonic() + timeout_seconds
    slow = False
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, low_water_bytes)
    sock.settimeout(0)
    try:
        while True:
            try:
                with _decrypting:
                    return _read_ready(sock, view[:BURST_BYTES]), slow
            except ssl.SSLWantReadError:
                if not wait_readable(sock, min(TURN_SECONDS, until - time.monotonic())):
                    if time.monotonic() >= until:
                        raise TimeoutError from None
                    slow = True
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
    finally:
        sock.settimeout(timeout_seconds)


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


def wait_readable(sock: socket.socket, seconds: float) -> bool:
    """Whether there is something to be read, as far as the socket's low-water mark counts it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(max(0.0, seconds) * 1000))
