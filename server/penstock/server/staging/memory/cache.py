"""The entries in the staging buffer, and which of them are evicted for others.

An entry can be evicted when nobody holds it. A pinned one is evicted by an operator, or when its files have
changed, and not for memory. For memory the order is: least recently used first, what a warm set names after
what is warm by chance, and entries whose cancelled reads still run last.

All of it runs on the event loop. `waiting.py` decides who gets the memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from ...checkpoint.files import Checkpoint
from ...system.counts import Totals
from ...system.log import event
from ..entry import CacheEntry
from ..phase import Phase
from ..pool import SlabPool
from ..sharing import superseded
from ..slab import Slab
from .waiting import STILL_SECONDS

logger = logging.getLogger(__name__)


class EntryCache:
    """Entries, whose slabs are of `pool`. It is the `Buffer` of the queue."""

    def __init__(self, pool: SlabPool, totals: Totals) -> None:
        self.entries: dict[int, CacheEntry] = {}
        """By id: those that wait, are read, are held or are warm."""
        self.draining: set[CacheEntry] = set()
        """Entries that were evicted while reads wrote into some of their slabs. Each keeps these slabs until
        its reads end."""
        self._pool = pool
        self._totals = totals

    def add(self, entry: CacheEntry) -> None:
        self.entries[entry.id] = entry

    # ---- for the queue --------------------------------------------------------------------------

    def available(self) -> int:
        return self._pool.available

    def make_room(self, count: int) -> bool:
        """Evicts as many idle checkpoints as it takes, least recently used first. If that cannot make enough
        room, it evicts none. Checkpoints that a warm set names come after the others. Entries whose cancelled
        reads still run come last, since some of their slabs stay in use."""
        evictable = [entry for entry in self.entries.values() if entry.evictable and not entry.pinned]
        if self._pool.available + sum(entry.unused_slabs for entry in evictable) < count:
            return False
        for entry in sorted(evictable, key=lambda entry: (entry.stuck, entry.wanted, entry.last_used)):
            if self._pool.available >= count:
                break
            self.evict_one(entry)
        return True

    def memory_will_return(self, uid: int | None = None) -> bool:
        """Whether some slabs (of `uid`, if that is given) belong to a load that runs. Slabs that do not
        count: those of loads whose client takes nothing or whose reads hang, those with tensors that clients
        hold, and those that are pinned."""
        return any(
            entry.phase is Phase.STARTING
            or (
                entry.started
                and not entry.idle
                and not (entry.full and entry.complete)
                and not entry.stands_still(STILL_SECONDS)
            )
            for entry in self.entries.values()
            if uid is None or entry.owner_uid == uid
        )

    # ---- for the system's memory ----------------------------------------------------------------

    def idle_slabs(self, *, wanted: bool) -> int:
        """How many slabs would be free if all were evicted that is only warm and not pinned; with `wanted`
        also what a warm set names."""
        return sum(
            entry.unused_slabs
            for entry in self.entries.values()
            if entry.idle and not entry.pinned and (wanted or not entry.wanted)
        )

    def evict_idle(self, since: float) -> None:
        """Evicts what is warm by chance and was not used after `since`."""
        self.evict(
            lambda entry: entry.idle and not entry.pinned and not entry.wanted and entry.last_used <= since
        )

    def evict_for(self, free_slabs: int) -> None:
        """For the system: what is only warm, least recently used first, until so many slabs are free."""
        warm = [entry for entry in self.entries.values() if entry.idle and not entry.pinned and entry.started]
        for entry in sorted(warm, key=lambda entry: (entry.wanted, entry.last_used)):
            if self._pool.free_slabs >= free_slabs:
                return
            self.evict_one(entry)

    # ---- for operators, and for files that changed ----------------------------------------------

    def evict(self, match: Callable[[CacheEntry], bool]) -> tuple[int, int]:
        """Unpins every matching entry and evicts it: at once if nobody holds it, else when its last holder
        leaves. Returns the bytes (freed, still leased)."""
        freed = leased = 0
        for entry in [entry for entry in self.entries.values() if match(entry)]:
            entry.unpin()
            slabs = len(entry.slabs)
            if entry.evictable:
                self.evict_one(entry)
            leased += len(entry.slabs)
            freed += slabs - len(entry.slabs)
        return freed * self._pool.slab_bytes, leased * self._pool.slab_bytes

    def evict_old_versions(self, checkpoint: Checkpoint, since: float) -> None:
        """Evicts what was made before `since` with other versions of these files, pinned or not: memory is
        for what can still be loaded, and that no longer can."""
        old = superseded(self.entries.values(), checkpoint, since=since)
        for entry in old:
            source = ",".join(entry.checkpoint.sources[:3])
            fields = {"stage": entry.id, "source": source, "pinned": entry.pinned}
            event(logger, "changed in storage", fields)
        self.evict(lambda entry: entry in old)

    # ---- one entry ------------------------------------------------------------------------------

    def evict_one(self, entry: CacheEntry) -> None:
        """Counts the eviction, and closes the entry. Only when nobody holds it."""
        self._totals.evictions += 1
        self.close(entry)

    def close(self, entry: CacheEntry) -> None:
        """Takes the entry's slabs back, but for those that its reads write into. Only when nobody holds
        it."""
        self.entries.pop(entry.id, None)
        idle_since = entry.last_used if entry.idle else None
        free = entry.close()
        if entry.slabs:
            self.draining.add(entry)
        self._pool.release(free, idle_since=idle_since)

    def drained(self, entry: CacheEntry, slabs: list[Slab]) -> None:
        """Takes the last slabs of an evicted entry back, whose reads have ended."""
        self.draining.discard(entry)
        self._pool.release(slabs)
