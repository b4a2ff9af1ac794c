"""Who gets slabs next, and how many: users in turn, and each user's loads in the order in which they came.

The first load in the order is not overtaken by smaller loads behind it. It gets:

- Its whole checkpoint, if that fits what the load may take: as soon as so much memory is free, or can be
  freed by evicting idle checkpoints, least recently used first.
- Otherwise a window (`demand.py`). It starts with less if less is free.
- A window also for a checkpoint that would fit, if for `PATIENCE_SECONDS` the memory was leased to clients
  that hold tensors of ended loads, or to loads that make no progress. Such leases may last for ever. The
  window then takes the memory that is free, if the largest tensor fits.
- A prefetch is of no use as a window. It lets the loads behind it pass after that time.

The first load keeps other users waiting for a bounded time only:

- A load whose own user holds too much waits aside. The loads behind it of the same user wait too, while some
  of the memory that this user holds will be given back by itself.
- A load that finds all memory leased lets other users pass after `PATIENCE_SECONDS`.
- A load that waits for running loads keeps the memory that they give back from other users for
  `TURN_SECONDS`. Then it gives its turn away. In its next turn it may wait twice as long, so it gets its
  memory in the end even if every load takes long.

A load that waits longer than the queue timeout fails with an error.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from ..entry import CacheEntry
from .demand import Demand
from .shares import Shares
from .turns import Turns

PATIENCE_SECONDS = 2.0
TURN_SECONDS = 15.0
STILL_SECONDS = 10.0
"""If for so long a load's client has taken nothing and its reads have brought nothing, the load is no more
certain to give memory back than a lease."""
TELL_PLACES_SECONDS = 0.25


class Buffer(Protocol):
    """The staging buffer as the queue uses it."""

    def available(self) -> int:
        """Slabs that may be taken now."""

    def make_room(self, count: int) -> bool:
        """Evicts as many idle checkpoints as it takes to have `count` available. If that cannot suffice,
        evicts none."""

    def memory_will_return(self, uid: int | None = None) -> bool:
        """Whether some slabs (of `uid`, if that is given) belong to a load that makes progress, rather than
        to one that does not, to tensors that clients hold, or to pins."""


@dataclass(slots=True, eq=False)
class _Waiting:
    entry: CacheEntry
    demand: Demand
    owner: int
    """The uid of the load for which the entry was made."""
    number: int
    """A number in the order of arrival."""
    timer: asyncio.TimerHandle
    patient_since: float | None = None
    """Since when it has been next while no memory would return by itself."""
    first_since: float | None = None
    """Since when it has been next and has kept other users waiting."""
    turn_seconds: float = TURN_SECONDS

    @property
    def uid(self) -> int:
        """The user whose turn it waits for. A user who joins a prefetch of root's gets it as its own."""
        return self.owner if self.entry.owner_uid is None else self.entry.owner_uid


