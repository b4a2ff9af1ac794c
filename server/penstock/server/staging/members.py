"""Who shares an entry: its holders, and the group that a window waits for. Pure."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from ..errors import CheckpointCorruptError


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the slabs, shown to people. Times are of the loop's clock."""

    uid: int
    pid: int
    name: str
    since: float
    group: str = ""
    """The name of its load's group."""
    on_corrupt: Callable[[CheckpointCorruptError], object] | None = field(default=None, compare=False)
    """Called when a file of the entry does not match its checksum: bytes that the load was told of may be
    wrong."""


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """The group of a window."""

    name: str = ""
    """Name of the group; empty for loads without a group."""
    window: str = ""
    """The name that the window had before a restart, for a group that goes on after one; else empty."""
    expected: int = 1
    """The window's space is not reused before so many loads have joined, or `Members.stop_expecting` is
    called."""


class Members:
    """The loads that joined an entry. `holders` are those that have not left."""

    def __init__(self, terms: GroupTerms) -> None:
        self.group = terms.name
        self.window = terms.window
        self.joined = 0
        self.holders: dict[Hashable, Holder] = {}
        self.skipped: dict[Hashable, int] = {}
        """For each holder, how many tensors of the selection, from the first on, it does not need."""
        self._expected = terms.expected
        self._joined_of: Counter[str] = Counter()
        """By group, as long as some of it have not left."""
        self._present_of: Counter[str] = Counter()
        self._window_name = secrets.token_hex(8)

    @property
    def expecting(self) -> bool:
        """Whether more members of the group are expected."""
        return self.joined < self._expected

    @property
    def expected(self) -> int:
        return max(self._expected, self.joined)

    def joined_of(self, group: str) -> int:
        """Loads of that group that joined; 0 when all of them have left."""
        return self._joined_of[group]

    def stop_expecting(self) -> None:
        self._expected = self.joined

    def join(self, key: Hashable, holder: Holder, skipped: int, window: str) -> None:
        """`window` is the name of the load's window before a restart, if the load knows it."""
        self.holders[key] = holder
        self.skipped[key] = skipped
        self.window = window or self.window
        self.joined += 1
        if holder.group:
            self._joined_of[holder.group] += 1
            self._present_of[holder.group] += 1

    def leave(self, key: Hashable) -> bool:
        """Returns whether the load was a holder."""
        self.skipped.pop(key, None)
        holder = self.holders.pop(key, None)
        if holder is not None and holder.group:
            self._present_of[holder.group] -= 1
            if not self._present_of[holder.group]:
                del self._present_of[holder.group], self._joined_of[holder.group]
        return holder is not None

    def progress(self) -> tuple[str, int]:
        """The progress that each member receives: the window's name, and how many members have not left."""
        left = self.joined - len(self.holders)
        return self.window or self._window_name, self.expected - left
