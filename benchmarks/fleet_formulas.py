"""The formulas of docs/fleet.md: how many requests and bytes daemons ask of S3. Pure.

They need only the layout of a checkpoint, and no code of the daemon. `fleet.py` compares them with the counts
of a server. They hold for a directory in S3 that fits the daemon's limit, with tensors of 32 KiB or more: of
smaller ones a segment has fewer bytes. S3 says checksums only in answers to HEAD requests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

FIRST_BYTES = 256 << 10
"""The range of the first request for an object."""
REST_BYTES = 1 << 20
"""The rest of a longer header or index comes in ranges of this size."""
SEGMENT_BYTES = 64 << 20
PAGE_NAMES = 1000
"""Names in one page of a list."""
JITTER = 0.2
"""Part of the interval of a warm set by which it varies."""


@dataclass(frozen=True, slots=True)
class Weights:
    """The layout of a safetensors file."""

    size_bytes: int
    header_bytes: int
    """Its length field included."""
    tensors: tuple[tuple[int, int], ...]
    """Start and end of each in the file, in that order."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A directory of a store."""

    names: int
    """Directly below the directory."""
    index_bytes: int
    """0 without an index."""
    files: tuple[Weights, ...]


@dataclass(frozen=True, slots=True)
class Count:
    """Requests, by kind, and the bytes of objects in their answers."""

    lists: int = 0
    heads: int = 0
    gets: int = 0
    body_bytes: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(
            self.lists + other.lists,
            self.heads + other.heads,
            self.gets + other.gets,
            self.body_bytes + other.body_bytes,
        )

    def times(self, number: int) -> Count:
        return Count(self.lists * number, self.heads * number, self.gets * number, self.body_bytes * number)

    def __str__(self) -> str:
        return f"{self.lists} lists, {self.heads} HEAD, {self.gets} GET, {self.body_bytes} bytes"


def read_checkpoint(directory: Path) -> Checkpoint:
    """The layout of a directory of safetensors files, with or without an index."""
    names = list(directory.iterdir())
    index = [path.stat().st_size for path in names if path.name.endswith(".index.json")]
    files = sorted(path for path in names if path.suffix == ".safetensors")
    return Checkpoint(len(names), sum(index), tuple(map(_read_weights, files)))


def _read_weights(path: Path) -> Weights:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return weights(file.read(length), path.stat().st_size)


def weights(header: bytes, size_bytes: int) -> Weights:
    """The layout that a header describes; `header` is without its length field."""
    start = 8 + len(header)
    entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
    offsets = sorted(tuple(entry["data_offsets"]) for entry in entries)
    return Weights(size_bytes, start, tuple((start + first, start + last) for first, last in offsets))


def segments(file: Weights) -> list[int]:
    """The sizes of the segments: tensors that follow each other, as many as fit, and at least one."""
    sizes = []
    first = 0
    while first < len(file.tensors):
        start, last = file.tensors[first][0], first + 1
        while last < len(file.tensors) and file.tensors[last][1] - start <= SEGMENT_BYTES:
            last += 1
        sizes.append(file.tensors[last - 1][1] - start)
        first = last
    return sizes


def pages(checkpoint: Checkpoint) -> int:
    return max(1, -(-checkpoint.names // PAGE_NAMES))


def opened(checkpoint: Checkpoint) -> Count:
    """The first bytes and the checksum of every object, when they are opened for the first time."""
    lengths = list(_lengths(checkpoint))
    body_bytes = sum(min(size_bytes, FIRST_BYTES) for size_bytes, _ in lengths)
    return Count(pages(checkpoint), len(lengths), len(lengths), body_bytes)


def rests(checkpoint: Checkpoint) -> Count:
    """The rests of headers and of the index, where these are longer than the first bytes."""
    gets = body_bytes = 0
    for _, parsed_bytes in _lengths(checkpoint):
        rest_bytes = max(0, parsed_bytes - FIRST_BYTES)
        gets += -(-rest_bytes // REST_BYTES)
        body_bytes += rest_bytes
    return Count(gets=gets, body_bytes=body_bytes)


def blocks(checkpoint: Checkpoint, block_bytes: int) -> Count:
    """The tensors: as few ranges of at most `block_bytes` of each segment as possible."""
    sizes = [size_bytes for file in checkpoint.files for size_bytes in segments(file)]
    return Count(gets=sum(-(-size_bytes // block_bytes) for size_bytes in sizes), body_bytes=sum(sizes))


def read_twice_bytes(checkpoint: Checkpoint) -> int:
    """Of tensors that came with the first bytes. Up to so many come from an empty tier instead, the second
    time: it may have kept them by then."""
    return sum(max(0, min(file.size_bytes, FIRST_BYTES) - file.header_bytes) for file in checkpoint.files)


def versions(checkpoint: Checkpoint) -> Count:
    """A load of what is warm or in the tier, and a check of a warm set: only versions are asked for."""
    return Count(pages(checkpoint), len(list(_lengths(checkpoint))))


def first_load(checkpoint: Checkpoint, block_bytes: int) -> Count:
    """A load of a checkpoint that the daemon has never opened, with an empty tier or without one."""
    return opened(checkpoint) + rests(checkpoint) + blocks(checkpoint, block_bytes)


def first_in_warm_set(checkpoint: Checkpoint, block_bytes: int) -> Count:
    """The daemon looks which version there is, and then stages it."""
    return first_load(checkpoint, block_bytes) + versions(checkpoint)


def new_version_in_warm_set(checkpoint: Checkpoint, block_bytes: int) -> Count:
    """All files have changed: their versions are asked for, headers are read anew, and it is staged."""
    headers = opened(checkpoint) + rests(checkpoint)
    return headers + versions(checkpoint) + blocks(checkpoint, block_bytes)


def first_loads_behind_cache(checkpoint: Checkpoint, block_bytes: int, nodes: int) -> Count:
    """Of the store, behind a cache that keeps ranges of a named version: these are asked for once."""
    once = rests(checkpoint) + blocks(checkpoint, block_bytes)
    return opened(checkpoint).times(nodes) + once


def least_seconds(body_bytes: int, rate_bytes: float) -> float:
    """No start of a fleet is faster than the store, which gives `rate_bytes` a second."""
    return body_bytes / rate_bytes


def _lengths(checkpoint: Checkpoint) -> Iterator[tuple[int, int]]:
    """Of each object: its size, and how much of it is parsed."""
    if checkpoint.index_bytes:
        yield checkpoint.index_bytes, checkpoint.index_bytes
    for file in checkpoint.files:
        yield file.size_bytes, file.header_bytes


def split(kinds: Sequence[str], first: str) -> list[list[int]]:
    """Positions of `kinds`, in groups that each begin with `first`. Earlier ones are left out."""
    groups: list[list[int]] = []
    for position, kind in enumerate(kinds):
        if kind == first:
            groups.append([])
        if groups:
            groups[-1].append(position)
    return groups