class WaitingLine:
    """Checkpoints that wait for slabs. Decides which is next; takes no slabs and starts nothing."""

    def __init__(
        self,
        buffer: Buffer,
        shares: Shares,
        *,
        timeout_seconds: float,
        on_expire: Callable[[CacheEntry, Demand], None],
        on_patience: Callable[[], None],
    ) -> None:
        """`on_expire` is called with an entry that waited too long, and waits no more. `on_patience` is
        called when the head may accept a smaller grant, or lets others pass, although no slabs were freed."""
        self._buffer = buffer
        self._shares = shares
        self._timeout_seconds = timeout_seconds
        self._on_expire = on_expire
        self._on_patience = on_patience
        self._queue: deque[_Waiting] = deque()
        """In the order of arrival."""
        self._numbers = itertools.count()
        self._turns = Turns()
        self._places: dict[CacheEntry, int] | None = None
        """The order in which entries get slabs. None: to be computed again."""
        self._telling: asyncio.TimerHandle | None = None
        self._looking: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[CacheEntry]:
        return iter([waiting.entry for waiting in self._queue])

    def join(self, entry: CacheEntry, demand: Demand, owner: int) -> None:
        """`owner` is the uid of the load for which the entry was made."""
        timer = asyncio.get_running_loop().call_later(self._timeout_seconds, self._expire, entry)
        self._queue.append(_Waiting(entry, demand, owner, next(self._numbers), timer))
        self.reorder()

    def leave(self, entry: CacheEntry) -> None:
        """Removes the entry; does nothing if it does not wait."""
        for waiting in list(self._queue):
            if waiting.entry is entry:
                self._remove(waiting)

    def reorder(self) -> None:
        """To be called when an entry joined, left, was served, or became another user's."""
        self._places = None
        # Soon, and not at every change: with many waiting, that would be the work that they wait for.
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(TELL_PLACES_SECONDS, self._tell_places)

    def place(self, entry: CacheEntry) -> int:
        """The position in the order of grants if nobody else joins: 1 is next, 0 means that it does not
        wait."""
        if self._places is None:
            turns = sorted(
                (self._turns.next_of(uid) + behind, waiting.number, waiting.entry)
                for uid, line in self._lines().items()
                for behind, waiting in enumerate(line)
            )
            self._places = {entry: place for place, (_, _, entry) in enumerate(turns, start=1)}
        return self._places.get(entry, 0)

    def next_granted(self) -> tuple[CacheEntry, int] | None:
        """Removes the entry that gets slabs now, and returns it with their number, for which there is room
        then."""
        lines = self._lines()
        for uid in sorted(lines, key=lambda uid: (self._turns.next_of(uid), lines[uid][0].number)):
            waiting, count = self._first_of(lines[uid])
            if waiting is None:
                continue
            if count:
                self._turns.take(uid)
                self._remove(waiting)
                return waiting.entry, count
            if self._keeps_waiting(waiting, alone=len(lines) == 1):
                break
        if self._queue and self._looking is None:  # no event says that a load makes no progress any more
            self._looking = asyncio.get_running_loop().call_later(PATIENCE_SECONDS, self._look_again)
        return None

    def _look_again(self) -> None:
        self._looking = None
        self._on_patience()

    def _lines(self) -> dict[int, list[_Waiting]]:
        """The waiting entries of each user, in the order of arrival."""
        lines: dict[int, list[_Waiting]] = {}
        for waiting in self._queue:
            lines.setdefault(waiting.uid, []).append(waiting)
        return lines

    def _first_of(self, line: list[_Waiting]) -> tuple[_Waiting | None, int]:
        """The entry of one user that is next, and how many slabs it gets now. None: all wait aside."""
        buffer, owner_uid = self._buffer, line[0].entry.owner_uid
        share = self._shares.left(owner_uid)
        for waiting in line:
            if share < waiting.demand.minimum and self._shares.would_exceed(
                owner_uid, waiting.demand.minimum
            ):
                if buffer.memory_will_return(owner_uid):
                    return None, 0
                continue
            count = self._grantable(waiting, share)
            if not count and waiting.demand.whole_only and self._out_of_patience(waiting):
                continue
            return waiting, count
        return None, 0

    def _keeps_waiting(self, first: _Waiting, *, alone: bool) -> bool:
        """Whether the users behind it must wait for the same memory. If not, it may have given its turn
        away."""
        if alone or self._out_of_patience(first):
            first.first_since = None
            return False
        loop = asyncio.get_running_loop()
        if first.first_since is None:
            first.first_since = loop.time()
            loop.call_later(first.turn_seconds + 0.01, self._on_patience)
        if loop.time() - first.first_since < first.turn_seconds:
            return True
        first.first_since = None
        first.turn_seconds *= 2
        self._turns.take(first.uid)
        self.reorder()
        return False

    def _remove(self, waiting: _Waiting) -> None:
        self._queue.remove(waiting)
        waiting.timer.cancel()
        self.reorder()

    def _tell_places(self) -> None:
        self._telling = None
        for waiting in self._queue:
            waiting.entry.notify()

    def _expire(self, entry: CacheEntry) -> None:
        for waiting in self._queue:
            if waiting.entry is entry:
                self._remove(waiting)
                self._on_expire(entry, waiting.demand)
                return

    def _grantable(self, first: _Waiting, share: int) -> int:
        """How many slabs an entry that is next gets now; 0 if none yet."""
        buffer, demand = self._buffer, first.demand
        window = min(demand.window, share)
        whole = demand.whole if demand.whole <= share else 0
        if share >= demand.minimum and buffer.make_room(whole or window):
            return whole or window
        if buffer.memory_will_return():
            first.patient_since = None
        elif first.patient_since is None:
            loop = asyncio.get_running_loop()
            first.patient_since = loop.time()
            loop.call_later(PATIENCE_SECONDS + 0.01, self._on_patience)
        if self._out_of_patience(first):
            least = demand.minimum
        elif whole:
            return 0
        else:
            least = min(demand.start, window)
        return min(buffer.available(), window) if share >= demand.minimum and buffer.make_room(least) else 0

    def _out_of_patience(self, first: _Waiting) -> bool:
        since = first.patient_since
        return since is not None and asyncio.get_running_loop().time() - since >= PATIENCE_SECONDS
