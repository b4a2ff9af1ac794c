"""The staging buffer: who gets slabs, in which order, and what is given up for them.

A load joins a staged checkpoint that serves it, or a new one is made and queues for slabs. The queue is
first in, first out: a large load at its head is not overtaken by small ones behind it.

What the head of the queue gets:

- Its whole checkpoint, if that fits what it may take: as soon as so much is free or can be freed by
  evicting idle checkpoints, least recently used first.
- Otherwise a window: what keeps the readers busy, four blocks for each of them or twice its largest
  tensor, but no more than `--window-size`. It starts with less if less is free.
- A checkpoint that would fit but finds the memory leased, by clients that hold tensors of loads that
  ended, starts as a window too after `PATIENCE_SECONDS` of that: such leases may last for ever. It then
  takes what there is, if its largest tensor fits.
- A prefetch is of no use as a window. It lets those behind it pass after that time.

A user who is not privileged takes at most seven eighths of what other users leave (`user_share`), so that
whatever one user holds, and for however long, another's load finds room for a window.

Nobody holds slabs while waiting for others, so there is no deadlock; a load that waits longer than
the queue timeout fails with the reason.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass

from .catalog import Checkpoint
from .config import Config
from .demand import Demand, measure
from .errors import ShuttingDownError, StagingExhaustedError
from .limits import is_privileged, user_share
from .log import event
from .metrics import Totals
from .plan import Selection
from .pool import SlabPool
from .reader import ReaderPool
from .slab import Slab
from .staged import Holder, StagedCheckpoint
from .units import show_size

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 2.0
TELL_PLACES_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Group:
    """Loads that will come together; the window waits for `size` of them."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes by state. Their sum never exceeds the limit."""

    free_bytes: int
    reading_bytes: int
    leased_bytes: int
    warm_bytes: int
    peak_bytes: int
    waiting: int


@dataclass(slots=True, eq=False)
class _Waiting:
    staged: StagedCheckpoint
    demand: Demand
    patient_since: float | None = None
    """At the head of the queue, and no memory will return by itself."""
    timer: asyncio.TimerHandle | None = None


