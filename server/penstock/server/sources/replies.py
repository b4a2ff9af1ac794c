"""What stores reply to the questions of one load, so that the same can be replied when they cannot be asked.

A load asks for lists, and opens files. All replies of one load together are of one moment, as replies of
several loads need not be: two files of different versions may never have been there together. So the replies
of a load are kept as a whole, and none is taken from elsewhere.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from ..errors import CheckpointNotFoundError, SourceUnavailableError
from .checksums import Checksum

MAX_REPLIES_BYTES = 1 << 20
"""Of one load, encoded. Ten thousand files take less, unless their names are long."""


class StoreUnreachableError(SourceUnavailableError):
    """Storage answered nothing, or nothing but errors that may pass, and went on so."""


@dataclass(frozen=True, slots=True)
class FileReply:
    """One version of a file. `SourceFile` has the same fields."""

    uri: str
    version: str
    size_bytes: int
    checksums: tuple[Checksum, ...] = ()


@dataclass(slots=True)
class Replies:
    """By location. Every thread may use it."""

    again: bool = False
    """They are given again: nothing is asked of any store."""
    lists: dict[str, list[str] | None] = field(default_factory=dict)
    files: dict[str, FileReply] = field(default_factory=dict)
    missing: set[str] = field(default_factory=set)
    """What was not there. The errors have ids of requests: equal replies would be kept as others."""
    partial: bool = False
    """Something was replied that cannot be replied again."""
    refused: bool = False
    """A store refused something, and not just the prefixes of the caller."""

    @property
    def answered(self) -> bool:
        """A store said what is there, or that something is not."""
        return bool(self.missing or self.lists or self.files)

    def names(self, location: str) -> list[str] | None:
        """What `Source.list` returned. Raises as that did, and StoreUnreachableError if it was not asked."""
        self._check(location, self.lists)
        return self.lists[location]

    def file(self, location: str) -> FileReply:
        """What `Source.open` found. Raises as that did, and StoreUnreachableError if it was not asked."""
        self._check(location, self.files)
        return self.files[location]

    def _check(self, location: str, known: Mapping[str, object]) -> None:
        if location in known:
            return
        if location in self.missing:
            raise CheckpointNotFoundError(
                f"{location}: its store had nothing there when it was last asked, and does not answer now; "
                "check the URI, and load it again when the store answers",
                file=location,
            )
        raise StoreUnreachableError(
            f"{location}: its store cannot be asked, and no earlier load asked for it; load it again when "
            "the store answers",
            file=location,
        )

    def encode(self) -> bytes:
        files = {at: asdict(file) for at, file in self.files.items()}
        return json.dumps([self.lists, files, sorted(self.missing)], sort_keys=True).encode()

    @classmethod
    def decode(cls, data: bytes) -> Replies | None:
        """To be given again. None: another version of this program wrote it."""
        try:
            lists, files, missing = json.loads(data)
            return cls(True, lists, {at: _file_reply(**file) for at, file in files.items()}, set(missing))
        except (TypeError, ValueError, AttributeError):
            return None


def _file_reply(checksums: list[dict[str, str]], **fields: Any) -> FileReply:
    return FileReply(**fields, checksums=tuple(Checksum(**one) for one in checksums))


class ReplyKeeper(Protocol):
    """Keeps the replies to whole loads. Every thread may use it; methods may wait for a disk, for a while."""

    def keep(self, name: str, replies: Replies, uid: int) -> None:
        """They are those that count from now on."""

    def forget(self, name: str, uid: int) -> None:
        """None count until some are kept again."""

    def find(self, name: str, uid: int) -> tuple[Replies, float] | None:
        """Those that were kept last, and how many seconds ago. None: they may not be given again."""

    def is_silent(self, name: str) -> bool:
        """The store was just found silent: it need not be asked."""

    def served(self, name: str) -> None:
        """Its replies were given again, because its store could not be asked."""
