"""Checks header blocks of HTTP/2 (RFC 7541) for strings that gRPC's server for Python does not survive. Pure.

The server decodes the path of a method as UTF-8 in the task that accepts calls. A path that is not UTF-8 ends
that task, and nobody is served any more. Another header with such a value makes it log a traceback. So the
gate checks every string of a block. It needs no dynamic table: all strings in the table were checked when
they were sent.
"""

from __future__ import annotations

import functools
import re

_PRINTABLE = re.compile(rb"[\x20-\x7e]*")
_HUFFMAN = (
    (5, 0x0, "012aceiost"),
    (6, 0x14, " %-./3456789=A_bdfghlmnpru"),
    (7, 0x5C, ":BCDEFGHIJKLMNOPQRSTUVWYjkqvwxyz"),
    (8, 0xF8, "&*,;XZ"),
    (10, 0x3F8, '!"()?'),
    (11, 0x7FA, "'+|"),
    (12, 0xFFA, "#>"),
    (13, 0x1FF9, "$@[]~"),
    (14, 0x3FFC, "^}"),
    (15, 0x7FFC, "<`{"),
    (19, 0x7FFF0, "\\"),
)
"""Bits, the first code, and the characters that have the codes from there on, of RFC 7541, appendix B: all
printable characters."""
_MAX_INTEGER_BYTES = 4
"""Enough for every length and index in a block that the gate takes."""


class BadFieldsError(ValueError):
    """A header block is malformed, or holds a string that is not printable ASCII. The message says which."""


def check(block: bytes) -> None:
    """Raises BadFieldsError unless each string in a header block is printable ASCII, as gRPC demands, or the
    value of a field whose name ends in -bin."""
    position, end = 0, len(block)
    while position < end:
        first = block[position]
        if first & 0x80:  # a field of a table
            _, position = _integer(block, position, 7)
            continue
        if first & 0xE0 == 0x20:  # a new size of the table
            _, position = _integer(block, position, 5)
            continue
        index, position = _integer(block, position, 6 if first & 0x40 else 4)
        binary = False
        if not index:
            start = position
            position = _string(block, position, "name")
            # A compressed name is not looked into: its value has to be text, as base64 is.
            binary = not block[start] & 0x80 and block[start:position].endswith(b"-bin")
        position = _string(block, position, "value", binary=binary)


def _integer(block: bytes, position: int, prefix_bits: int) -> tuple[int, int]:
    """A number of section 5.1, and its end."""
    most = (1 << prefix_bits) - 1
    value, position = block[position] & most, position + 1
    if value < most:
        return value, position
    for count, byte in enumerate(block[position : position + _MAX_INTEGER_BYTES]):
        value += (byte & 0x7F) << 7 * count
        if not byte & 0x80:
            return value, position + count + 1
    raise BadFieldsError("a number in a header block is too large, or cut off")


def _string(block: bytes, position: int, what: str, *, binary: bool = False) -> int:
    """The end of a string of section 5.2."""
    if position >= len(block):
        raise BadFieldsError("a header block is cut off")
    compressed = block[position] & 0x80
    size, position = _integer(block, position, 7)
    end = position + size
    if end > len(block):
        raise BadFieldsError("a header block is cut off")
    if compressed:
        printable = _decodes(block[position:end])
    else:
        printable = binary or _PRINTABLE.fullmatch(block, position, end) is not None
    if not printable:
        raise BadFieldsError(
            f"the {what} of a header field is not printable ASCII; send text, or base64 as gRPC does"
        )
    return end


def _decodes(data: bytes) -> bool:
    """Whether Huffman-coded data are printable characters."""
    table, final = _decoder()
    state = 0
    for byte in data:
        state = table[state][byte]
        if state < 0:
            return False
    return state in final


@functools.cache
def _decoder() -> tuple[list[list[int]], frozenset[int]]:
    """The next state for each state and byte (-1: not printable), and the states in which data may end. A
    state is a node of the code's tree. Made at the first use: clients that are built on gRPC's C core
    compress nothing."""
    children: list[list[int]] = [[-1, -1]]
    for bits, code, characters in _HUFFMAN:
        for value in range(code, code + len(characters)):
            node = 0
            for bit in range(bits - 1, 0, -1):
                branch = value >> bit & 1
                if children[node][branch] < 0:
                    children[node][branch] = len(children)
                    children.append([-1, -1])
                node = children[node][branch]
            children[node][value & 1] = 0  # the character is whole
    final, node = {0}, 0
    for _ in range(7):  # padding is at most seven ones
        node = children[node][1]
        final.add(node)
    table = []
    for start in range(len(children)):
        row = []
        for byte in range(256):
            node = start
            for bit in range(7, -1, -1):
                node = children[node][byte >> bit & 1] if node >= 0 else -1
            row.append(node)
        table.append(row)
    return table, frozenset(final)
