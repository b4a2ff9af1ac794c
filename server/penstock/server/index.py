"""`*.index.json` files, which say which file of a checkpoint holds which tensor. Pure."""

from __future__ import annotations

import re

import msgspec

from .table import shown

MAX_INDEX_BYTES = 32 * 1024 * 1024
"""Longest `*.index.json` that `parse_index` reads: room for some 300,000 tensors."""


class InvalidIndexError(ValueError):
    """A `*.index.json` is malformed, or names a file that it must not name."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_INDEX = msgspec.json.Decoder(_Index)
_CLIMBS = re.compile(r"(?:^|/)\.\.(?:/|$)")


def parse_index(raw: bytes) -> dict[str, tuple[str, ...]]:
    """Reads a Hugging Face `*.index.json`: file name to its tensors' names, files by first appearance.

    File names are relative to the index. Raises InvalidIndexError: longer than `MAX_INDEX_BYTES`, not an
    object with a `weight_map` of strings, no tensor at all, or a file name that is empty, absolute, holds
    NUL or climbs with `..`.
    """
    if len(raw) > MAX_INDEX_BYTES:
        raise InvalidIndexError(f"the index has {len(raw)} bytes, more than {MAX_INDEX_BYTES}")
    try:
        weight_map = _INDEX.decode(raw).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidIndexError(f"malformed index: {str(error)[:200]}") from None
    if not weight_map:
        raise InvalidIndexError("the index names no tensor")
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        files.setdefault(file, []).append(tensor)
    for file in files:
        if not file or file.startswith("/") or "\0" in file or _CLIMBS.search(file):
            raise InvalidIndexError(f"the index names a file it must not name: {shown(file)}")
    return {file: tuple(tensors) for file, tensors in files.items()}
