"""HTTP/2 by hand (RFC 9113, RFC 7541), to send what no library sends, and to see what comes back.

One loop in the caller's thread moves the bytes, and reads while it writes, so that this side and a peer that
answers faster than it reads cannot wait for each other.
"""

from __future__ import annotations

import contextlib
import enum
import select
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from .hpack import Decoder, Field, literal

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER = struct.Struct(">BHBBI")
DEFAULT_WINDOW_BYTES = 65535
MAX_FRAME_BYTES = 16384
"""What a peer takes unless it says otherwise."""
PATIENCE_SECONDS = 60.0
SERVICE = "/penstock.v1.StreamerService/"

T = TypeVar("T")


class Kind(enum.IntEnum):
    """Of frames."""

    DATA = 0
    HEADERS = 1
    PRIORITY = 2
    RST_STREAM = 3
    SETTINGS = 4
    PUSH_PROMISE = 5
    PING = 6
    GOAWAY = 7
    WINDOW_UPDATE = 8
    CONTINUATION = 9


class Flag(enum.IntFlag):
    NONE = 0
    END_STREAM = 1
    ACK = 1
    END_HEADERS = 4
    PADDED = 8
    PRIORITY = 32


class Setting(enum.IntEnum):
    HEADER_TABLE_SIZE = 1
    ENABLE_PUSH = 2
    MAX_CONCURRENT_STREAMS = 3
    INITIAL_WINDOW_SIZE = 4
    MAX_FRAME_SIZE = 5
    MAX_HEADER_LIST_SIZE = 6


@dataclass(frozen=True, slots=True)
class Frame:
    """One that came. `kind` is a number, as a peer may send kinds that nobody knows."""

    kind: int
    flags: int
    stream: int
    payload: bytes


def frame(kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> bytes:
    """A frame as it travels; its length is right, all else is the caller's."""
    size = len(payload)
    return FRAME_HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream) + payload


def parse_frames(sent: bytes) -> list[Frame]:
    """The frames behind the preface; they must be whole."""
    assert sent.startswith(PREFACE)
    found, position = [], len(PREFACE)
    while position < len(sent):
        high, low, kind, flags, stream = FRAME_HEADER.unpack_from(sent, position)
        start = position + FRAME_HEADER.size
        position = start + (high << 16 | low)
        assert position <= len(sent)
        found.append(Frame(kind, flags, stream, sent[start:position]))
    return found


def settings(values: Mapping[int, int]) -> bytes:
    return frame(Kind.SETTINGS, payload=b"".join(struct.pack(">HI", *pair) for pair in values.items()))


def ping(payload: bytes = b"penstock") -> bytes:
    return frame(Kind.PING, payload=payload)


def reset(stream: int, code: int = 8) -> bytes:
    """RST_STREAM, by default CANCEL."""
    return frame(Kind.RST_STREAM, stream=stream, payload=struct.pack(">I", code))


def window_update(stream: int, increment: int) -> bytes:
    return frame(Kind.WINDOW_UPDATE, stream=stream, payload=struct.pack(">I", increment))


def call_fields(path: str | bytes, metadata: Iterable[tuple[str, str | bytes]] = ()) -> bytes:
    """The header block of a gRPC request, in literals that no table remembers."""
    fields: list[tuple[str, str | bytes]] = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        *metadata,
    ]
    return b"".join(literal(name, value) for name, value in fields)


def grpc_message(payload: bytes, *, compressed: bool = False) -> bytes:
    """A message with gRPC's prefix. Whoever says `compressed` has compressed it."""
    return struct.pack(">?I", compressed, len(payload)) + payload


class Closed(ConnectionError):
    """The peer has closed the connection."""


