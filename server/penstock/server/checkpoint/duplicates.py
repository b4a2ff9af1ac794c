"""Tensors that are in two files of one load: which copy counts. Pure.

The index of a checkpoint decides between the files that it names. A copy of a tensor in another of them is
left over, and is not delivered. If no index decides, the load is refused, since nothing shows which copy is
meant. A file that is named twice is no second file: its tensors are delivered as often as it is named, as
other loaders do.

Names are compared by 64-bit hashes, 8 bytes a tensor. Only names with equal hashes are compared themselves.
So a million tensors take some ten megabytes for about a second. Larger checks run one at a time.
"""

from __future__ import annotations

import contextlib
import threading
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..errors import CheckpointInvalidError
from .headers.table import TensorTable, shown
from .selection import Indices, compact

BUCKET_NAMES = 16_384
"""About how many hashes are compared at once."""
MAX_TWICE = 65_536
"""Most tensors that may be in two files. Checkpoints that were saved twice into one directory have fewer. To
compare so many takes another second."""
LARGE_NAMES = 100_000

_Home = tuple[int | None, str]
"""The number of the index that names a file, and the file's version."""

_large = threading.Lock()


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a load."""

    uri: str
    version: str
    """Equal for the same file, whatever its name."""
    tensors: TensorTable


@dataclass(frozen=True, slots=True)
class Claims:
    """What an index says about `count` files from position `first` on: the files that it names."""

    first: int
    count: int
    names: Callable[[int], Iterable[str]]
    """The names of the tensors that the index puts into a file, by the file's number in the index."""

    def owners(self) -> Iterator[tuple[str, int]]:
        """Names of tensors, each with the position of the file whose copy counts."""
        for number in range(self.count):
            for name in self.names(number):
                yield name, self.first + number


def delivered(shards: Sequence[Shard], claims: Sequence[Claims]) -> tuple[Indices, ...] | None:
    """The tensors of each file that are delivered; None if all are.

    Raises CheckpointInvalidError for a tensor that is in two files if no index decides.
    """
    tables = {shard.version: shard.tensors for shard in shards}
    total = sum(map(len, tables.values()))
    homes = _homes(shards, claims)
    with _large if total > LARGE_NAMES else contextlib.nullcontext():
        twice = _hashes_in_two(tables, total)
        if len(twice) > MAX_TWICE:
            raise CheckpointInvalidError(
                f"{shards[0].uri} and the other files of the load hold {len(twice)} tensors twice, more than "
                f"{MAX_TWICE}; delete the files that are out of date"
            )
        dropped = _superseded(shards, claims, tables, homes, frozenset(twice)) if twice else {}
        left = {home: _without(len(tables[home[1]]), indices) for home, indices in dropped.items()}
    if not left:
        return None
    return tuple(
        left[home] if home in left else range(len(shard.tensors))
        for home, shard in zip(homes, shards, strict=True)
    )


def _homes(shards: Sequence[Shard], claims: Sequence[Claims]) -> list[_Home]:
    """For each file the index that names it."""
    numbers: list[int | None] = [None] * len(shards)
    for number, claim in enumerate(claims):
        numbers[claim.first : claim.first + claim.count] = [number] * claim.count
    return [(number, shard.version) for number, shard in zip(numbers, shards, strict=True)]


def _hashes_in_two(tables: Mapping[str, TensorTable], total: int) -> array[int]:
    """Hashes that names in two different files share; nearly always the names are the same."""
    count = 1
    while count * BUCKET_NAMES < total:
        count *= 2
    buckets = [array("q") for _ in range(count)]
    add = [bucket.append for bucket in buckets]
    for table in tables.values():
        for name in table.names():
            value = hash(name)
            add[value & (count - 1)](value)
    twice = array("q")
    for bucket in buckets:
        if len(set(bucket)) < len(bucket):
            twice.extend(value for value, found in Counter(bucket).items() if found > 1)
    return twice


def _superseded(
    shards: Sequence[Shard],
    claims: Sequence[Claims],
    tables: Mapping[str, TensorTable],
    homes: Sequence[_Home],
    hashes: frozenset[int],
) -> dict[_Home, array[int]]:
    """The tensors that are not delivered, among those whose names have one of the hashes."""
    dropped: dict[_Home, array[int]] = {}
    places: dict[str, list[tuple[str, int]]] = {}
    for version, table in tables.items():
        for index, name in enumerate(table.names()):
            if hash(name) in hashes:
                places.setdefault(name, []).append((version, index))
    counts: dict[str, dict[int, str]] = {}
    for number, claim in enumerate(claims):
        for name, position in claim.owners():
            if name in places:
                counts.setdefault(name, {})[number] = shards[position].version
    places_of: dict[str, set[int | None]] = {}
    for number_of, version in homes:
        places_of.setdefault(version, set()).add(number_of)
    for name, found in places.items():
        left = []
        for version, index in found:
            loses = [
                number
                for number, owner in counts.get(name, {}).items()
                if owner != version and number in places_of[version]
            ]
            for number in loses:
                dropped.setdefault((number, version), array("I")).append(index)
            if len(loses) < len(places_of[version]):
                left.append(version)
        if len(left) > 1:
            uris = {shard.version: shard.uri for shard in reversed(shards)}
            raise _in_two(name, uris[left[0]], uris[left[1]])
    return dropped


def _in_two(name: str, first: str, second: str) -> CheckpointInvalidError:
    return CheckpointInvalidError(
        f"{first} and {second} both hold tensor {shown(name)}, and no index says which one counts; delete "
        "the file that is "
        "out of date, or load them one at a time",
        file=second,
        tensor=name[:200],
    )


def _without(count: int, dropped: array[int]) -> Indices:
    counts = bytearray(b"\1") * count
    for index in dropped:
        counts[index] = 0
    return compact(array("I", (index for index in range(count) if counts[index])))