class Staging:
    """Admission, sharing and eviction. All on the event loop; decides at once over plain state."""

    def __init__(
        self, config: Config, *, readers: Mapping[str, ReaderPool], workers: Executor, totals: Totals
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
        self._queue: deque[_Waiting] = deque()
        self._starting: dict[StagedCheckpoint, int] = {}
        """Those whose slabs are being made, and how many."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._granting = False
        self.populating = False
        """The buffer's pages are being made."""
        self._telling: asyncio.TimerHandle | None = None

    @property
    def capacity_bytes(self) -> int:
        """What all slabs together may have: the limit in whole slabs."""
        return self.pool.max_slabs * self.pool.slab_bytes

    # ---- for loads ------------------------------------------------------------------------------

    def demand(
        self, checkpoint: Checkpoint, selection: Selection, memory_limit: int | None, uid: int
    ) -> Demand:
        """What `enter` needs. Takes a while for very many tensors. Raises MemoryLimitTooSmallError."""
        return measure(checkpoint, selection, memory_limit=memory_limit, uid=uid, config=self._config)

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
    ) -> StagedCheckpoint:
        """Joins a staged checkpoint or queues a new one, which then owns `checkpoint`.

        `key` holds it from now on; the caller must see to it that `leave(key)` is called. `tenant` is the
        uid that will get the slabs; None: nobody yet.
        """
        staged = self._find(checkpoint, selection, holder.uid, group, whole_only=demand.whole_only)
        if staged is not None:
            self._totals.stage_hits += 1
            staged.hold(key, holder)
            if tenant is not None:
                self._assign(staged, tenant)
            return staged
        self._totals.stage_misses += 1
        staged = StagedCheckpoint(
            checkpoint,
            selection,
            uid=tenant,
            readers=self._readers,
            block_bytes={kind: self._config.block_bytes_of(kind) for kind in self._readers},
            patience_seconds=max(self._config.queue_timeout_seconds, PATIENCE_SECONDS),
            group=group.name if group else "",
            expected_members=self._expected(checkpoint, selection, tenant, group),
            on_idle=self._idle,
            on_read=self._read,
            on_block=self._totals.observe_read,
        )
        staged.hold(key, holder)
        self.stages[staged.id] = staged
        loop = asyncio.get_running_loop()
        waiting = _Waiting(staged, demand)
        waiting.timer = loop.call_later(self._config.queue_timeout_seconds, self._expire, waiting)
        self._queue.append(waiting)
        self._grant()
        return staged

    def place(self, staged: StagedCheckpoint) -> int:
        """Place in the queue; 1 is next, 0 is not waiting."""
        for number, waiting in enumerate(self._queue, start=1):
            if waiting.staged is staged:
                return number
        return 0

    # ---- for operators --------------------------------------------------------------------------

    def evict(self, match: Callable[[StagedCheckpoint], bool]) -> tuple[int, int]:
        """Unpins what matches and gives it up: what is idle at once, the rest when it is. Bytes (freed,
        still leased)."""
        freed = leased = 0
        for staged in [staged for staged in self.stages.values() if match(staged)]:
            staged.pinned = False
            staged.evicted = True
            size = self._bytes(staged)
            if staged.idle and staged.started:
                self._evict(staged)
                freed += size
            else:
                leased += size
        return freed, leased

    def usage(self) -> Usage:
        by_state = {"waiting": 0, "reading": 0, "leased": 0, "warm": 0, "failed": 0}
        for staged in self.stages.values():
            by_state[staged.state] += self._bytes(staged)
        return Usage(
            free_bytes=self.pool.free_slabs * self.pool.slab_bytes,
            reading_bytes=by_state["reading"] + by_state["failed"],
            leased_bytes=by_state["leased"],
            warm_bytes=by_state["warm"],
            peak_bytes=self.pool.peak_slabs * self.pool.slab_bytes,
            waiting=len(self._queue),
        )

    async def keep(self) -> None:
        """The background work: populates the buffer, then trims what nobody uses. Runs for ever."""
        if self._config.populate:
            self.populating = True
            await self.pool.populate(may_go_on=lambda: not self._queue)
            self.populating = False
            event(logger, "populated", {"bytes": self.pool.existing_slabs * self.pool.slab_bytes})
        while self._config.trims:
            await asyncio.sleep(max(self._config.trim_after_seconds / 4, 0.5))
            await self._trim()

    async def stop(self) -> None:
        """Gives up everything that is idle."""
        for waiting in list(self._queue):
            self._dequeue(waiting.staged)
            waiting.staged.fail(ShuttingDownError("penstockd stopped while the load waited for memory"))
        self.evict(lambda staged: True)
        await self.pool.stop()

    # ---- inside ---------------------------------------------------------------------------------

    def _find(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        uid: int,
        group: Group | None,
        *,
        whole_only: bool,
    ) -> StagedCheckpoint | None:
        name = group.name if group else ""
        for staged in self.stages.values():
            if staged.uid not in (None, uid) or not staged.servable:
                continue
            if whole_only and staged.started and not staged.full:
                continue
            if (staged.group == name or staged.full) and staged.serves(checkpoint, selection):
                return staged
        return None

    def _expected(
        self, checkpoint: Checkpoint, selection: Selection, tenant: int | None, group: Group | None
    ) -> int:
        """Members that a new window waits for: not those of the group that share an earlier one."""
        if group is None:
            return 1
        earlier = sum(
            staged.members
            for staged in self.stages.values()
            if staged.group == group.name and staged.uid == tenant and staged.version == checkpoint.version
        )
        return max(1, group.size - earlier)

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
        if self._granting:  # giving up a checkpoint frees slabs, which calls back here
            return
        self._granting = True
        before = len(self._queue)
        try:
            while (granted := self._next_granted()) is not None:
                head, count = granted
                self._queue.remove(head)
                assert head.timer is not None
                head.timer.cancel()
                self._starting[head.staged] = count
                # Taken here and not in the task: the next one in the queue must not be granted them too.
                slabs = self.pool.take(count, head.staged.uid)
                task = asyncio.get_running_loop().create_task(self._start(head.staged, count, slabs))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)
        finally:
            self._granting = False
        if len(self._queue) != before:
            self._tell_places()

    def _tell_places(self) -> None:
        """Soon, and not at every change: with many waiting that would be what they wait for."""
        if self._telling is None:
            loop = asyncio.get_running_loop()
            self._telling = loop.call_later(TELL_PLACES_SECONDS, self._tell_places_now)

    def _tell_places_now(self) -> None:
        self._telling = None
        for waiting in self._queue:
            waiting.staged.notify()

    def _next_granted(self) -> tuple[_Waiting, int] | None:
        """The head of the queue with its slabs, if it gets them now. One whose user holds too much already
        waits aside: it must not hold up the others behind it."""
        for waiting in filter(self._within_share, self._queue):
            if count := self._grantable(waiting):
                return waiting, count
            if not (waiting.demand.whole_only and self._out_of_patience(waiting)):
                break
        return None

    def _grantable(self, head: _Waiting) -> int:
        """How many slabs the head of the queue gets now; 0 is none yet."""
        demand, share = head.demand, self._share_left(head.staged.uid)
        window = min(demand.window, share)
        whole = demand.whole if demand.whole <= share else 0
        if self._make_room(whole or window):
            return whole or window
        if self._memory_will_return():
            head.patient_since = None
        elif head.patient_since is None:
            loop = asyncio.get_running_loop()
            head.patient_since = loop.time()
            loop.call_later(PATIENCE_SECONDS + 0.01, self._grant)
        if self._out_of_patience(head):
            least = demand.bare
        elif whole:
            return 0
        else:
            least = min(demand.least, window)
        return min(self.pool.available, window) if self._make_room(least) else 0

    def _out_of_patience(self, head: _Waiting) -> bool:
        since = head.patient_since
        return since is not None and asyncio.get_running_loop().time() - since >= PATIENCE_SECONDS

    def _within_share(self, waiting: _Waiting) -> bool:
        return self._share_left(waiting.staged.uid) >= waiting.demand.bare

    def _share_left(self, uid: int | None) -> int:
        """Slabs that loads of `uid` may take beyond what they hold: of what other users leave, a user who
        is not privileged gets at most `user_share`."""
        if uid is None or is_privileged(uid):
            return self.pool.max_slabs
        own = others = 0
        for staged in self.stages.values():
            count = 0 if staged.idle and not staged.pinned else len(staged.slabs)
            count = self._starting.get(staged, count)
            if staged.uid == uid and not staged.pinned:  # pins are the operator's doing
                own += count
            else:
                others += count
        return max(0, user_share(self.pool.max_slabs - others) - own)

    def _make_room(self, count: int) -> bool:
        """Evicts as many idle checkpoints as it takes, least recently used first, or none at all."""
        idle = [
            staged for staged in self.stages.values() if staged.started and staged.idle and not staged.pinned
        ]
        if self.pool.available + sum(len(staged.slabs) for staged in idle) < count:
            return False
        idle.sort(key=lambda staged: staged.last_used)
        for staged in idle:
            if self.pool.available >= count:
                break
            self._evict(staged)
        return True

    def _memory_will_return(self) -> bool:
        """Some slabs are with a load that runs, rather than with tensors that clients hold or pins."""
        return bool(self._starting) or any(
            staged.started and not staged.idle and not (staged.full and staged.complete)
            for staged in self.stages.values()
        )

    async def _start(self, staged: StagedCheckpoint, count: int, taken: Awaitable[list[Slab]]) -> None:
        try:
            slabs = await taken
        except OSError as error:
            self._starting.pop(staged, None)
            staged.fail(StagingExhaustedError(f"the system has no memory for {count} slabs: {error}"))
            if not staged.holders:
                self._forget(staged)
            self._grant()
            return
        loop = asyncio.get_running_loop()
        capacity = count * self.pool.slab_bytes
        segments = await loop.run_in_executor(self._workers, staged.plan_for, capacity)
        self._starting.pop(staged, None)
        if not staged.holders:
            self._forget(staged)
            self.pool.give_back(slabs)
            return
        staged.start(slabs, segments)
        if staged.uid is not None:
            self._assign(staged, staged.uid)
        if staged.expected_members > staged.members and not staged.full:
            loop.call_later(self._config.group_timeout_seconds, staged.let_go)

    def _idle(self, staged: StagedCheckpoint) -> None:
        """Nobody holds it any more."""
        if staged in self._starting or staged.closed:
            return
        if not staged.started:
            self._dequeue(staged)
            self._forget(staged)
        elif (
            staged.error is not None
            or staged.evicted
            or not staged.full
            or not (self._config.keeps_warm or staged.pinned)
        ):
            self._give_up(staged)
        self._grant()

    def _dequeue(self, staged: StagedCheckpoint) -> None:
        for waiting in list(self._queue):
            if waiting.staged is staged:
                self._queue.remove(waiting)
                assert waiting.timer is not None
                waiting.timer.cancel()
        self._tell_places()

    def _expire(self, waiting: _Waiting) -> None:
        if waiting not in self._queue:
            return
        self._dequeue(waiting.staged)
        usage = self.usage()
        wanted = (waiting.demand.whole or waiting.demand.window) * self.pool.slab_bytes
        waiting.staged.fail(
            StagingExhaustedError(
                f"waited {self._config.queue_timeout_seconds:.0f} s for {show_size(wanted)} of a buffer of "
                f"{show_size(self._config.capacity_bytes)}, of which {show_size(usage.leased_bytes)} are "
                f"held by clients and {show_size(usage.reading_bytes)} are being read into; let tensors "
                "go, raise --memory-limit, or raise --queue-timeout",
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
        self.pool.give_back(staged.close(), idle_since=staged.last_used)

    def _forget(self, staged: StagedCheckpoint) -> None:
        """One that never got slabs."""
        self.stages.pop(staged.id, None)
        staged.close()

    async def _trim(self) -> None:
        limit = asyncio.get_running_loop().time() - self._config.trim_after_seconds
        self.evict(lambda staged: staged.idle and not staged.pinned and staged.last_used <= limit)
        await self.pool.trim(self._config.trim_after_seconds)
