"""Where checkpoints come from: the protocol that every kind of storage implements, and URI dispatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


def source_kind(uri: str) -> str:
    """What `source` is in metrics and status: "file" or "s3"."""
    return "s3" if uri.startswith("s3://") else "file"


class SourceFile(Protocol):
    """One version of one file or object, open for reading. Methods block and may run on many threads."""

    @property
    def uri(self) -> str: ...

    @property
    def version(self) -> str:
        """Equal for equal bytes at the same place; differs after any change."""

    @property
    def size_bytes(self) -> int: ...

    @property
    def alignment(self) -> int:
        """Reads are fastest, or only possible without a copy, at multiples of this."""

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views with the bytes from `offset` on, as far as the file goes.

        Raises CheckpointChangedError when the file turns out shorter than it was, SourceUnavailableError
        when storage fails.
        """

    def check_unchanged(self) -> None:
        """Raises CheckpointChangedError unless all bytes read so far were of `version`."""

    def close(self) -> None:
        """Gives back what it holds open. No read may be under way."""


@dataclass(frozen=True, slots=True)
class Access:
    """What a caller may read: everything, or what begins with one of `prefixes`."""

    uid: int
    privileged: bool
    prefixes: tuple[str, ...]
