"""What every version of every file holds: a pure function of the file's name and the version.

Whoever has a tensor can say from its name and its bytes alone which version it is of, and whether all of
it is. The kind of a file is the first part of its name, as in "many-0".
"""

from __future__ import annotations

import functools
import json
import os
import random
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

PAGE_BYTES = 4096
LARGEST_BYTES = 6 << 20
_STEP = 0x9E3779B97F4A7C15
_RAMP = np.arange(LARGEST_BYTES // 8 + 2, dtype=np.uint64) * np.uint64(_STEP)


@dataclass(frozen=True, slots=True)
class Spec:
    """One tensor of a file. `start` counts from the first byte of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


_SIZES = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}


def _many(random: random.Random) -> list[int]:
    return [random.choice((0, 1, 7, 40, 4096, 20_000)) for _ in range(300)]


def _plain(random: random.Random) -> list[int]:
    return [random.randrange(100_000, 900_000) for _ in range(8)]


def _large(random: random.Random) -> list[int]:
    return [random.randrange(1_000_000, 2_000_000) for _ in range(14)]


def _giant(random: random.Random) -> list[int]:
    """One tensor that small limits refuse."""
    return [50_000, 5 << 20, 0, 70_000, 300_000]


def _exact(random: random.Random) -> list[int]:
    """Every tensor fills one slab of 2 MiB to its last byte."""
    return [2 << 20] * 5


def _one(random: random.Random) -> list[int]:
    return [1]


_KINDS: dict[str, Callable[[random.Random], list[int]]] = {
    "many": _many,
    "plain": _plain,
    "vary": _plain,
    "large": _large,
    "giant": _giant,
    "exact": _exact,
    "one": _one,
}


@functools.lru_cache(512)
def layout(file: str, version: int) -> tuple[Spec, ...]:
    """The tensors of a file, in order. Versions differ in it only for files whose kind is "vary"."""
    kind = file.split("-")[0]
    source = random.Random(f"{file} {version if kind == 'vary' else 0}")
    specs = []
    start = _data_start(file)
    for number, wished in enumerate(_KINDS[kind](source)):
        dtype = "U8" if wished % 8 else source.choice(tuple(_SIZES))
        count = wished // _SIZES[dtype]
        shape: tuple[int, ...] = (2, count // 2) if count % 2 == 0 and count else (count,)
        if wished == 8 and source.random() < 0.5:
            dtype, shape = "I64", ()
        specs.append(Spec(f"{file}/{number:04d}", dtype, shape, start, wished))
        start += wished
    return tuple(specs)


def _data_start(file: str) -> int:
    """On a page: what "fits exactly" then does. Off it for some, so that this is tried too."""
    return 64 * 1024 + (0 if file.startswith("exact") else zlib.crc32(file.encode()) % 5 * 8)


def claim(file: str, version: int, number: int) -> int:
    """The first eight bytes of a tensor."""
    return version << 32 | zlib.crc32(f"{file}/{number}".encode())


def content(file: str, version: int, number: int, size_bytes: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a tensor."""
    words = _RAMP[: size_bytes // 8 + 1] + np.uint64(claim(file, version, number))
    data: np.ndarray[Any, np.dtype[np.uint8]] = words.view(np.uint8)[:size_bytes]
    return data


def claimed_version(file: str, number: int, data: np.ndarray[Any, np.dtype[np.uint8]]) -> int:
    """The version that a tensor of at least eight bytes says it is of. Raises ValueError."""
    word = int(data[:8].copy().view(np.uint64)[0])
    version = word >> 32
    if word != claim(file, version, number):
        raise ValueError(f"begins with {word:#x}, which no version of it does")
    return version


def wanted(spec: Spec, selection: str | None) -> bool:
    """Selections are "every:N:M", tensors whose number is M modulo N, or None for all."""
    if selection is None:
        return True
    every, rest = map(int, selection.split(":")[1:])
    return int(spec.name[-4:]) % every == rest


def largest(file: str, version: int, selection: str | None) -> tuple[int, int]:
    """Bytes of the largest tensor, and the most room in a ring, which has whole pages of the file, that one
    needs."""
    size_bytes = ring_bytes = 0
    for spec in layout(file, version):
        if spec.size_bytes and wanted(spec, selection):
            end = -(-(spec.start + spec.size_bytes) // PAGE_BYTES)
            size_bytes = max(size_bytes, spec.size_bytes)
            ring_bytes = max(ring_bytes, (end - spec.start // PAGE_BYTES) * PAGE_BYTES)
    return size_bytes, ring_bytes


@functools.lru_cache(64)
def encoded(file: str, version: int) -> bytes:
    """The whole file."""
    specs = layout(file, version)
    first = _data_start(file)
    header = json.dumps(
        {
            spec.name: {
                "dtype": spec.dtype,
                "shape": spec.shape,
                "data_offsets": [spec.start - first, spec.start - first + spec.size_bytes],
            }
            for spec in specs
        }
    ).encode()
    parts = [(first - 8).to_bytes(8, "little"), header.ljust(first - 8)]
    parts += [content(file, version, number, spec.size_bytes).tobytes() for number, spec in enumerate(specs)]
    return b"".join(parts)


def replace(path: Path, version: int) -> None:
    """Atomically, by rename."""
    temporary = path.with_suffix(".new")
    temporary.write_bytes(encoded(path.stem, version))
    temporary.chmod(0o644)
    os.rename(temporary, path)


def overwrite(path: Path, version: int, *, truncate: bool, pause_seconds: float) -> None:
    """In place, in a few writes with pauses between them."""
    data = encoded(path.stem, version)
    with path.open("r+b", buffering=0) as file:
        if truncate:
            file.truncate(0)
        step = len(data) // 4 + 1
        for offset in range(0, len(data), step):
            os.pwrite(file.fileno(), data[offset : offset + step], offset)
            time.sleep(pause_seconds)
        file.truncate(len(data))
