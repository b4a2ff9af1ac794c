"""The staging buffer: which checkpoints are in it, who shares them, and what is given up for others.

A load joins a staged checkpoint that serves it, or a new one is made and waits for slabs (`waiting.py`).

A user who is not privileged takes at most seven eighths of what other users leave (`user_share`), so that
whatever one user holds, and for however long, another's load finds room for a window.

Nobody holds slabs while waiting for others, so there is no deadlock; a load that waits longer than
the queue timeout fails with the reason.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Hashable, Mapping
from dataclasses import dataclass

from ..checkpoint.catalog import Checkpoint
from ..checkpoint.plan import Selection
from ..config.settings import Config
from ..config.units import show_size
from ..errors import ShuttingDownError, StagingExhaustedError
from ..system import failure
from ..system.counts import Totals
from ..system.limits import is_privileged, user_share
from ..system.log import event
from .demand import Demand, measure
from .entry import CacheEntry, Holder
from .pool import SlabPool, Workers
from .reader import ReaderPool
from .sharing import Group, expected_members, find, superseded
from .slab import Slab
from .upkeep import Upkeep
from .waiting import PATIENCE_SECONDS, STILL_SECONDS, WaitingLine

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes by state. Their sum never exceeds the limit."""

    free_bytes: int
    reading_bytes: int
    leased_bytes: int
    warm_bytes: int
    peak_bytes: int
    waiting: int
    stuck_bytes: int = 0
    """Of `reading_bytes`: of entries that were given up, and whose reads have not ended."""


