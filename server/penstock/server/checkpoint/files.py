"""The files of one checkpoint: open, with parsed headers, and with the charges for what they take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

from ..sources import SourceFile
from ..sources.resuming import MountSet
from ..sources.verification import Expected
from ..system.statx import root_mount
from . import plan
from .headers.budget import Charge
from .headers.keep import Kept
from .headers.table import Header, TensorTable
from .opening import Descriptors
from .plan import Segment
from .selection import Indices, Selection

FILE_OBJECT_BYTES = 64
"""Bytes that each naming of a file takes, beside what the file takes once."""


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
    lists: Charge | None = None
    """The charge for the lists of its files and of its segments, held as long as this object lives."""
    stale_seconds: float | None = None
    """Its store could not be asked: how long ago the store said that it has these versions. None: it was
    asked."""

    def segments_within(self, selection: Selection, capacity_bytes: int) -> list[Segment]:
        """The segments of `plan.segments_within`. Takes a while for very many tensors. Raises as
        `Charge.resize` does."""
        if self.lists is None:
            return plan.segments_within(self.tables, selection, capacity_bytes)
        reserve, before_bytes = self.lists.resize, FILE_OBJECT_BYTES * len(self.files)
        return plan.segments_within(
            self.tables, selection, capacity_bytes, lambda size_bytes: reserve(before_bytes + size_bytes)
        )

    @property
    def tables(self) -> tuple[TensorTable, ...]:
        return tuple(header.tensors for header in self.headers)

    @cached_property
    def version(self) -> str:
        """Identifies the bytes: for every file its place and version, which of its tensors are delivered, and
        the mounts behind them. `continues` compares it with the version of another daemon."""
        state = hashlib.sha256()
        for file in self.files:
            state.update(f"{file.uri}\0{file.portable_version}\0".encode())
        if self.delivered is not None:
            state.update(Selection(self.delivered).digest().encode())
        root = root_mount()
        mounts = MountSet.of(f"{root.id:x}" if root.id else "", [file.mount for file in self.files])
        return f"{state.hexdigest()[:32]}{mounts}"

    def without_headers(self) -> Checkpoint:
        """The same files without their headers. Closing either object closes both."""
        return replace(self, headers=(), kept=())

    def close(self) -> None:
        """Closes the files. A second call does nothing."""
        for file in set(self.files):
            file.close()
        if self.descriptors is not None:
            self.descriptors.release()
