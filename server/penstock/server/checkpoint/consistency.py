"""Whether the files of a checkpoint agree with their index, and which copy counts of a tensor in two files.

What was compared is remembered by the files' versions, so a warm load compares nothing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from ..errors import CheckpointInvalidError
from .duplicates import Claims, Shard, delivered
from .files import Checkpoint
from .headers.parsers import Parsers
from .headers.table import Header, TensorTable
from .shards import IndexFile

CHECKED_INDEXES = 1_000
"""How many indexes are remembered as compared with their files."""
REMEMBERED_DISTINCT = 1_000
"""How many checkpoints are remembered as having no tensor in two files."""
_NAMES_AT_ONCE = 100_000


@dataclass(frozen=True, slots=True)
class Indexed:
    """The files of a checkpoint that an index names: those from number `first` on."""

    by: IndexFile
    first: int


class Consistency:
    """Compares on the parser thread, whose users take turns. Thread-safe."""

    def __init__(self, parsers: Parsers) -> None:
        self._parsers = parsers
        self._checked = _Remembered(CHECKED_INDEXES)
        self._distinct = _Remembered(REMEMBERED_DISTINCT)

    def check(self, one: Indexed, checkpoint: Checkpoint, uid: int) -> None:
        """Compares an index with the headers of its files, unless that was done lately. Raises
        CheckpointInvalidError."""
        index = one.by
        numbers = slice(one.first, one.first + len(index.files))
        state = hashlib.sha256(index.version.encode())
        for file in checkpoint.files[numbers]:
            state.update(f"\0{file.version}".encode())
        key = state.hexdigest()
        if key in self._checked:
            return
        headers = checkpoint.headers[numbers]
        self._parsers.here(uid, lambda: _check_index(index, headers))
        self._checked.add(key)

    def once_each(self, checkpoint: Checkpoint, indexed: Sequence[Indexed], uid: int) -> Checkpoint:
        """The checkpoint without copies of tensors that are not delivered. Raises CheckpointInvalidError if a
        tensor is in two files and no index decides between them."""
        if len(checkpoint.files) < 2 or checkpoint.version in self._distinct:
            return checkpoint
        shards = [
            Shard(file.uri, file.version, header.tensors)
            for file, header in zip(checkpoint.files, checkpoint.headers, strict=True)
        ]
        claims = [Claims(one.first, len(one.by.files), one.by.names) for one in indexed]
        chosen = self._parsers.here(uid, lambda: delivered(shards, claims))
        if chosen is not None:
            return checkpoint.deliver(chosen)
        self._distinct.add(checkpoint.version)
        return checkpoint


class _Remembered:
    """The keys that were added or found last. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._keys: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        with self._lock:
            if key not in self._keys:
                return False
            self._keys.move_to_end(key)
            return True

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, key: str) -> None:
        with self._lock:
            self._keys[key] = None
            while len(self._keys) > self._most:
                self._keys.popitem(last=False)


def _check_index(index: IndexFile, headers: Sequence[Header]) -> None:
    for number, header in enumerate(headers):
        missing = _missing(index.names(number), header.tensors)
        if missing is not None:
            raise CheckpointInvalidError(
                f"{index.location} says that {index.files[number]} holds tensor {missing[:200]!r}, which it "
                "does not; fetch both again, or delete the index",
                file=index.location,
                tensor=missing[:200],
            )


def _missing(names: Iterable[str], table: TensorTable) -> str | None:
    """A name that the table lacks, if there is one. Holds few names at once, as strings take several times as
    much memory as a table."""
    names = iter(names)
    while some := set(islice(names, _NAMES_AT_ONCE)):
        some.difference_update(table.names())
        if some:
            return min(some)
    return None
