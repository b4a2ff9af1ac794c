"""Gives entries of the staging buffer their slabs and starts them, and takes the slabs back.

    queued (waiting.py says which is next) --> slabs made, segments planned --> started
    idle and not kept warm --> closed: the next in the queue may get its slabs

No load holds slabs while it waits for more, so there is no deadlock. A load that waits longer than the queue
timeout fails, and the error gives the reason. All of it runs on the event loop; slabs are made and segments
are planned on worker threads.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable

from ...config.settings import Config
from ...config.units import show_size
from ...errors import ShuttingDownError, StagingExhaustedError
from ...system import failure
from ...system.counts import Totals
from ...system.log import event
from ...system.shown import shown_source
from ..entry import CacheEntry
from ..phase import Phase
from ..pool import SlabPool, Workers
from ..slab import Slab
from .cache import EntryCache
from .demand import Demand
from .shares import Shares, Usage
from .waiting import WaitingLine

logger = logging.getLogger(__name__)


class Allocator:
    """Over the slabs of one pool. It is the listener of all entries of `cache`."""

    def __init__(self, config: Config, *, workers: Workers, totals: Totals) -> None:
        self.pool = SlabPool(
            slab_bytes=config.slab_bytes,
            max_slabs=config.max_slabs,
            workers=workers,
            on_free=self._grant,
        )
        self.cache = EntryCache(self.pool, totals)
        self.shares = Shares(self.cache.entries, self.cache.draining, max_slabs=config.max_slabs)
        self._config = config
        self._workers = workers
        self._totals = totals
        self._queue = WaitingLine(
            self.cache,
            self.shares,
            timeout_seconds=config.queue_timeout_seconds,
            on_expire=self._expire,
            on_patience=self._grant,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._granting = False
        self._stopped = False

    @property
    def waiting(self) -> int:
        """How many entries wait for slabs."""
        return len(self._queue)

    def usage(self) -> Usage:
        return Usage.of(self.pool, self.cache.entries.values(), self.cache.draining, waiting=self.waiting)

    def join(self, entry: CacheEntry, demand: Demand, uid: int) -> None:
        """Adds an entry, and queues it for its slabs. It was made for a load of `uid`."""
        self.cache.add(entry)
        self._queue.join(entry, demand, uid)
        self._grant()

    def assign(self, entry: CacheEntry, uid: int) -> None:
        """From now on the entry is that user's, and waits in that user's turn."""
        entry.assign(uid)
        self._queue.reorder()

    def place(self, entry: CacheEntry) -> int:
        """The entry's position in the queue: 1 is next, 0 means that it does not wait."""
        return self._queue.place(entry)

    def reconsider(self) -> None:
        """The event loop calls this now and then. Nothing reports that an entry hangs, and an entry that
        waits for the memory of such a one may now accept a smaller grant."""
        if self._queue:
            self._grant()

    async def stop(self) -> None:
        """Evicts every idle entry, grants no more slabs, and ends the workers."""
        self._stopped = True
        for entry in self._queue:
            self._queue.leave(entry)
            entry.fail(_stopped_while_waiting())
        await asyncio.gather(*self._tasks)
        self.cache.evict(lambda entry: True)
        await self.pool.stop()

    # ---- for its entries ------------------------------------------------------------------------

    def entry_read(self, entry: CacheEntry) -> None:
        self._grant()  # a complete checkpoint no longer counts as memory that will return by itself

    def entry_idle(self, entry: CacheEntry) -> None:
        if entry.phase is Phase.STARTING or entry.closed:  # `_start` looks again when its slabs are made
            return
        if not (entry.keeps_warm and (self._config.keeps_warm or entry.pinned)):
            if entry.phase is Phase.QUEUED:
                self._queue.leave(entry)
            self.cache.close(entry)
        self._grant()

    def entry_drained(self, entry: CacheEntry, slabs: list[Slab]) -> None:
        self.cache.drained(entry, slabs)

    # ---- inside ---------------------------------------------------------------------------------

    def _grant(self) -> None:
        """Starts every entry that is next in the queue and can have its slabs now."""
        if self._granting or self._stopped:  # evicting a checkpoint frees slabs, which calls back here
            return
        self._granting = True
        try:
            while (granted := self._queue.next_granted()) is not None:
                entry, count = granted
                entry.grant(count)
                # Slabs are taken here and not in the task, so that they are not granted to the next entry
                # too.
                slabs = self.pool.take(count, entry.owner_uid)
                task = asyncio.get_running_loop().create_task(self._start(entry, count, slabs))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._granting = False

    async def _start(self, entry: CacheEntry, count: int, taken: Awaitable[list[Slab]]) -> None:
        loop = asyncio.get_running_loop()
        slabs: list[Slab] = []
        try:
            slabs = await taken
            segments = await loop.run_in_executor(
                self._workers.of(os.geteuid() if entry.owner_uid is None else entry.owner_uid),
                entry.checkpoint.segments_within,
                entry.contents.selection,
                count * self.pool.slab_bytes,
            )
            if self._stopped:
                entry.fail(_stopped_while_waiting())
            elif entry.holders:
                entry.start(slabs, segments)
        except Exception as error:
            entry.fail(failure.explain(error, f"making {count} slabs of {self.pool.slab_bytes} bytes"))
        if entry.phase is Phase.STARTING:  # all left meanwhile
            self.cache.close(entry)
        if entry.slabs is not slabs:
            self.pool.release(slabs)
        if not entry.holders:
            self.entry_idle(entry)
        elif entry.members.expecting and not entry.full:
            loop.call_later(self._config.group_timeout_seconds, self._stop_expecting, entry)
        self._grant()

    def _stop_expecting(self, entry: CacheEntry) -> None:
        """The members of a group that are there go on without those that have not come."""
        if entry.holders and entry.members.expecting:
            self._totals.group_timeouts += 1
            fields = {
                "group": entry.members.group,
                "group_size": entry.members.expected,
                "group_joined": entry.members.joined,
                "waited_seconds": self._config.group_timeout_seconds,
                "stage": entry.id,
                "source": shown_source(entry.checkpoint.sources),
            }
            event(logger, "group not complete", fields, level=logging.WARNING)
        entry.stop_expecting()

    def _expire(self, entry: CacheEntry, demand: Demand) -> None:
        usage = self.usage()
        wanted = (demand.whole or demand.window) * self.pool.slab_bytes
        missing = (self.pool.max_slabs - self.pool.headroom_slabs) * self.pool.slab_bytes
        others = f", {show_size(missing)} the system does not have" if missing else ""
        entry.fail(
            StagingExhaustedError(
                f"waited {self._config.queue_timeout_seconds:.0f} s for {show_size(wanted)} of a buffer of "
                f"{show_size(self._config.capacity_bytes)}, of which {show_size(usage.leased_bytes)} are "
                f"held by clients and {show_size(usage.reading_bytes)} are being read into{others}; free "
                "tensors of earlier loads, raise --memory-limit, or raise --queue-timeout",
                leased_bytes=usage.leased_bytes,
                reading_bytes=usage.reading_bytes,
            )
        )
        self._grant()


def _stopped_while_waiting() -> ShuttingDownError:
    return ShuttingDownError("penstockd stopped while the load waited for memory; try again in a moment")
