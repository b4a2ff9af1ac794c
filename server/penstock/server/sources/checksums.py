"""Checksums of whole files: the values that stores and users give, and how values of parts are joined.

CRCs can be joined in any order (`Runs`). So the thread that read some bytes computes their CRC, while they
are in its cache. SHA-256 has to follow the bytes in order.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hashlib import _Hash

CRC64NVME = "CRC64NVME"
CRC32C = "CRC32C"
SHA256 = "SHA-256"

_CRC_BYTES = {CRC64NVME: 8, CRC32C: 4}
_SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Checksum:
    """The checksum of all bytes of a file."""

    algorithm: str
    value: str
    """Hexadecimal digits in lower case."""

    @property
    def is_crc(self) -> bool:
        """Whether values of parts can be joined."""
        return self.algorithm in _CRC_BYTES


def crc_checksum(algorithm: str, value: int) -> Checksum:
    return Checksum(algorithm, f"{value:0{2 * _CRC_BYTES[algorithm]}x}")


def crc_in_base64(algorithm: str, text: str) -> Checksum | None:
    """Parses a value as headers of stores have it. None if it is malformed or has another length."""
    try:
        value = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return Checksum(algorithm, value.hex()) if len(value) == _CRC_BYTES[algorithm] else None


def sha256_checksum(text: str) -> Checksum | None:
    """Parses 64 hexadecimal digits. None for anything else."""
    text = text.lower()
    return Checksum(SHA256, text) if _SHA256.fullmatch(text) else None


@functools.cache
def _crc_functions(algorithm: str) -> tuple[Callable[[Any, int], int], Callable[[int, int, int], int]]:
    """Two functions: the CRC of bytes, and the CRC of two neighbours. The library is imported when it is
    first needed, which takes 0.15 s."""
    from awscrt import checksums

    if algorithm == CRC64NVME:
        return checksums.crc64nvme, checksums.combine_crc64nvme
    return checksums.crc32c, checksums.combine_crc32c


def crc(algorithm: str, parts: Sequence[memoryview | bytes | bytearray], before: int = 0) -> int:
    """The CRC of the parts one after the other, behind bytes with the CRC `before`. Does not hold the
    interpreter's lock."""
    compute, _ = _crc_functions(algorithm)
    for part in parts:
        before = compute(part, before)
    return before


class Runs:
    """CRCs of ranges of a file, joined as soon as they touch. Each byte must be added once."""

    def __init__(self, algorithm: str) -> None:
        self.algorithm = algorithm
        self._from: dict[int, tuple[int, int]] = {}
        """Key: the first byte of a run. Value: its end, and its CRC."""
        self._until: dict[int, int] = {}
        """Key: the end of a run. Value: its first byte."""

    def add(self, start: int, end: int, value: int) -> None:
        if end == start:
            return
        _, combine = _crc_functions(self.algorithm)
        if start in self._until:
            first = self._until.pop(start)
            _, before = self._from.pop(first)
            value, start = combine(before, value, end - start), first
        if end in self._from:
            last, after = self._from.pop(end)
            del self._until[last]
            value, end = combine(value, after, last - end), last
        self._from[start] = (end, value)
        self._until[end] = start

    def of(self, start: int, end: int) -> int | None:
        """The CRC of exactly that range. None if a part of it is missing, or if it is a part of a longer
        run."""
        if start == end:
            return 0
        found = self._from.get(start)
        return found[1] if found is not None and found[0] == end else None


@dataclass(slots=True)
class Prefix:
    """Checksums of the first bytes of a file: of its header, when that was parsed."""

    algorithms: tuple[str, ...] = ()
    """The algorithms whose CRCs are wanted."""
    size_bytes: int = 0
    crcs: dict[str, int] = field(default_factory=dict)
    _sha256: _Hash = field(default_factory=hashlib.sha256)

    def add(self, part: memoryview | bytes | bytearray) -> None:
        """Adds the bytes that follow."""
        for algorithm in self.algorithms:
            self.crcs[algorithm] = crc(algorithm, [part], self.crcs.get(algorithm, 0))
        self._sha256.update(part)
        self.size_bytes += len(part)

    def sha256(self) -> _Hash:
        """A copy, to go on with."""
        return self._sha256.copy()

    def differs(self, other: Prefix) -> bool:
        """Whether the two are of different bytes."""
        return self._sha256.digest() != other._sha256.digest()
