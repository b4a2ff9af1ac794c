"""The verdict on a safetensors file, the daemon's and the library's, in one form to compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import safetensors

from penstock.server.checkpoint.headers.decode import parse_header
from penstock.server.checkpoint.headers.rules import InvalidHeaderError, parse_header_length

deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize

# name to dtype, shape and the tensor's bytes; and the metadata
Contents = tuple[dict[str, tuple[str, tuple[int, ...], bytes]], dict[str, str]]
Read = Callable[[bytes], Contents | None]


def read_by_us(file: bytes) -> Contents | None:
    """What we make of the file; None where we refuse it."""
    try:
        header_bytes = parse_header_length(file[:8], file_bytes=len(file))
        header = parse_header(file[8 : 8 + header_bytes], file_bytes=len(file))
    except InvalidHeaderError:
        return None
    assert header.data_start == 8 + header_bytes
    table = header.tensors
    assert len(set(table.names())) == len(table)
    tensors = {
        table.name(i): (table.dtype(i), table.shape(i), file[table.start(i) : table.end(i)])
        for i in range(len(table))
    }
    keys = [(table.start(i), table.end(i), table.name(i)) for i in range(len(table))]
    assert keys == sorted(keys)
    return tensors, dict(header.metadata)
