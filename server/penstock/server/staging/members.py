"""Who shares an entry: its holders, and the group that a window waits for. Pure."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the slabs, for people. Times are of the loop's clock."""

    uid: int
    pid: int
    name: str
    since: float
    group: str = ""
    """The name of its load's group."""


@dataclass(frozen=True, slots=True)
class GroupTerms:
    """What a window is shared by."""

    name: str = ""
    """Of the group; empty for loads that belong to none."""
    window: str = ""
    """Of a group that goes on after a restart: what its window was called; else empty."""
    expected: int = 1
    """A window is not recycled before so many loads joined, or `Members.stop_expecting`."""


class Members:
    """The loads that joined an entry, of which `holders` have not left."""

    def __init__(self, terms: GroupTerms) -> None:
        self.group = terms.name
        self.window = terms.window
        self.joined = 0
        self.holders: dict[Hashable, Holder] = {}
        self.skipped: dict[Hashable, int] = {}
        """How many tensors of the selection each holder does not need, from the first one on."""
        self._expected = terms.expected
        self._joined_of: Counter[str] = Counter()
        """By group, as long as some of it have not left."""
        self._present_of: Counter[str] = Counter()
        self._window_name = secrets.token_hex(8)

    @property
    def expecting(self) -> bool:
        """More of the group are to come."""
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
        """`window` is what the load's window was called before a restart, if it tells."""
        self.holders[key] = holder
        self.skipped[key] = skipped
        self.window = window or self.window
        self.joined += 1
        if holder.group:
            self._joined_of[holder.group] += 1
            self._present_of[holder.group] += 1

    def leave(self, key: Hashable) -> bool:
        """Whether it had joined and not left."""
        self.skipped.pop(key, None)
        holder = self.holders.pop(key, None)
        if holder is not None and holder.group:
            self._present_of[holder.group] -= 1
            if not self._present_of[holder.group]:
                del self._present_of[holder.group], self._joined_of[holder.group]
        return holder is not None

    def progress(self) -> tuple[str, int]:
        """What each is told of its group: the window's name, and how many members have not left."""
        left = self.joined - len(self.holders)
        return self.window or self._window_name, self.expected - left
