"""As much of HTTP/2 (RFC 9113) as the gate needs: frame headers. `fields.py` has header blocks. Pure."""

from __future__ import annotations

import struct

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
HEADER_BYTES = 9
MAX_PAYLOAD_BYTES = 16384
"""The protocol's default of SETTINGS_MAX_FRAME_SIZE, which gRPC's server does not change."""

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = (
    range(10)
)
NAMES = (
    "DATA",
    "HEADERS",
    "PRIORITY",
    "RST_STREAM",
    "SETTINGS",
    "PUSH_PROMISE",
    "PING",
    "GOAWAY",
    "WINDOW_UPDATE",
    "CONTINUATION",
)
END_STREAM, END_HEADERS, PADDED, WITH_PRIORITY = 0x1, 0x4, 0x8, 0x20
PROTOCOL_ERROR, REFUSED_STREAM, ENHANCE_YOUR_CALM = 0x1, 0x7, 0xB
"""Codes of RST_STREAM and GOAWAY."""
_U32 = struct.Struct(">I")


def name_of(kind: int) -> str:
    return NAMES[kind] if kind < len(NAMES) else f"type {kind}"


def frame(kind: int, flags: int, stream: int, payload: bytes | bytearray | memoryview = b"") -> bytes:
    return b"".join((header(len(payload), kind, flags, stream), payload))


def header(length: int, kind: int, flags: int, stream: int) -> bytes:
    return _U32.pack(length << 8 | kind) + bytes((flags,)) + _U32.pack(stream)


def goaway(last_stream: int, code: int, words: str) -> bytes:
    """Says why a connection is closed; gRPC's clients show the words."""
    return frame(GOAWAY, 0, 0, _U32.pack(last_stream) + _U32.pack(code) + words.encode())


def rst_stream(stream: int, code: int) -> bytes:
    return frame(RST_STREAM, 0, stream, _U32.pack(code))


def literal_field(name: bytes, value: bytes) -> bytes:
    """A header field for the end of any header block: literal, never indexed, not compressed, so that it
    depends on no state of the connection (RFC 7541, 6.2.3). Both may have 126 bytes."""
    return bytes((0x10, len(name))) + name + bytes((len(value),)) + value


def fragment(flags: int, payload: bytes) -> bytes | None:
    """The part of a header block that a HEADERS frame carries, without priority and padding. None:
    malformed."""
    start, end = 0, len(payload)
    if flags & PADDED:
        if not payload:
            return None
        start, end = 1, end - payload[0]
    if flags & WITH_PRIORITY:
        start += 5
    return payload[start:end] if start <= end else None


class EndedStreams:
    """Finds in a server's frames which streams it ends. Skips all other frames by length."""

    def __init__(self) -> None:
        self._skip = 0
        self._partial = b""

    @property
    def between_frames(self) -> bool:
        """A frame may be put in here."""
        return not self._skip and not self._partial

    def feed(self, data: bytes) -> list[int]:
        """The streams that end with these bytes."""
        ended = []
        if self._partial:
            data = self._partial + data
            self._partial = b""
        position, end = self._skip, len(data)
        while position + HEADER_BYTES <= end:
            kind, flags = data[position + 3], data[position + 4]
            if kind == RST_STREAM or (flags & END_STREAM and kind in (DATA, HEADERS)):
                ended.append(_U32.unpack_from(data, position + 5)[0] & 0x7FFFFFFF)
            position += HEADER_BYTES + int.from_bytes(data[position : position + 3], "big")
        if position < end:
            self._partial, self._skip = data[position:], 0
        else:
            self._skip = position - end
        return ended
