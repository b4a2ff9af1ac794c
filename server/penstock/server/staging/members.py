"""Who shares an entry: its holders, which of its segments each still needs, and the group that a window waits
for. Pure."""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from ..errors import CheckpointCorruptError
from .ring import SegmentRing


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
    """The loads that joined an entry. `holders` are those that have not left. Once the segments are laid out
    in a ring, the ring frees none that a holder has not released."""

    def __init__(self, terms: GroupTerms) -> None:
        self.group = terms.name
        self.window = terms.window
        self.joined = 0
        self.holders: dict[Hashable, Holder] = {}
        self._skipped: dict[Hashable, int] = {}
        """For each holder, how many tensors of the selection, from the first on, it does not need."""
        self._ring: SegmentRing | None = None
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

    def lay_out(self, ring: SegmentRing) -> None:
        """From now on the entry's segments are in `ring`."""
        self._ring = ring
        for key, skipped in self._skipped.items():
            ring.join(key, ring.segment_of(skipped))
        self._update_hold_back()

    def stop_expecting(self) -> None:
        """Waits for no further members."""
        self._expected = self.joined
        self._update_hold_back()

    def join(self, key: Hashable, holder: Holder, skipped: int, window: str) -> None:
        """The load does not need the first `skipped` tensors. `window` is the name of its window before a
        restart, if the load knows it."""
        self.holders[key] = holder
        self._skipped[key] = skipped
        self.window = window or self.window
        self.joined += 1
        if holder.group:
            self._joined_of[holder.group] += 1
            self._present_of[holder.group] += 1
        if self._ring is not None:
            self._ring.join(key, self._ring.segment_of(skipped))
            self._update_hold_back()

    def leave(self, key: Hashable) -> bool:
        """Returns whether the load was a holder."""
        self._skipped.pop(key, None)
        holder = self.holders.pop(key, None)
        if holder is None:
            return False
        if holder.group:
            self._present_of[holder.group] -= 1
            if not self._present_of[holder.group]:
                del self._present_of[holder.group], self._joined_of[holder.group]
        if self._ring is not None:
            self._ring.leave(key)
        return True

    def in_the_way(self, key: Hashable, segment: int) -> list[Holder]:
        """The holders that must release what they have before there is room for a segment that `key` waits
        for (`SegmentRing.in_the_way`)."""
        assert self._ring is not None
        return [self.holders[other] for other in self._ring.in_the_way(key, segment) if other in self.holders]

    def progress(self) -> tuple[str, int]:
        """The progress that each member receives: the window's name, and how many members have not left."""
        left = self.joined - len(self.holders)
        return self.window or self._window_name, self.expected - left

    def _update_hold_back(self) -> None:
        if self._ring is not None:
            self._ring.hold_back = self.expecting
            self._ring.recycle()