class StagingBuffer:
    """Sharing and eviction. All on the event loop; decides at once over plain state."""

    def __init__(
        self, config: Config, *, readers: Mapping[str, ReaderPool], workers: Workers, totals: Totals
    ) -> None:
        """`readers` by kind of source."""
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
        self._queue = WaitingLine(
            self,
            timeout_seconds=config.queue_timeout_seconds,
            on_expire=self._expire,
            on_patience=self._grant,
        )
        self._abandoned: set[CacheEntry] = set()
        """Given up while reads wrote into some of their slabs, which are theirs until these end."""
        self._starting: dict[CacheEntry, int] = {}
        """Those whose slabs are being made, and how many."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._granting = False
        self._stopped = False
        self._upkeep = Upkeep(
            config,
            self.pool,
            workers,
            may_populate=lambda: not self._queue,
            evict_idle=self._evict_idle,
        )

    @property
    def populating(self) -> bool:
        """The buffer's pages are being made."""
        return self._upkeep.populating

    @property
    def capacity_bytes(self) -> int:
        """What all slabs together may have: the limit in whole slabs."""
        return self.pool.max_slabs * self.pool.slab_bytes

    # ---- for loads ------------------------------------------------------------------------------

    def demand(
        self, checkpoint: Checkpoint, selection: Selection, memory_limit: int | None, uid: int
    ) -> Demand:
        """What `enter` needs. Takes a while for very many tensors. Raises MemoryLimitTooSmallError."""
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
    ) -> CacheEntry:
        """Joins a staged checkpoint or queues a new one, which then owns `checkpoint`. A new one is made for
        `made_for`, of which `selection` is all or the end, if that is given.

        `key` holds it from now on; the caller must see to it that `leave(key)` is called. `owner_uid` is the
        uid that will get the slabs; None: nobody yet.
        """
        found = find(
            self.entries.values(),
            checkpoint,
            selection,
            uid=holder.uid,
            group=group,
            whole_only=demand.whole_only,
        )
        if found is not None and self._too_much(found[0], holder.uid):
            if found[0].started and found[0].idle:
                self._evict(found[0])
            found = None
        if found is not None:
            entry, skipped = found
            self._totals.stage_hits += 1
            entry.hold(key, holder, skipped=skipped)
            if group is not None:
                entry.window = group.window or entry.window
            if owner_uid is not None and entry.uid is None:
                self._assign(entry, owner_uid)
                self._queue.reorder()
            return entry
        self._totals.stage_misses += 1
        self._evict_old_versions(checkpoint, holder.since)
        made_for = made_for or selection
        entry = CacheEntry(
            checkpoint,
            made_for,
            uid=owner_uid,
            readers=self._readers,
            block_bytes={kind: pool.block_bytes for kind, pool in self._readers.items()},
            patience_seconds=max(self._config.queue_timeout_seconds, PATIENCE_SECONDS),
            group=group.name if group else "",
            window=group.window if group else "",
            expected_members=expected_members(
                self.entries.values(), checkpoint, owner_uid=owner_uid, group=group
            ),
            on_idle=self._idle,
            on_read=self._read,
            on_block=self._totals.observe_read,
        )
        entry.hold(key, holder, skipped=made_for.tensor_count - selection.tensor_count)
        self.entries[entry.id] = entry
        self._queue.join(entry, demand, holder.uid)
        self._grant()
        return entry

    def place(self, entry: CacheEntry) -> int:
        """Place in the queue; 1 is next, 0 is not waiting."""
        return self._queue.place(entry)

    # ---- for the queue --------------------------------------------------------------------------

    def available(self) -> int:
        return self.pool.available

    def share_left(self, uid: int | None) -> int:
        """Slabs that loads of `uid` may take beyond what they hold: of what other users leave, a user who
        is not privileged gets at most `user_share`."""
        if uid is None or is_privileged(uid):
            return self.pool.max_slabs
        own, others = self._held(uid)
        return max(0, user_share(self.pool.max_slabs - others) - own)

    def holds_too_much(self, uid: int | None, count: int) -> bool:
        """With `count` slabs more, `uid` would have more than its share even if other users had none."""
        if uid is None or is_privileged(uid):
            return False
        own, _ = self._held(uid)
        return own + count > user_share(self.pool.max_slabs)

    def make_room(self, count: int) -> bool:
        """Evicts as many idle checkpoints as it takes, least recently used first, or none at all."""
        idle = [entry for entry in self.entries.values() if entry.started and entry.idle and not entry.pinned]
        forsaken = [entry for entry in self.entries.values() if entry.forsaken and not entry.pinned]
        if self.pool.available + sum(entry.unused_slabs for entry in (*idle, *forsaken)) < count:
            return False
        for group in (idle, forsaken):
            for entry in sorted(group, key=lambda entry: entry.last_used):
                if self.pool.available >= count:
                    break
                self._evict(entry)
        return True

    def memory_will_return(self, uid: int | None = None) -> bool:
        """Some slabs, of `uid` if that is given, are with a load that runs, rather than with one that stands
        still, be it that its client takes nothing or that its reads hang, with tensors that clients hold, or
        with pins."""
        return any(
            entry in self._starting
            or (
                entry.started
                and not entry.idle
                and not (entry.full and entry.complete)
                and not entry.stands_still(STILL_SECONDS)
            )
            for entry in self.entries.values()
            if uid is None or entry.uid == uid
        )

    # ---- for operators --------------------------------------------------------------------------

    def evict(self, match: Callable[[CacheEntry], bool]) -> tuple[int, int]:
        """Unpins what matches and gives it up: what is idle at once, the rest when it is. Bytes (freed,
        still leased)."""
        freed = leased = 0
        for entry in [entry for entry in self.entries.values() if match(entry)]:
            entry.pinned = False
            entry.evicted = True
            size = self._bytes(entry)
            if entry.started and (entry.idle or entry.forsaken):
                self._evict(entry)
                freed += size - self._bytes(entry)
                leased += self._bytes(entry)
            else:
                leased += size
        return freed, leased

    def usage(self) -> Usage:
        by_state = {"waiting": 0, "reading": 0, "leased": 0, "warm": 0, "failed": 0}
        for entry in self.entries.values():
            by_state[entry.state] += self._bytes(entry)
        stuck = sum(map(self._bytes, self._abandoned))
        return Usage(
            free_bytes=self.pool.free_slabs * self.pool.slab_bytes,
            reading_bytes=by_state["reading"] + by_state["failed"] + stuck,
            leased_bytes=by_state["leased"],
            warm_bytes=by_state["warm"],
            peak_bytes=self.pool.peak_slabs * self.pool.slab_bytes,
            waiting=len(self._queue),
            stuck_bytes=stuck,
        )

    def reconsider(self) -> None:
        """To be called now and then: an entry that hangs says nothing, and those that wait for its memory may
        be content with less."""
        if self._queue:
            self._grant()

    async def keep(self) -> None:
        """The background work. Runs for ever."""
        await self._upkeep.run()

    async def stop(self) -> None:
        """Gives up everything that is idle, grants nothing any more, and is done with the workers."""
        self._stopped = True
        for entry in self._queue:
            self._queue.leave(entry)
            entry.fail(_stopped_while_waiting())
        await asyncio.gather(*self._tasks)
        self.evict(lambda entry: True)
        await self.pool.stop()

    # ---- inside ---------------------------------------------------------------------------------

    def _held(self, uid: int) -> tuple[int, int]:
        """Slabs that loads of `uid` hold or are about to get, and those of others. Warm ones are neither."""
        own = others = 0
        for entry in (*self.entries.values(), *self._abandoned):
            count = len(entry.slabs)
            if not entry.pinned and (entry.idle or entry.forsaken):
                count -= entry.unused_slabs  # others get these when they need them
            count = self._starting.get(entry, count)
            if entry.uid == uid and not entry.pinned:  # pins are the operator's doing
                own += count
            else:
                others += count
        return own, others

    def _too_much(self, entry: CacheEntry, uid: int) -> bool:
        """It is not the user's yet, and would be more than that user may have with what it holds."""
        if entry.pinned or is_privileged(uid) or (entry.uid == uid and not entry.idle):
            return False
        count = self._starting.get(entry, len(entry.slabs))
        own, others = self._held(uid)
        if not entry.idle:
            others -= count  # would be the user's own
        return own + count > user_share(self.pool.max_slabs - others)

    def _evict_old_versions(self, checkpoint: Checkpoint, since: float) -> None:
        """Pinned or not: memory is for what can still be loaded, and that no longer can."""
        old = superseded(self.entries.values(), checkpoint, since=since)
        for entry in old:
            source = ",".join(entry.checkpoint.sources[:3])
            fields = {"stage": entry.id, "source": source, "pinned": entry.pinned}
            event(logger, "changed in storage", fields)
        self.evict(lambda entry: entry in old)

    def _assign(self, entry: CacheEntry, uid: int) -> None:
        """From now on only `uid` may ever hold the slabs of this checkpoint."""
        entry.uid = uid
        for slab in entry.slabs:
            slab.owner_uid = uid

    def _bytes(self, entry: CacheEntry) -> int:
        return len(entry.slabs) * self.pool.slab_bytes

    def _read(self, source: str, size_bytes: int) -> None:
        self._totals.source_bytes[source] += size_bytes
        self._grant()  # once a checkpoint is complete its memory will not return by itself

    def _grant(self) -> None:
        """Starts everything at the head of the queue that can have its slabs now."""
        if self._granting or self._stopped:  # giving up a checkpoint frees slabs, which calls back here
            return
        self._granting = True
        try:
            while (granted := self._queue.next_granted()) is not None:
                entry, count = granted
                self._starting[entry] = count
                # Taken here and not in the task: the next one in the queue must not be granted them too.
                slabs = self.pool.take(count, entry.uid)
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
                self._workers.of(os.geteuid() if entry.uid is None else entry.uid),
                entry.checkpoint.segments_within,
                entry.selection,
                count * self.pool.slab_bytes,
            )
            self._starting.pop(entry, None)
            if self._stopped:
                entry.fail(_stopped_while_waiting())
            if entry.holders and entry.error is None:
                entry.start(slabs, segments)
        except Exception as error:
            self._starting.pop(entry, None)
            entry.fail(failure.explain(error, f"making {count} slabs of {self.pool.slab_bytes} bytes"))
        if entry.slabs is not slabs:
            self.pool.release(slabs)
        elif entry.uid is not None:
            self._assign(entry, entry.uid)
        if not entry.holders:
            self._idle(entry)
        elif entry.expected_members > entry.members and not entry.full:
            loop.call_later(self._config.group_timeout_seconds, entry.stop_expecting)
        self._grant()

    def _idle(self, entry: CacheEntry) -> None:
        """Nobody holds it any more."""
        if entry in self._starting or entry.closed:
            return
        if not entry.started:
            self._queue.leave(entry)
            self._give_up(entry)
        elif (
            entry.error is not None
            or entry.evicted
            or not entry.full
            or not (self._config.keeps_warm or entry.pinned)
        ):
            self._give_up(entry)
        self._grant()

    def _expire(self, entry: CacheEntry, demand: Demand) -> None:
        usage = self.usage()
        wanted = (demand.whole or demand.window) * self.pool.slab_bytes
        missing = (self.pool.max_slabs - self.pool.headroom_slabs) * self.pool.slab_bytes
        others = f", {show_size(missing)} the system does not have" if missing else ""
        entry.fail(
            StagingExhaustedError(
                f"waited {self._config.queue_timeout_seconds:.0f} s for {show_size(wanted)} of a buffer of "
                f"{show_size(self._config.capacity_bytes)}, of which {show_size(usage.leased_bytes)} are "
                f"held by clients and {show_size(usage.reading_bytes)} are being read into{others}; let "
                "tensors go, raise --memory-limit, or raise --queue-timeout",
                leased_bytes=usage.leased_bytes,
                reading_bytes=usage.reading_bytes,
            )
        )
        self._grant()

    def _evict(self, entry: CacheEntry) -> None:
        self._totals.evictions += 1
        self._give_up(entry)

    def _give_up(self, entry: CacheEntry) -> None:
        self.entries.pop(entry.id, None)
        if entry.idle:
            self.pool.release(entry.close(), idle_since=entry.last_used)
            return

        def reads_ended(slabs: list[Slab]) -> None:
            self._abandoned.discard(entry)
            self.pool.release(slabs)

        free = entry.abandon(reads_ended)
        if entry.slabs:
            self._abandoned.add(entry)
        self.pool.release(free)

    def _evict_idle(self, since: float) -> None:
        self.evict(lambda entry: entry.idle and not entry.pinned and entry.last_used <= since)


def _stopped_while_waiting() -> ShuttingDownError:
    return ShuttingDownError("penstockd stopped while the load waited for memory; try again in a moment")
