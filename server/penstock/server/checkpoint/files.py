"""The files of one checkpoint: open, with parsed headers, and with the charges for what they take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property, partial

from ..sources import SourceFile
from ..sources.resuming import MountSet, seen_writes
from ..sources.verification import Expected
from ..system.statx import root_mount
from . import plan
from .headers.budget import Parts
from .headers.keep import Kept
from .headers.table import Header, TensorTable
from .opening import Descriptors
from .plan import Segment
from .selection import Indices, Selection, listed_bytes

NAMING_BYTES = 64
"""Bytes that each naming of a file takes, beside what the file takes once."""
_FILE_BYTES = 2048
"""What an open file takes as objects, besides its location. Measured: 1600 bytes."""
SELECTION_TIMES = 3
"""So often a load has the tensors that it selects: as such, and in its segments or its slices of them; and
once more when a group goes on."""
_LOCATION_TIMES = 4
"""So often an open object has its location: as such, as its URI, in its version, and in parts."""


@dataclass(frozen=True)
class Checkpoint:
    """Files loaded together, in order, and open. The owner must `close` it.

    A file that was named twice is there twice, and open once.
    """

    sources: tuple[str, ...]
    files: tuple[SourceFile, ...]
    headers: tuple[Header, ...]
    delivered: tuple[Indices, ...] | None = None
    """For each file the tensors that are delivered. None: all of them, as no tensor is in two files."""
    warnings: tuple[str, ...] = ()
    """Oddities of the files, for the log and the caller."""
    kept: tuple[Kept, ...] = ()
    """The charges for the headers, held as long as this object lives."""
    descriptors: Descriptors | None = None
    expected: tuple[Expected, ...] = ()
    """What each file is verified by; empty for none."""
    lists: Parts | None = None
    """The charge for the objects of its files, and for the lists of tensors and segments that are made of it,
    held as long as this object lives."""
    stale_seconds: float | None = None
    """Its store could not be asked: how long ago the store said that it has these versions. None: it was
    asked."""

    def segments_within(self, selection: Selection, capacity_bytes: int) -> list[Segment]:
        """The segments of `plan.segments_within`. Takes a while for very many tensors. Raises as
        `Charge.resize` does."""
        if self.lists is None:
            return plan.segments_within(self.tables, selection, capacity_bytes)
        reserve = partial(self.lists.set, "segments")
        return plan.segments_within(self.tables, selection, capacity_bytes, reserve)

    def charge_selection(self, selection: Selection) -> None:
        """Charges what a load keeps of a selection of its tensors. Raises as `Charge.resize` does."""
        if self.lists is not None:
            self.lists.set("selection", SELECTION_TIMES * listed_bytes(selection.files))

    def deliver(self, chosen: tuple[Indices, ...]) -> Checkpoint:
        """The same checkpoint with only these tensors delivered, for which it is charged. Raises as
        `Charge.resize` does."""
        if self.lists is not None:
            self.lists.set("delivered", listed_bytes(chosen))
        return replace(self, delivered=chosen)

    @property
    def tables(self) -> tuple[TensorTable, ...]:
        return tuple(header.tensors for header in self.headers)

    @cached_property
    def version(self) -> str:
        """Identifies the bytes: for every file its place and version, which of its tensors are delivered, the
        writes that this daemon saw, and the mounts behind the files. `continues` compares it with the version
        of another daemon."""
        state = hashlib.sha256()
        for file in self.files:
            state.update(f"{file.uri}\0{file.portable_version}\0".encode())
        if self.delivered is not None:
            state.update(Selection(self.delivered).digest().encode())
        root = root_mount()
        mounts = MountSet.of(f"{root.id:x}" if root.id else "", [file.mount for file in self.files])
        writes = seen_writes([file.writes_before for file in self.files])
        return f"{state.hexdigest()[:32]}{writes}{mounts}"

    def without_headers(self) -> Checkpoint:
        """The same files without their headers. Closing either object closes both."""
        return replace(self, headers=(), kept=())

    def close(self) -> None:
        """Closes the files. A second call does nothing."""
        for file in set(self.files):
            file.close()
        if self.descriptors is not None:
            self.descriptors.release()


def files_bytes(count: int, characters: int) -> int:
    """What so many open files take as objects, whose locations have so many characters together."""
    return count * _FILE_BYTES + _LOCATION_TIMES * characters
