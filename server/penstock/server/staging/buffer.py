"""The staging buffer: which checkpoints are in it, who shares them, and what is evicted for others.

A load joins an entry that serves it. If there is none, a new entry is made and waits for slabs
(`waiting.py`). `shares.py` computes how much each user may have.

No load holds slabs while it waits for more, so there is no deadlock. A load that waits longer than the queue
timeout fails, and the error gives the reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Hashable, Mapping

from ..checkpoint.catalog import Checkpoint
from ..checkpoint.plan import Selection
from ..config.settings import Config
from ..config.units import show_size
from ..errors import ShuttingDownError, StagingExhaustedError
from ..sources.kept import Writers
from ..system import failure
from ..system.counts import Totals
from ..system.headroom import spare_bytes
from ..system.log import event
from ..system.shown import shown_source
from .contents import Contents
from .demand import Demand, measure
from .entry import CacheEntry, EntryContext
from .keeping import Keeper
from .members import Holder
from .phase import Phase
from .pool import SlabPool, Workers
from .reader import ReaderPool
from .shares import Shares, Usage
from .sharing import Group, find, superseded, terms_of
from .slab import Slab
from .upkeep import Upkeep
from .waiting import PATIENCE_SECONDS, STILL_SECONDS, WaitingLine

logger = logging.getLogger(__name__)


class StagingBuffer:
    """Decides about sharing and eviction, at once over plain state. All methods run on the event loop."""

    def __init__(
        self,
        config: Config,
        *,
        readers: Mapping[str, ReaderPool],
        workers: Workers,
        hashers: Workers,
        totals: Totals,
        writers: Writers | None = None,
        spare: Callable[[], int] = spare_bytes,
    ) -> None:
        """`readers` has the reader threads for each kind of source, `hashers` the threads on which SHA-256
        follows the reading. `writers` write the copies that files keep of it. `spare` says how much memory
        the system has to spare, as `spare_bytes` does."""
        self._config = config
        self._readers = readers
        self._workers = workers
        self._totals = totals
        self.pool = SlabPool(
            slab_bytes=config.slab_bytes,
            max_slabs=config.max_slabs,
            workers=workers,
            on_free=self._grant,
        )
        self.entries: dict[int, CacheEntry] = {}
        self._draining: set[CacheEntry] = set()
        """Entries that were evicted while reads wrote into some of their slabs. Each keeps these slabs until
        its reads end."""
        self._context = EntryContext(
            self,
            readers,
            totals,
            Keeper(writers),
            patience_seconds=max(config.queue_timeout_seconds, PATIENCE_SECONDS),
            hashers=hashers,
        )
        self._shares = Shares(self.entries, self._draining, max_slabs=config.max_slabs)
        self._queue = WaitingLine(
            self,
            self._shares,
            timeout_seconds=config.queue_timeout_seconds,
            on_expire=self._expire,
            on_patience=self._grant,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._granting = False
        self._stopped = False
        self._upkeep = Upkeep(
            config,
            self.pool,
            workers,
            may_populate=lambda: not self._queue,
            evict_idle=self._evict_idle,
            evict_for=self._evict_for,
            spare=spare,
        )

    @property
    def populating(self) -> bool:
        """Whether the pages of the buffer are being made."""
        return self._upkeep.populating

    @property
    def capacity_bytes(self) -> int:
        """The most bytes that all slabs together may have: the limit in whole slabs."""
        return self.pool.max_slabs * self.pool.slab_bytes

    # ---- for loads ------------------------------------------------------------------------------

    def demand(
        self, checkpoint: Checkpoint, selection: Selection, memory_limit: int | None, uid: int
    ) -> Demand:
        """The demand that `enter` needs. Takes a while for very many tensors. Raises
        MemoryLimitTooSmallError."""
        return measure(
            checkpoint,
            selection,
            memory_limit=memory_limit,
            uid=uid,
            config=self._config,
            at_once_bytes=max(
                (self._readers[file.kind].at_once_bytes for file in checkpoint.files), default=0
            ),
        )

    def enter(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        demand: Demand,
        *,
        key: Hashable,
        holder: Holder,
        group: Group | None,
        owner_uid: int | None,
        made_for: Selection | None = None,
        keep_old: bool = False,
    ) -> CacheEntry:
        """Joins an entry, or queues a new one, which then owns `checkpoint`.

        A new entry is made for `made_for` if that is given: `selection` is then all of it, or its end. `key`
        holds the entry from now on; the caller must call `leave(key)`. The slabs will go to the user
        `owner_uid`; None means that no user is known yet. `keep_old` leaves entries with older versions of
        the files in the buffer.
        """
        found = find(
            self.entries.values(),
            checkpoint,
            selection,
            uid=holder.uid,
            group=group,
            whole_only=demand.whole_only,
        )
        if found is not None and self._shares.too_large(found[0], holder.uid):
            if found[0].started and found[0].idle:
                self._evict(found[0])
            found = None
        if found is not None:
            entry, skipped = found
            self._totals.stage_hits += 1
            entry.hold(key, holder, skipped=skipped, window=group.window if group else "")
            if owner_uid is not None and entry.owner_uid is None:
                entry.assign(owner_uid)
                self._queue.reorder()
            return entry
        self._totals.stage_misses += 1
        if not keep_old:
            self.evict_old_versions(checkpoint, holder.since)
        made_for = made_for or selection
        terms = terms_of(group, self.entries.values(), checkpoint, owner_uid=owner_uid)
        entry = CacheEntry(Contents(checkpoint, made_for), terms, self._context, owner_uid=owner_uid)
        entry.hold(key, holder, skipped=made_for.tensor_count - selection.tensor_count)
        self.entries[entry.id] = entry
        self._queue.join(entry, demand, holder.uid)
        self._grant()
        return entry

    def place(self, entry: CacheEntry) -> int:
        """The entry's position in the queue: 1 is next, 0 means that it does not wait."""
        return self._queue.place(entry)

    # ---- for the queue --------------------------------------------------------------------------

    def available(self) -> int:
        return self.pool.available

    def make_room(self, count: int) -> bool:
        """Evicts as many idle checkpoints as it takes, least recently used first. If that cannot make enough
        room, it evicts none. Checkpoints that a warm set names come after the others. Entries whose cancelled
        reads still run come last, since some of their slabs stay in use."""
        evictable = [entry for entry in self.entries.values() if entry.evictable and not entry.pinned]
        if self.pool.available + sum(entry.unused_slabs for entry in evictable) < count:
            return False
        for entry in sorted(evictable, key=lambda entry: (entry.stuck, entry.wanted, entry.last_used)):
            if self.pool.available >= count:
                break
            self._evict(entry)
        return True

    async def spare_bytes(self, *, evicting: bool, evicting_wanted: bool) -> int:
        """How much a checkpoint can have that a warm set names: what is free, and with `evicting` what
        others use that is only warm, or even, with `evicting_wanted`, what the set names and does not pin.
        Without a limit no more than the system has to spare."""
        evictable = sum(
            entry.unused_slabs
            for entry in self.entries.values()
            if evicting and entry.idle and not entry.pinned and (evicting_wanted or not entry.wanted)
        )
        slabs = self.pool.available + evictable
        if self._config.trims:
            spare = max(0, await self._upkeep.spare_slabs())
            slabs = min(slabs, self.pool.free_slabs + evictable + spare)
        return slabs * self.pool.slab_bytes

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

    # ---- for operators --------------------------------------------------------------------------

    def evict(self, match: Callable[[CacheEntry], bool]) -> tuple[int, int]:
        """Unpins every matching entry and evicts it: at once if nobody holds it, else when its last holder
        leaves. Returns the bytes (freed, still leased)."""
        freed = leased = 0
        for entry in [entry for entry in self.entries.values() if match(entry)]:
            entry.unpin()
            slabs = len(entry.slabs)
            if entry.evictable:
                self._evict(entry)
            leased += len(entry.slabs)
            freed += slabs - len(entry.slabs)
        return freed * self.pool.slab_bytes, leased * self.pool.slab_bytes

    def evict_old_versions(self, checkpoint: Checkpoint, since: float) -> None:
        """What was made before `since` with other versions of these files, pinned or not: memory is for what
        can still be loaded, and that no longer can."""
        old = superseded(self.entries.values(), checkpoint, since=since)
        for entry in old:
            source = ",".join(entry.checkpoint.sources[:3])
            fields = {"stage": entry.id, "source": source, "pinned": entry.pinned}
            event(logger, "changed in storage", fields)
        self.evict(lambda entry: entry in old)

    def usage(self) -> Usage:
        return Usage.of(self.pool, self.entries.values(), self._draining, waiting=len(self._queue))

    def reconsider(self) -> None:
        """The event loop calls this now and then. Nothing reports that an entry hangs, and an entry that
        waits for the memory of such a one may now accept a smaller grant."""
        if self._queue:
            self._grant()

    async def keep(self) -> None:
        """Runs the background work, for ever."""
        await self._upkeep.run()

    async def stop(self) -> None:
        """Evicts every idle entry, grants no more slabs, and ends the workers."""
        self._stopped = True
        for entry in self._queue:
            self._queue.leave(entry)
            entry.fail(_stopped_while_waiting())
        await asyncio.gather(*self._tasks)
        self.evict(lambda entry: True)
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
            self._close(entry)
        self._grant()

    def entry_drained(self, entry: CacheEntry, slabs: list[Slab]) -> None:
        self._draining.discard(entry)
        self.pool.release(slabs)

    # ---- inside ---------------------------------------------------------------------------------

    def _evict_idle(self, since: float) -> None:
        self.evict(
            lambda entry: entry.idle and not entry.pinned and not entry.wanted and entry.last_used <= since
        )

    def _evict_for(self, free_slabs: int) -> None:
        """For the system: what is only warm, least recently used first, until so many slabs are free."""
        warm = [entry for entry in self.entries.values() if entry.idle and not entry.pinned and entry.started]
        for entry in sorted(warm, key=lambda entry: (entry.wanted, entry.last_used)):
            if self.pool.free_slabs >= free_slabs:
                return
            self._evict(entry)

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
            self._close(entry)
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

    def _evict(self, entry: CacheEntry) -> None:
        self._totals.evictions += 1
        self._close(entry)

    def _close(self, entry: CacheEntry) -> None:
        self.entries.pop(entry.id, None)
        idle_since = entry.last_used if entry.idle else None
        free = entry.close()
        if entry.slabs:
            self._draining.add(entry)
        self.pool.release(free, idle_since=idle_since)


def _stopped_while_waiting() -> ShuttingDownError:
    return ShuttingDownError("penstockd stopped while the load waited for memory; try again in a moment")
