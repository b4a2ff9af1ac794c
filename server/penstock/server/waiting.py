"""Who gets slabs next, and how many: first in, first out.

A large load at the head of the queue is not overtaken by small ones behind it. What the head gets:

- Its whole checkpoint, if that fits what it may take: as soon as so much is free or can be freed by
  evicting idle checkpoints, least recently used first.
- Otherwise a window (`demand.py`). It starts with less if less is free.
- A checkpoint that would fit but finds the memory leased, by clients that hold tensors of loads that
  ended, starts as a window too after `PATIENCE_SECONDS` of that: such leases may last for ever. It then
  takes what there is, if its largest tensor fits.
- A prefetch is of no use as a window. It lets those behind it pass after that time.

One whose user holds too much already waits aside, and one that waits longer than the queue timeout is
told so.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from .demand import Demand
from .staged import StagedCheckpoint

PATIENCE_SECONDS = 2.0
TELL_PLACES_SECONDS = 0.25


class Buffer(Protocol):
    """What the queue asks of the staging buffer."""

    def available(self) -> int:
        """Slabs that may be taken now."""

    def make_room(self, count: int) -> bool:
        """Evicts as many idle checkpoints as it takes to have `count` available, or none at all."""

    def share_left(self, uid: int | None) -> int:
        """Slabs that loads of `uid` may take beyond what they hold."""

    def memory_will_return(self) -> bool:
        """Some slabs are with a load that runs, rather than with tensors that clients hold or pins."""


@dataclass(slots=True, eq=False)
class _Waiting:
    staged: StagedCheckpoint
    demand: Demand
    timer: asyncio.TimerHandle
    patient_since: float | None = None
    """At the head of the queue, and no memory will return by itself."""


class WaitingLine:
    """Checkpoints that wait for slabs. Decides who is next; takes no slabs and starts nothing."""

    def __init__(
        self,
        buffer: Buffer,
        *,
        timeout_seconds: float,
        on_expire: Callable[[StagedCheckpoint, Demand], None],
        on_patience: Callable[[], None],
    ) -> None:
        """`on_expire` is told who waited too long, and does not wait any more; `on_patience` that the head of
        the queue may be content with less than a moment ago."""
        self._buffer = buffer
        self._timeout_seconds = timeout_seconds
        self._on_expire = on_expire
        self._on_patience = on_patience
        self._queue: deque[_Waiting] = deque()
        self._telling: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[StagedCheckpoint]:
        return iter([waiting.staged for waiting in self._queue])

    def join(self, staged: StagedCheckpoint, demand: Demand) -> None:
        timer = asyncio.get_running_loop().call_later(self._timeout_seconds, self._expire, staged)
        self._queue.append(_Waiting(staged, demand, timer))

    def leave(self, staged: StagedCheckpoint) -> None:
        """Also one that does not wait."""
        for waiting in list(self._queue):
            if waiting.staged is staged:
                self._remove(waiting)

    def place(self, staged: StagedCheckpoint) -> int:
        """1 is next, 0 is not waiting."""
        for number, waiting in enumerate(self._queue, start=1):
            if waiting.staged is staged:
                return number
        return 0

    def next_granted(self) -> tuple[StagedCheckpoint, int] | None:
        """Takes out the one that gets slabs now, with how many, for which there is room then."""
        for waiting in filter(self._within_share, self._queue):
            if count := self._grantable(waiting):
                self._remove(waiting)
                return waiting.staged, count
            if not (waiting.demand.whole_only and self._out_of_patience(waiting)):
                break
        return None

    def _remove(self, waiting: _Waiting) -> None:
        self._queue.remove(waiting)
        waiting.timer.cancel()
        # Soon, and not at every change: with many waiting that would be what they wait for.
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(TELL_PLACES_SECONDS, self._tell_places)

    def _tell_places(self) -> None:
        self._telling = None
        for waiting in self._queue:
            waiting.staged.notify()

    def _expire(self, staged: StagedCheckpoint) -> None:
        for waiting in self._queue:
            if waiting.staged is staged:
                self._remove(waiting)
                self._on_expire(staged, waiting.demand)
                return

    def _within_share(self, waiting: _Waiting) -> bool:
        return self._buffer.share_left(waiting.staged.uid) >= waiting.demand.bare

    def _grantable(self, head: _Waiting) -> int:
        """How many slabs the head of the queue gets now; 0 is none yet."""
        buffer, demand = self._buffer, head.demand
        share = buffer.share_left(head.staged.uid)
        window = min(demand.window, share)
        whole = demand.whole if demand.whole <= share else 0
        if buffer.make_room(whole or window):
            return whole or window
        if buffer.memory_will_return():
            head.patient_since = None
        elif head.patient_since is None:
            loop = asyncio.get_running_loop()
            head.patient_since = loop.time()
            loop.call_later(PATIENCE_SECONDS + 0.01, self._on_patience)
        if self._out_of_patience(head):
            least = demand.bare
        elif whole:
            return 0
        else:
            least = min(demand.least, window)
        return min(buffer.available(), window) if buffer.make_room(least) else 0

    def _out_of_patience(self, head: _Waiting) -> bool:
        since = head.patient_since
        return since is not None and asyncio.get_running_loop().time() - since >= PATIENCE_SECONDS
