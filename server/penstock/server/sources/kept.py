"""Protocols between files that keep their bytes on a local disk and the buffer that has these bytes in
memory, so that neither knows the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from . import Access


class Keep(Protocol):
    """A hold on the kept bytes of one version of a file. It may outlive the open file. Thread-safe; no method
    waits for a disk."""

    def missing(self, start: int, end: int) -> tuple[int, int] | None:
        """The first part of a range of the file that is not kept, as much as one write takes. None: there is
        none, or nothing can be kept now."""

    def write(
        self,
        start: int,
        end: int,
        views: Sequence[memoryview],
        copied: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        """Keeps the bytes of a range that `missing` returned, unless something prevents it. Calls `copied` as
        soon as the views are no longer needed, which no disk can delay. Calls `done` when another write may
        begin. Both are called once, on another thread."""

    def pin(self, pinned: bool) -> None:
        """With `pinned` it is evicted only after everything that is not pinned."""

    def rest(self) -> None:
        """Says that nothing more will be written, so the kept bytes may be evicted again. A pin stays."""

    def release(self) -> None:
        """Ends the hold and its pin. A second call does nothing."""


@runtime_checkable
class KeptFile(Protocol):
    """An open file that keeps the bytes that are read from it."""

    @property
    def kept_version(self) -> str:
        """What its version is called where its bytes are kept."""

    def take_disk_bytes(self, start: int, end: int) -> int:
        """How many bytes of that range came from the local disk, and not from the store, since this was asked
        last."""

    def has(self, start: int, end: int) -> bool:
        """All of that range is on the local disk."""

    @property
    def keeps_more(self) -> bool:
        """What is not there can be kept now."""

    def keep(self) -> Keep | None:
        """A hold for a caller that has its bytes, and that must release it. None: nothing can be kept now."""

    def keep_bytes(self, offset: int, views: Sequence[memoryview]) -> None:
        """Keeps bytes that are not in a slab, such as a header, if there is memory for a copy."""


class Writers(Protocol):
    """The threads that write to the local disk."""

    @property
    def free(self) -> bool:
        """Whether a write that begins now need not wait for another."""

    def call_when_free(self, call: Callable[[], object]) -> None:
        """From now on `call` is called, on another thread, when a write of `keep_bytes` or a removal has
        ended. The caller of `Keep.write` does not learn of these otherwise."""


@runtime_checkable
class HasFirstBytes(Protocol):
    """An open file that may hold its first bytes, as they came with the answer that says its version."""

    def drop_first_bytes(self) -> None:
        """They will not be read: the header is known. A load keeps thousands of files open."""


@runtime_checkable
class Remote(Protocol):
    """A source that requests a file's version and its first bytes together."""

    def remember(self, location: str) -> None:
        """Says that the first bytes of the file there are kept. Opening it the next time requests its version
        alone."""

    def permit(self, location: str, access: Access) -> None:
        """Asks nobody. Raises AccessDeniedError for a caller for whom the storage would not even be asked."""


@runtime_checkable
class LocalVersion(Protocol):
    """An open file whose `version` means something only until the machine is started again, and only in one
    mount namespace."""

    @property
    def lasting_version(self) -> str:
        """The same for longer, without the mount: what its file system will say of it the next time."""

    @property
    def place(self) -> str:
        """The mount that it was opened through, as `resuming.Place` has it."""


@runtime_checkable
class Settling(Protocol):
    """An open file whose version may be made of a time that counts in steps."""

    @property
    def settled(self) -> bool:
        """It was written long enough ago for another write to give it another version."""
