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
from .entry import Holder, StagedCheckpoint
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
    """Of `reading_bytes`: of stages that were given up, and whose reads have not ended."""


class Staging:
    """Admission, sharing and eviction. All on the event loop; decides at once over plain state."""

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
        self.stages: dict[int, StagedCheckpoint] = {}
        self._queue = WaitingLine(
            self,
            timeout_seconds=config.queue_timeout_seconds,
            on_expire=self._expire,
            on_patience=self._grant,
        )
        self._abandoned: set[StagedCheckpoint] = set()
        """Given up while reads wrote into some of their slabs, which are theirs until these end."""
        self._starting: dict[StagedCheckpoint, int] = {}
        """Those whose slabs are being made, and how many."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._granting = False
        self._stopped = False
        self._upkeep = Upkeep(
            config,
            self.pool,
            workers,
            may_populate=lambda: not self._queue,
            give_up_idle=self._give_up_idle,
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
        tenant: int | None,
        made_for: Selection | None = None,
    ) -> StagedCheckpoint:
        """Joins a staged checkpoint or queues a new one, which then owns `checkpoint`. A new one is made for
        `made_for`, of which `selection` is all or the end, if that is given.

        `key` holds it from now on; the caller must see to it that `leave(key)` is called. `tenant` is the
        uid that will get the slabs; None: nobody yet.
        """
        found = find(
            self.stages.values(),
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
            staged, skipped = found
            self._totals.stage_hits += 1
            staged.hold(key, holder, skipped=skipped)
            if group is not None:
                staged.window = group.window or staged.window
            if tenant is not None and staged.uid is None:
                self._assign(staged, tenant)
                self._queue.reorder()
            return staged
        self._totals.stage_misses += 1
        self._give_up_old_versions(checkpoint, holder.since)
        made_for = made_for or selection
        staged = StagedCheckpoint(
            checkpoint,
            made_for,
            uid=tenant,
            readers=self._readers,
            block_bytes={kind: pool.block_bytes for kind, pool in self._readers.items()},
            patience_seconds=max(self._config.queue_timeout_seconds, PATIENCE_SECONDS),
            group=group.name if group else "",
            window=group.window if group else "",
            expected_members=expected_members(self.stages.values(), checkpoint, tenant=tenant, group=group),
            on_idle=self._idle,
            on_read=self._read,
            on_block=self._totals.observe_read,
        )
        staged.hold(key, holder, skipped=made_for.tensor_count - selection.tensor_count)
        self.stages[staged.id] = staged
        self._queue.join(staged, demand, holder.uid)
        self._grant()
        return staged

    def place(self, staged: StagedCheckpoint) -> int:
        """Place in the queue; 1 is next, 0 is not waiting."""
        return self._queue.place(staged)

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
        idle = [
            staged for staged in self.stages.values() if staged.started and staged.idle and not staged.pinned
        ]
        forsaken = [staged for staged in self.stages.values() if staged.forsaken and not staged.pinned]
        if self.pool.available + sum(staged.unused_slabs for staged in (*idle, *forsaken)) < count:
            return False
        for group in (idle, forsaken):
            for staged in sorted(group, key=lambda staged: staged.last_used):
                if self.pool.available >= count:
                    break
                self._evict(staged)
        return True

    def memory_will_return(self, uid: int | None = None) -> bool:
        """Some slabs, of `uid` if that is given, are with a load that runs, rather than with one that stands
        still, be it that its client takes nothing or that its reads hang, with tensors that clients hold, or
        with pins."""
        return any(
            staged in self._starting
            or (
                staged.started
                and not staged.idle
                and not (staged.full and staged.complete)
                and not staged.stands_still(STILL_SECONDS)
            )
            for staged in self.stages.values()
            if uid is None or staged.uid == uid
        )

    # ---- for operators --------------------------------------------------------------------------

    def evict(self, match: Callable[[StagedCheckpoint], bool]) -> tuple[int, int]:
        """Unpins what matches and gives it up: what is idle at once, the rest when it is. Bytes (freed,
        still leased)."""
        freed = leased = 0
        for staged in [staged for staged in self.stages.values() if match(staged)]:
            staged.pinned = False
            staged.evicted = True
            size = self._bytes(staged)
            if staged.started and (staged.idle or staged.forsaken):
                self._evict(staged)
                freed += size - self._bytes(staged)
                leased += self._bytes(staged)
            else:
                leased += size
        return freed, leased

    def usage(self) -> Usage:
        by_state = {"waiting": 0, "reading": 0, "leased": 0, "warm": 0, "failed": 0}
        for staged in self.stages.values():
            by_state[staged.state] += self._bytes(staged)
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
        """To be called now and then: a stage that hangs says nothing, and those that wait for its memory may
        be content with less."""
        if self._queue:
            self._grant()

    async def keep(self) -> None:
        """The background work. Runs for ever."""
        await self._upkeep.run()

    async def stop(self) -> None:
        """Gives up everything that is idle, grants nothing any more, and is done with the workers."""
        self._stopped = True
        for staged in self._queue:
            self._queue.leave(staged)
            staged.fail(_stopped_while_waiting())
        await asyncio.gather(*self._tasks)
        self.evict(lambda staged: True)
        await self.pool.stop()

    # ---- inside ---------------------------------------------------------------------------------

    def _held(self, uid: int) -> tuple[int, int]:
        """Slabs that loads of `uid` hold or are about to get, and those of others. Warm ones are neither."""
        own = others = 0
        for staged in (*self.stages.values(), *self._abandoned):
            count = len(staged.slabs)
            if not staged.pinned and (staged.idle or staged.forsaken):
                count -= staged.unused_slabs  # others get these when they need them
            count = self._starting.get(staged, count)
            if staged.uid == uid and not staged.pinned:  # pins are the operator's doing
                own += count
            else:
                others += count
        return own, others

    def _too_much(self, staged: StagedCheckpoint, uid: int) -> bool:
        """It is not the user's yet, and would be more than that user may have with what it holds."""
        if staged.pinned or is_privileged(uid) or (staged.uid == uid and not staged.idle):
            return False
        count = self._starting.get(staged, len(staged.slabs))
        own, others = self._held(uid)
        if not staged.idle:
            others -= count  # would be the user's own
        return own + count > user_share(self.pool.max_slabs - others)

    def _give_up_old_versions(self, checkpoint: Checkpoint, since: float) -> None:
        """Pinned or not: memory is for what can still be loaded, and that no longer can."""
        old = superseded(self.stages.values(), checkpoint, since=since)
        for staged in old:
            source = ",".join(staged.checkpoint.sources[:3])
            fields = {"stage": staged.id, "source": source, "pinned": staged.pinned}
            event(logger, "changed in storage", fields)
        self.evict(lambda staged: staged in old)

    def _assign(self, staged: StagedCheckpoint, uid: int) -> None:
        """From now on only `uid` may ever hold the slabs of this checkpoint."""
        staged.uid = uid
        for slab in staged.slabs:
            slab.tenant = uid

    def _bytes(self, staged: StagedCheckpoint) -> int:
        return len(staged.slabs) * self.pool.slab_bytes

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
                staged, count = granted
                self._starting[staged] = count
                # Taken here and not in the task: the next one in the queue must not be granted them too.
                slabs = self.pool.take(count, staged.uid)
                task = asyncio.get_running_loop().create_task(self._start(staged, count, slabs))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._granting = False

    async def _start(self, staged: StagedCheckpoint, count: int, taken: Awaitable[list[Slab]]) -> None:
        loop = asyncio.get_running_loop()
        slabs: list[Slab] = []
        try:
            slabs = await taken
            segments = await loop.run_in_executor(
                self._workers.of(os.geteuid() if staged.uid is None else staged.uid),
                staged.checkpoint.segments_within,
                staged.selection,
                count * self.pool.slab_bytes,
            )
            self._starting.pop(staged, None)
            if self._stopped:
                staged.fail(_stopped_while_waiting())
            if staged.holders and staged.error is None:
                staged.start(slabs, segments)
        except Exception as error:
            self._starting.pop(staged, None)
            staged.fail(failure.explain(error, f"making {count} slabs of {self.pool.slab_bytes} bytes"))
        if staged.slabs is not slabs:
            self.pool.give_back(slabs)
        elif staged.uid is not None:
            self._assign(staged, staged.uid)
        if not staged.holders:
            self._idle(staged)
        elif staged.expected_members > staged.members and not staged.full:
            loop.call_later(self._config.group_timeout_seconds, staged.let_go)
        self._grant()

    def _idle(self, staged: StagedCheckpoint) -> None:
        """Nobody holds it any more."""
        if staged in self._starting or staged.closed:
            return
        if not staged.started:
            self._queue.leave(staged)
            self._give_up(staged)
        elif (
            staged.error is not None
            or staged.evicted
            or not staged.full
            or not (self._config.keeps_warm or staged.pinned)
        ):
            self._give_up(staged)
        self._grant()

    def _expire(self, staged: StagedCheckpoint, demand: Demand) -> None:
        usage = self.usage()
        wanted = (demand.whole or demand.window) * self.pool.slab_bytes
        missing = (self.pool.max_slabs - self.pool.room_slabs) * self.pool.slab_bytes
        others = f", {show_size(missing)} the system does not have" if missing else ""
        staged.fail(
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

    def _evict(self, staged: StagedCheckpoint) -> None:
        self._totals.evictions += 1
        self._give_up(staged)

    def _give_up(self, staged: StagedCheckpoint) -> None:
        self.stages.pop(staged.id, None)
        if staged.idle:
            self.pool.give_back(staged.close(), idle_since=staged.last_used)
            return

        def reads_ended(slabs: list[Slab]) -> None:
            self._abandoned.discard(staged)
            self.pool.give_back(slabs)

        free = staged.abandon(reads_ended)
        if staged.slabs:
            self._abandoned.add(staged)
        self.pool.give_back(free)

    def _give_up_idle(self, since: float) -> None:
        self.evict(lambda staged: staged.idle and not staged.pinned and staged.last_used <= since)


def _stopped_while_waiting() -> ShuttingDownError:
    return ShuttingDownError("penstockd stopped while the load waited for memory; try again in a moment")
