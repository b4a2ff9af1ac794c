"""Header compression of HTTP/2 (RFC 7541), as much as a test needs to send and to read headers."""

from __future__ import annotations

from collections import deque

Field = tuple[str, bytes]
"""A name and a value."""

# fmt: off
STATIC_NAMES = (
    ":authority", ":method", ":method", ":path", ":path", ":scheme", ":scheme", ":status", ":status",
    ":status", ":status", ":status", ":status", ":status", "accept-charset", "accept-encoding",
    "accept-language", "accept-ranges", "accept", "access-control-allow-origin", "age", "allow",
    "authorization", "cache-control", "content-disposition", "content-encoding", "content-language",
    "content-length", "content-location", "content-range", "content-type", "cookie", "date", "etag",
    "expect", "expires", "from", "host", "if-match", "if-modified-since", "if-none-match", "if-range",
    "if-unmodified-since", "last-modified", "link", "location", "max-forwards", "proxy-authenticate",
    "proxy-authorization", "range", "referer", "refresh", "retry-after", "server", "set-cookie",
    "strict-transport-security", "transfer-encoding", "user-agent", "vary", "via", "www-authenticate",
)
# fmt: on
STATIC_VALUES = {
    2: b"GET",
    3: b"POST",
    4: b"/",
    5: b"/index.html",
    6: b"http",
    7: b"https",
    8: b"200",
    9: b"204",
    10: b"206",
    11: b"304",
    12: b"400",
    13: b"404",
    14: b"500",
    16: b"gzip, deflate",
}
ENTRY_OVERHEAD_BYTES = 32
"""What section 4.1 adds to the length of each entry."""
DEFAULT_TABLE_BYTES = 4096


def integer(value: int, prefix_bits: int, pattern: int = 0) -> bytes:
    """Section 5.1; `pattern` fills the bits before the prefix."""
    most = (1 << prefix_bits) - 1
    if value < most:
        return bytes([pattern | value])
    encoded, value = bytearray([pattern | most]), value - most
    while value >= 128:
        encoded.append(value & 127 | 128)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def string(value: str | bytes) -> bytes:
    """Section 5.2, without Huffman coding."""
    data = value.encode() if isinstance(value, str) else value
    return integer(len(data), 7) + data


def literal(name: str | bytes, value: str | bytes, *, remembered: bool = False) -> bytes:
    """A field that names itself; `remembered`: in the receiver's dynamic table."""
    return (b"\x40" if remembered else b"\x00") + string(name) + string(value)


def indexed(index: int) -> bytes:
    """A field of one of the tables: from 1 on the static one, from 62 on the dynamic one."""
    return integer(index, 7, 0x80)


class Decoder:
    """Reads header blocks of one connection. Huffman-coded strings stay as they came."""

    def __init__(self) -> None:
        self._dynamic: deque[Field] = deque()
        self._max_bytes = DEFAULT_TABLE_BYTES

    def decode(self, block: bytes) -> list[Field]:
        """The fields of a block, in order."""
        fields, position = [], 0
        while position < len(block):
            first = block[position]
            if first & 0x80:
                index, position = _read_integer(block, position, 7)
                fields.append(self._entry(index))
            elif first & 0xE0 == 0x20:
                self._max_bytes, position = _read_integer(block, position, 5)
                self._evict()
            else:
                remembered = bool(first & 0x40)
                index, position = _read_integer(block, position, 6 if remembered else 4)
                if index:
                    name = self._entry(index)[0]
                else:
                    raw, position = _read_string(block, position)
                    name = raw.decode("latin-1")
                value, position = _read_string(block, position)
                fields.append((name, value))
                if remembered:
                    self._dynamic.appendleft((name, value))
                    self._evict()
        return fields

    def _entry(self, index: int) -> Field:
        if index <= len(STATIC_NAMES):
            return STATIC_NAMES[index - 1], STATIC_VALUES.get(index, b"")
        return self._dynamic[index - len(STATIC_NAMES) - 1]

    def _evict(self) -> None:
        size = sum(len(name) + len(value) + ENTRY_OVERHEAD_BYTES for name, value in self._dynamic)
        while size > self._max_bytes:
            name, value = self._dynamic.pop()
            size -= len(name) + len(value) + ENTRY_OVERHEAD_BYTES


def _read_integer(block: bytes, position: int, prefix_bits: int) -> tuple[int, int]:
    most = (1 << prefix_bits) - 1
    value, position = block[position] & most, position + 1
    if value < most:
        return value, position
    shift = 0
    while True:
        byte, position = block[position], position + 1
        value += (byte & 127) << shift
        shift += 7
        if not byte & 128:
            return value, position


def _read_string(block: bytes, position: int) -> tuple[bytes, int]:
    size, position = _read_integer(block, position, 7)
    return block[position : position + size], position + size
