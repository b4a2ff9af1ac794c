"""Where segments live in a ring of slabs, what state each is in, and who still needs it. Pure.

    PLANNED --begin--> READING --read--> READY --all consumers released--> FREE
       ^                  |
       +-----cancel-------+            (reading stopped because nobody wants it any more)
       +--no consumer needs it--> FREE

Position p of the endless ring lives at p mod capacity. A window reads a segment only where it overwrites
nothing but FREE ones. A full ring has room for all and frees none.

The ring does no I/O, wakes nobody and knows no clocks; `entry.py` does all that.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from itertools import accumulate

from ..checkpoint.plan import Segment, ring_bytes, ring_pages, span_bytes
from ..system.linux import PAGE_BYTES

WAITS_FOR_OTHERS = "others of its window to join or to release what they have"


class SegmentState(enum.Enum):
    PLANNED = enum.auto()
    READING = enum.auto()
    READY = enum.auto()
    FREE = enum.auto()


_TRANSITIONS = {
    (SegmentState.PLANNED, SegmentState.READING),
    (SegmentState.READING, SegmentState.READY),
    (SegmentState.READING, SegmentState.PLANNED),
    (SegmentState.PLANNED, SegmentState.FREE),
    (SegmentState.READY, SegmentState.FREE),
}


class SegmentRing:
    """The life of one checkpoint's segments in a ring of `capacity_bytes`.

    Assumes that no single segment needs more than the capacity. `hold_back` keeps a window from being
    recycled while more consumers are expected; call `recycle` after clearing it.
    """

    def __init__(self, segments: Sequence[Segment], capacity_bytes: int) -> None:
        self.segments = segments
        self.capacity_bytes = capacity_bytes
        self.full = ring_bytes(segments) <= capacity_bytes
        self.hold_back = False
        self._pages = ring_pages(segments)
        self._firsts = list(accumulate((len(segment.tensors) for segment in segments), initial=0))
        """How many tensors precede each segment; the last item counts all of them."""
        self._states = [SegmentState.PLANNED] * len(segments)
        self._next = 0
        """No segment below this is PLANNED."""
        self._freed = 0
        """Segments below this are FREE, and no others are."""
        self._released: dict[Hashable, int] = {}
        self.ready_bytes = 0
        self.total_bytes = sum(segment.size_bytes for segment in segments)
        self._unready = len(segments)

    @property
    def complete(self) -> bool:
        """Whether every segment that anybody needs has been read, freed since or not."""
        return self._unready == 0

    @property
    def recycled(self) -> bool:
        """Whether some bytes are gone. A load that needs them cannot join any more."""
        return self._freed > 0

    @property
    def released_tensors(self) -> int:
        """Tensors of the segments that are FREE."""
        return self._firsts[self._freed]

    def segment_of(self, tensor: int) -> int:
        """The index of the segment that holds tensor number `tensor`, in order of delivery. A number past the
        last tensor gives the index past the last segment."""
        return bisect_right(self._firsts, tensor) - 1

    @property
    def consumers(self) -> int:
        return len(self._released)

    def state(self, index: int) -> SegmentState:
        return self._states[index]

    def ring_offset(self, index: int) -> int:
        return (self._pages[index] + self.segments[index].start % PAGE_BYTES) % self.capacity_bytes

    def join(self, consumer: Hashable, first: int = 0) -> None:
        """From now on nothing is freed that `consumer` has not released. It does not need segments below
        `first`."""
        if first < self._freed:
            raise ValueError(f"segment {first} was recycled already")
        self._released[consumer] = first

    def leave(self, consumer: Hashable) -> None:
        self._released.pop(consumer, None)
        self.recycle()

    def release(self, consumer: Hashable, count: int) -> None:
        """`consumer` no longer needs segments below `count`. A count that goes back or past the end changes
        nothing."""
        if consumer in self._released:
            self._released[consumer] = max(self._released[consumer], min(count, len(self.segments)))
            self.recycle()

    def begin_reads(self) -> list[int]:
        """Moves every segment for which there is room to READING, and returns their indices, earliest first.
        In a full ring that all consumers joined in the middle, the segments that they need come before the
        others."""
        begun = []
        while self._next < len(self.segments) and self._fits(self._next):
            if self._states[self._next] is SegmentState.PLANNED:
                self._move(self._next, SegmentState.READING)
                begun.append(self._next)
            self._next += 1
        wanted_from = min(self._released.values(), default=0)
        return sorted(begun, key=lambda index: (index < wanted_from, index))

    def in_the_way(self, consumer: Hashable, index: int) -> list[Hashable]:
        """The consumers that have not released segments which `consumer` has released, so that there is no
        room for segment `index`, when `consumer` has released all before it. Empty if it waits for something
        else."""
        if self._states[index] is not SegmentState.PLANNED or self._released.get(consumer, 0) < index:
            return []
        return [other for other, count in self._released.items() if count < index]

    def waits_for(self, consumer: Hashable, index: int) -> str:
        """What keeps the bytes of segment `index` from `consumer`, in words; empty if they are there."""
        if self._states[index] is SegmentState.READY:
            return ""
        if self._states[index] is SegmentState.READING or self._fits(index):
            return "storage"
        if self._released.get(consumer, 0) <= self._freed:
            return "its client to release what it has"
        return WAITS_FOR_OTHERS

    def read(self, index: int) -> None:
        """All bytes of the segment are in the ring."""
        self._move(index, SegmentState.READY)
        self._unready -= 1
        self.ready_bytes += self.segments[index].size_bytes
        self.recycle()

    def cancel(self, index: int) -> None:
        """Reading the segment was cancelled before it was complete."""
        self._move(index, SegmentState.PLANNED)
        self._next = min(self._next, index)

    def _fits(self, index: int) -> bool:
        if self.full or self._freed == len(self.segments):
            return True
        segment = self.segments[index]
        end = self._pages[index] + span_bytes(segment.start, segment.end)
        return end - self._pages[self._freed] <= self.capacity_bytes

    def recycle(self) -> None:
        """Frees segments that every consumer has released or never needed."""
        if self.full or self.hold_back or not self._released:
            return
        wanted_from = min(self._released.values())
        while self._freed < wanted_from and self._states[self._freed] is not SegmentState.READING:
            if self._states[self._freed] is SegmentState.PLANNED:
                self._unready -= 1
            self._move(self._freed, SegmentState.FREE)
            self._freed += 1

    def _move(self, index: int, to: SegmentState) -> None:
        move = (self._states[index], to)
        if move not in _TRANSITIONS:
            raise AssertionError(f"segment {index}: {move[0].name} cannot become {to.name}")
        self._states[index] = to
