"""Files that cost much to read: headers, indexes, names, shapes and metadata of the largest size."""

from __future__ import annotations

import itertools
import json
import os
import string
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

MIB = 1 << 20
SMALL = "small.safetensors"
LARGE = "large.safetensors"
COSTLY = "costly.safetensors"
DEEP = "deep.safetensors"
MANY_TENSORS = "many_tensors.safetensors"
LONG_NAMES = "long_names.safetensors"
HUGE_RANK = "huge_rank.safetensors"
METADATA = "metadata.safetensors"
INDEX_OF_TENSORS = "of_tensors.safetensors.index.json"
INDEX_OF_FILES = "of_files.safetensors.index.json"
LETTERS = string.ascii_letters + string.digits


def write(directory: Path, *, scale: float = 1.0) -> None:
    """All of them. `scale` is how much of the largest size each has, so that a short test spends its time
    elsewhere than in writing them."""
    directory.mkdir(exist_ok=True)
    write_tensors(directory / SMALL, {f"small.{number}": 1024 for number in range(4)})
    write_tensors(directory / LARGE, {f"large.{number}": MIB for number in range(48)})
    many = int(900_000 * scale)
    entries = b",".join(_entry(f"{number}", 0, 0) for number in range(many))
    # The last value is spelled as no writer spells it, which costs more to judge.
    write_header(directory / COSTLY, b"{" + entries + b',"x":-0}')
    write_header(directory / DEEP, b'{"a":' * int(6_000_000 * scale))
    write_tensors(directory / MANY_TENSORS, {f"layers.{number:030d}": 1 for number in range(many // 4)})
    write_tensors(
        directory / LONG_NAMES, {f"{number:05d}".ljust(25_000, "x"): 1 for number in range(many // 300)}
    )
    ones = b",".join([b"1"] * int(9_000_000 * scale))
    rank = b'{"a":{"dtype":"U8","shape":[' + ones + b'],"data_offsets":[0,1]}}'
    write_header(directory / HUGE_RANK, rank, b"x")
    metadata = {"__metadata__": {"k": "v" * 900_000}, "a": _info(0, 1)}
    write_header(directory / METADATA, json.dumps(metadata).encode(), b"x")
    names = (letters for letters in map("".join, itertools.product(LETTERS, repeat=4)))
    size_bytes = int(32 * MIB * scale) - 100
    write_index(directory / INDEX_OF_TENSORS, ((name, "f") for name in names), size_bytes)
    write_index(directory / INDEX_OF_FILES, ((name, name) for name in names), size_bytes)


def write_tensors(path: Path, sizes_bytes: Mapping[str, int]) -> None:
    """A valid file with U8 tensors of these sizes, of random bytes."""
    header, position = {}, 0
    for name, size_bytes in sizes_bytes.items():
        header[name] = _info(position, position + size_bytes)
        position += size_bytes
    write_header(path, json.dumps(header).encode(), os.urandom(position))


def write_header(path: Path, header: bytes, data: bytes = b"") -> None:
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        file.write(data)


def write_index(path: Path, entries: Iterator[tuple[str, str]], size_bytes: int) -> None:
    """An index of that size, with as many of the entries as fit."""
    parts, held = [], 0
    for tensor, file in entries:
        parts.append(f'"{tensor}":"{file}"')
        held += len(parts[-1]) + 1
        if held > size_bytes:
            break
    path.write_text('{"weight_map":{' + ",".join(parts) + "}}")


def _info(start: int, end: int) -> dict[str, object]:
    return {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}


def _entry(name: str, start: int, end: int) -> bytes:
    return b'"%s":{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]}' % (
        name.encode(),
        end - start,
        start,
        end,
    )
