"""What is between the files that keep their bytes on a local disk and the buffer that has these bytes in
memory: protocols, so that neither knows the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable


class Keep(Protocol):
    """A hold on what is kept of one version of a file. It outlives the open file. Every thread may use it;
    no method waits for a disk."""

    def missing(self, start: int, end: int) -> tuple[int, int] | None:
        """The first part of a range of the file that is not kept, of at most one write. None: there is none,
        or nothing can be kept now."""

    def write(
        self,
        start: int,
        end: int,
        views: Sequence[memoryview],
        copied: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        """Keeps the bytes of that range, which `missing` gave, unless something prevents it. Calls `copied`
        as soon as the views are not needed any more, which no disk can delay, and `done` when another write
        may begin; both on another thread, once."""

    def pin(self, pinned: bool) -> None:
        """Whether it goes only after everything that is not pinned."""

    def rest(self) -> None:
        """Nothing more is to be written: what is kept may go for others again. A pin stays."""

    def release(self) -> None:
        """Ends the hold, and its pin. Releasing twice is releasing once."""


@runtime_checkable
class KeptFile(Protocol):
    """An open file that keeps what is read of it."""

    @property
    def disk_bytes(self) -> int:
        """How many bytes were read from the local disk, and not from the store."""

    def keep(self) -> Keep | None:
        """A hold for who has its bytes; the caller releases it. None: nothing can be kept now."""

    def keep_bytes(self, offset: int, views: Sequence[memoryview]) -> None:
        """Keeps bytes that are in no slab, such as a header, if there is memory for a copy."""


class Writers(Protocol):
    """The threads that write what is kept."""

    @property
    def free(self) -> bool:
        """A write that begins now need not wait for another."""

    def call_when_free(self, call: Callable[[], object]) -> None:
        """From now on `call` is called, on another thread, when a write of `keep_bytes` ended: of those the
        caller of `Keep.write` does not know."""


@runtime_checkable
class HasFirstBytes(Protocol):
    """An open file that may hold its first bytes, as they came with the answer that says its version."""

    def drop_first_bytes(self) -> None:
        """They will not be read: the header is known. A load keeps thousands of files open."""


@runtime_checkable
class Remote(Protocol):
    """A source that asks for a file's version and its first bytes in one request."""

    def remember(self, location: str) -> None:
        """The first bytes of the file there are kept: opening it the next time asks for its version alone."""