class Connection:
    """One to a Unix socket. Not safe between threads."""

    def __init__(
        self,
        path: Path | str,
        *,
        preface: bytes = PREFACE,
        settings_sent: Mapping[int, int] | None = None,
        answers: bool = True,
    ) -> None:
        """Connects, and sends the preface with these SETTINGS. With `answers`, SETTINGS and PING are
        acknowledged and DATA gives back its window; without, only the caller sends."""
        self.frames: list[Frame] = []
        """All that came."""
        self.closed = False
        """By the peer."""
        self.goaway: tuple[int, bytes] | None = None
        """Error code and debug data of a GOAWAY."""
        self.resets: dict[int, int] = {}
        """Error codes by stream."""
        self._answers = answers
        self._next_stream = 1
        self._out = bytearray()
        self._in = bytearray()
        self._decoder = Decoder()
        self._block = bytearray()
        self._headers: dict[int, list[list[Field]]] = defaultdict(list)
        self._data: dict[int, bytearray] = defaultdict(bytearray)
        self._ended: set[int] = set()
        self._initial_window_bytes = DEFAULT_WINDOW_BYTES
        self._connection_window_bytes = DEFAULT_WINDOW_BYTES
        self._window_bytes: dict[int, int] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(str(path))
            self._socket.setblocking(False)
            self.send(preface + settings(settings_sent or {}) if preface else b"")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def fileno(self) -> int:
        return self._socket.fileno()

    # ---- sending

    def send(self, data: bytes) -> None:
        """Until the kernel has taken all of it. Raises Closed, or AssertionError after `PATIENCE_SECONDS`."""
        self._out += data
        self.wait(lambda: not self._out, "the peer to take what is sent")

    def offer(self, data: bytes, *, seconds: float) -> int:
        """As many of these bytes as the peer takes in that time, reading meanwhile; returns how many.

        The rest is forgotten, so a frame may be cut short: for floods, not for talking on."""
        self._out += data
        deadline = time.monotonic() + seconds
        while self._out and not self.closed and (left := deadline - time.monotonic()) > 0:
            self._turn(left)
        left_bytes = min(len(self._out), len(data))
        self._out.clear()
        return len(data) - left_bytes

    def open_stream(
        self, method: str, metadata: Iterable[tuple[str, str | bytes]] = (), *, end: bool = False
    ) -> int:
        """Begins a call of a method of the service, or of a path with a slash; returns its stream."""
        stream, block = self.next_stream(), call_fields(_path(method), metadata)
        first, rest = block[:MAX_FRAME_BYTES], block[MAX_FRAME_BYTES:]
        flags = (Flag.END_STREAM if end else 0) | (0 if rest else Flag.END_HEADERS)
        data = frame(Kind.HEADERS, flags, stream, first)
        while rest:
            part, rest = rest[:MAX_FRAME_BYTES], rest[MAX_FRAME_BYTES:]
            data += frame(Kind.CONTINUATION, 0 if rest else Flag.END_HEADERS, stream, part)
        self.send(data)
        return stream

    def next_stream(self) -> int:
        """The number for the next stream, for callers who make its frames themselves."""
        stream, self._next_stream = self._next_stream, self._next_stream + 2
        return stream

    def send_data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """In DATA frames, as the peer's windows allow. Raises Closed when it closes or ends the stream."""
        self._window_bytes.setdefault(stream, self._initial_window_bytes)
        while True:
            part = data[: max(0, self.window_bytes(stream))][:MAX_FRAME_BYTES]
            if data and not part:
                self.wait(lambda: self.window_bytes(stream) > 0 or self.over(stream), "a window to open")
                if self.over(stream):
                    raise Closed(f"stream {stream} was ended by the peer")
                continue
            data = data[len(part) :]
            self._connection_window_bytes -= len(part)
            self._window_bytes[stream] -= len(part)
            self.send(frame(Kind.DATA, Flag.END_STREAM if end and not data else 0, stream, part))
            if not data:
                return

    def send_message(
        self, stream: int, payload: bytes, *, compressed: bool = False, end: bool = False
    ) -> None:
        """One gRPC message; as `send_data`."""
        self.send_data(stream, grpc_message(payload, compressed=compressed), end=end)

    # ---- what came

    def window_bytes(self, stream: int) -> int:
        """How much DATA the peer takes on this stream now."""
        return min(self._connection_window_bytes, self._window_bytes.get(stream, self._initial_window_bytes))

    def over(self, stream: int) -> bool:
        """The peer has ended or reset the stream."""
        return stream in self._ended or stream in self.resets

    def headers(self, stream: int) -> dict[str, bytes]:
        """All header fields that came on it, the trailers' too; the last value of each name."""
        return {name: value for block in self._headers[stream] for name, value in block}

    def grpc_status(self, stream: int) -> tuple[int, str] | None:
        """Code and message, once the stream has trailers."""
        fields = self.headers(stream)
        if "grpc-status" not in fields:
            return None
        return int(fields["grpc-status"]), fields.get("grpc-message", b"").decode("latin-1")

    def messages(self, stream: int) -> list[bytes]:
        """The gRPC messages that came whole."""
        data, found, position = bytes(self._data[stream]), [], 0
        while position + 5 <= len(data):
            end = position + 5 + int.from_bytes(data[position + 1 : position + 5], "big")
            if end > len(data):
                break
            found.append(data[position + 5 : end])
            position = end
        return found

    def wait(self, condition: Callable[[], T], what: str) -> T:
        """The first true value of `condition`, which is checked after each read. Raises Closed when the peer
        closes before, AssertionError after `PATIENCE_SECONDS`."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not (value := condition()):
            if self.closed:
                raise Closed(f"the peer closed, before: {what}")
            if (left := deadline - time.monotonic()) <= 0:
                raise AssertionError(f"waited {PATIENCE_SECONDS:.0f} s for: {what}")
            self._turn(left)
        return value

    def linger(self, seconds: float, *, until: Callable[[], object] = lambda: False) -> None:
        """Reads and answers for that time, or until the peer closes, or until this is true."""
        deadline = time.monotonic() + seconds
        while not self.closed and not until() and (left := deadline - time.monotonic()) > 0:
            self._turn(left)

    def wait_closed(self) -> None:
        """Until the peer closes the connection."""
        with contextlib.suppress(Closed):
            self.wait(lambda: self.closed, "the peer to close")

    def finish(self, stream: int) -> tuple[int, str]:
        """Until the peer has ended the stream; its gRPC status. Raises Closed if it is reset instead."""
        self.wait(lambda: self.over(stream), f"stream {stream} to end")
        status = self.grpc_status(stream)
        if status is None:
            raise Closed(f"stream {stream} was reset with {self.resets.get(stream)}")
        return status

    # ---- the loop

    def _turn(self, seconds: float) -> None:
        """Waits until something can be moved, and moves it."""
        readable, writable, _ = select.select([self], [self] if self._out else [], [], seconds)
        try:
            if readable:
                data = self._socket.recv(1 << 18)
                self.closed = not data
                self._in += data
                self._take_frames()
            if writable and not self.closed:
                del self._out[: self._socket.send(self._out[: 1 << 18])]
        except BlockingIOError:
            return
        except ConnectionError:
            self.closed = True

    def _take_frames(self) -> None:
        position = 0
        while position + FRAME_HEADER.size <= len(self._in):
            high, low, kind, flags, stream = FRAME_HEADER.unpack_from(self._in, position)
            end = position + FRAME_HEADER.size + (high << 16 | low)
            if end > len(self._in):
                break
            payload = bytes(self._in[position + FRAME_HEADER.size : end])
            self._take(Frame(kind, flags, stream & 0x7FFFFFFF, payload))
            position = end
        del self._in[:position]

    def _take(self, came: Frame) -> None:
        self.frames.append(came)
        if came.kind == Kind.DATA:
            self._data[came.stream] += came.payload
            if self._answers and came.payload:
                size = len(came.payload)
                self._out += window_update(0, size) + window_update(came.stream, size)
        elif came.kind in (Kind.HEADERS, Kind.CONTINUATION):
            self._block += came.payload
            if came.flags & Flag.END_HEADERS:
                self._headers[came.stream].append(self._decoder.decode(bytes(self._block)))
                self._block.clear()
        elif came.kind == Kind.RST_STREAM:
            self.resets[came.stream] = int.from_bytes(came.payload, "big")
        elif came.kind == Kind.GOAWAY:
            self.goaway = int.from_bytes(came.payload[4:8], "big"), came.payload[8:]
        elif came.kind == Kind.WINDOW_UPDATE:
            self._widen(came.stream, int.from_bytes(came.payload, "big"))
        elif came.kind == Kind.SETTINGS and not came.flags & Flag.ACK:
            self._take_settings(came.payload)
        elif came.kind == Kind.PING and not came.flags & Flag.ACK and self._answers:
            self._out += frame(Kind.PING, Flag.ACK, payload=came.payload)
        if came.kind in (Kind.DATA, Kind.HEADERS) and came.flags & Flag.END_STREAM:
            self._ended.add(came.stream)

    def _take_settings(self, payload: bytes) -> None:
        for name, value in struct.iter_unpack(">HI", payload):
            if name == Setting.INITIAL_WINDOW_SIZE:
                for stream in self._window_bytes:
                    self._window_bytes[stream] += value - self._initial_window_bytes
                self._initial_window_bytes = value
        if self._answers:
            self._out += frame(Kind.SETTINGS, Flag.ACK)

    def _widen(self, stream: int, increment: int) -> None:
        if stream:
            before = self._window_bytes.get(stream, self._initial_window_bytes)
            self._window_bytes[stream] = before + increment
        else:
            self._connection_window_bytes += increment


def _path(method: str) -> str:
    return method if method.startswith("/") else SERVICE + method
