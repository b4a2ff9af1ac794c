"""One checkpoint in the staging buffer: its slabs, the ring of segments in them, and who holds it.

    queued --> start: plan against the capacity, read the first segments (pipeline.py) --> complete
        consumers wait for segments, release them; a window reads more in as it is released
        the last holder leaves --> warm (full, whether or not it is complete), or closed

`phase.py` has the states of its life, `contents.py` what it holds, `members.py` who shares it, `retention.py`
what keeps it warm. All of it runs on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from ..checkpoint.files import Checkpoint
from ..checkpoint.plan import Segment
from ..config.units import show_size
from ..errors import CheckpointCorruptError, PenstockError, StagingExhaustedError
from .contents import Contents
from .members import GroupTerms, Holder, Members
from .phase import Phase, moved
from .reading.job import Cancelled
from .reading.pipeline import Pipeline, PipelineContext
from .reading.verifying import Verifier
from .retention import Retention
from .ring import SegmentRing, SegmentState
from .slab import Slab

_ids = itertools.count(1)


class EntryListener(Protocol):
    """How an entry reports to the staging buffer."""

    def entry_idle(self, entry: CacheEntry) -> None:
        """Nobody holds the entry, and no read is under way."""

    def entry_read(self, entry: CacheEntry) -> None:
        """One more segment of the entry has been read, or fewer of its slabs are in use."""

    def entry_drained(self, entry: CacheEntry, slabs: list[Slab]) -> None:
        """The last read or copy of an evicted entry ended. The slabs that it had kept now belong to the
        listener."""


@dataclass(frozen=True, slots=True)
class EntryContext:
    """What all entries of a buffer share."""

    listener: EntryListener
    pipeline: PipelineContext
    patience_seconds: float
    """For how long other loads of a window may keep a load waiting."""
    on_corrupt: Callable[[CheckpointCorruptError], object]
    """Told that bytes of a file are wrong, before anybody who holds the entry is: these may be gone with the
    next step."""


class CacheEntry:
    """Owns the checkpoint's files and, once started, the slabs."""

    def __init__(
        self, contents: Contents, terms: GroupTerms, context: EntryContext, *, owner_uid: int | None
    ) -> None:
        self.id = next(_ids)
        self.contents = contents
        self.members = Members(terms)
        self.phase = Phase.QUEUED
        self.slabs: list[Slab] = []
        self.ring: SegmentRing | None = None
        self.error: PenstockError | None = None
        self.owner_uid = owner_uid
        """The user whose share of memory and of the readers it takes. None: no user yet."""
        self._context = context
        self._retention = Retention(contents.checkpoint.sources)
        self._granted_slabs = 0
        self._pipeline: Pipeline | None = None
        """Set once it has started."""
        self._loop = asyncio.get_running_loop()
        self._changed: asyncio.Future[None] = self._loop.create_future()
        self.made_at = self.last_used = self._moved = self._loop.time()
        """Times: when it was made; when a holder last joined or left; when a holder last joined, left or
        released a segment, or a segment was read."""

    # ---- what it is -----------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        return self.contents.checkpoint

    @property
    def version(self) -> str:
        return self.contents.version

    @property
    def holders(self) -> Mapping[Hashable, Holder]:
        return self.members.holders

    @property
    def started(self) -> bool:
        """Whether it has its slabs, or has had them."""
        return self.ring is not None

    @property
    def complete(self) -> bool:
        return self.ring is not None and self.ring.complete

    @property
    def full(self) -> bool:
        return self.ring is not None and self.ring.full

    @property
    def closed(self) -> bool:
        """Whether it is no longer in the buffer."""
        return self.phase in (Phase.DRAINING, Phase.CLOSED)

    @property
    def names(self) -> Sequence[tuple[str, ...]]:
        """Names under which it was staged or pinned. Several may mean the same files."""
        return self._retention.names

    @property
    def pinned(self) -> bool:
        """It is evicted for nobody's memory."""
        return self._retention.pinned

    @property
    def wanted(self) -> bool:
        """A warm set names it: it is evicted after what is warm by chance."""
        return self._retention.wanted

    def wanted_as(self, name: str) -> bool:
        """The warm set names it so."""
        return self._retention.wanted_as(name)

    @property
    def reading(self) -> bool:
        """Whether reads of it are under way."""
        return self._pipeline is not None and self._pipeline.reading

    @property
    def read_bytes(self) -> int:
        return self._pipeline.read_bytes if self._pipeline is not None else 0

    @property
    def tier_bytes(self) -> int:
        """Of `read_bytes`, those that came from the tier."""
        return self._pipeline.tier_bytes if self._pipeline is not None else 0

    def tier_bytes_of(self, index: int) -> int:
        """How many bytes of that segment came from the tier when it was read last."""
        return self._pipeline.tier_bytes_of(index) if self._pipeline is not None else 0

    @property
    def verifier(self) -> Verifier | None:
        """Once started: what of it was compared with checksums."""
        return self._pipeline.verifier if self._pipeline is not None else None

    def stands_still(self, seconds: float) -> bool:
        """Whether for so many seconds nobody joined, left or released anything, and no segment was read. Its
        client takes nothing, or its reads hang."""
        return self._loop.time() - self._moved >= seconds

    @property
    def idle(self) -> bool:
        """Whether nobody holds it and no read is under way, so that its slabs can be reused at once."""
        return not self.holders and not self.reading

    @property
    def stuck(self) -> bool:
        """Whether nobody holds it, and only reads that were cancelled and have not ended keep it from being
        idle: storage is slow, or hangs."""
        return self.started and not self.closed and not self.holders and self.reading

    @property
    def evictable(self) -> bool:
        """Whether it has slabs, and nobody holds them."""
        return self.started and not self.closed and not self.holders

    @property
    def keeps_warm(self) -> bool:
        """Whether it is of use to later loads when nobody holds it."""
        return self.full and self.error is None and not self._retention.ends_when_left

    @property
    def slab_count(self) -> int:
        """Slabs that it has, and those that are being made for it."""
        return self._granted_slabs if self.phase is Phase.STARTING else len(self.slabs)

    @property
    def unused_slabs(self) -> int:
        """How many slabs would be free at once if it were evicted, when nobody holds it."""
        return len(self.slabs) - len(self._slabs_in_use())

    @property
    def verified_bytes(self) -> int:
        """Of the files that were read whole and compared with their checksums."""
        return self.verifier.verified_bytes if self.verifier is not None else 0

    @property
    def released_tensors(self) -> int:
        """How many tensors of the selection, from the first on, are no longer in the ring. It cannot serve a
        load that needs one of them."""
        return self.ring.released_tensors if self.ring is not None else 0

    @property
    def state(self) -> str:
        """The state in a word, for people."""
        if self.error is not None:
            return "failed"
        if not self.started:
            return "waiting"
        if not self.complete and (self.holders or self.reading):
            return "reading"
        return "leased" if self.holders else "warm"

    def __repr__(self) -> str:
        ready, total = (self.ring.ready_bytes, self.ring.total_bytes) if self.ring else (0, 0)
        return (
            f"<CacheEntry {self.id} {self.state}, {'full' if self.full else 'window'}: "
            f"{show_size(ready)} of {show_size(total)}, {len(self.holders)} holders>"
        )

    def ready_segments(self) -> frozenset[int]:
        """The segments whose bytes are in the ring now."""
        if self.ring is None:
            return frozenset()
        ring = self.ring
        return frozenset(
            index for index in range(len(ring.segments)) if ring.state(index) is SegmentState.READY
        )

    def group_progress(self, tensor_count: int) -> tuple[str, int, int]:
        """The group's progress, for a load of so many tensors: the name of its window, how many of the
        tensors all members have released, and how many members have not left."""
        window, members = self.members.progress()
        unreleased = self.contents.selection.tensor_count - self.released_tensors
        return window, max(0, tensor_count - unreleased), members

    # ---- its life, for the buffer ---------------------------------------------------------------

    def grant(self, slab_count: int) -> None:
        """Records that so many slabs are being made for it."""
        self.phase = moved(self.phase, Phase.STARTING)
        self._granted_slabs = slab_count

    def start(self, slabs: list[Slab], segments: Sequence[Segment]) -> None:
        """Takes the slabs over, lays the segments out in them, and begins to read. If this raises before
        `slabs` is set, the slabs still belong to the caller."""
        ring = SegmentRing(segments, sum(slab.size_bytes for slab in slabs))
        pipeline = Pipeline(
            ring,
            slabs,
            self.checkpoint,
            self._context.pipeline,
            uid=self.owner_uid,
            on_end=self._read_ended,
            may_copy=self._may_copy,
            on_copied=self._copied,
        )
        if self.pinned:
            pipeline.pin(True)
        self.phase = moved(self.phase, Phase.STARTED)
        self.slabs, self.ring, self._pipeline = slabs, ring, pipeline
        self.assign(self.owner_uid)
        self.contents.lay_out(segments)
        self.members.lay_out(ring)
        self._pump()
        self.notify()

    def assign(self, uid: int | None) -> None:
        """From now on only `uid` may hold its slabs."""
        self.owner_uid = uid
        if self._pipeline is not None:
            self._pipeline.give_to(uid)
        if uid is not None:
            for slab in self.slabs:
                slab.owner_uid = uid

    def pin(self, name: tuple[str, ...]) -> None:
        """Keeps the entry until it is evicted, and adds `name` to its names."""
        self._retention.pin(name)
        self._pin_kept()

    def want(self, name: str, sources: tuple[str, ...], *, pin: bool) -> None:
        """A warm set names it, until `unwant` or `unpin`. `sources` are what it is staged as there."""
        self._retention.want(name, sources, pin=pin)
        self._pin_kept()

    def unwant(self, name: str) -> None:
        """The warm set does not name it so any more: it is warm as after a load."""
        if self._retention.unwant(name):
            self.last_used = self._loop.time()
            self._pin_kept()

    def unpin(self) -> None:
        """From now on it may be evicted for others. Nothing keeps it once its last holder has left."""
        self._retention.unpin()
        self._pin_kept()

    def fail(self, error: PenstockError) -> None:
        """All who wait for the entry, now or later, get the error."""
        if self.error is None:
            self.phase = moved(self.phase, Phase.FAILED)
            self.error = error
            if isinstance(error, CheckpointCorruptError):
                self._context.on_corrupt(error)
                for holder in self.holders.values():
                    if holder.on_corrupt is not None:
                        holder.on_corrupt(error)
            self._cancel_reads()
            self.notify()

    def stop_expecting(self) -> None:
        """Stops waiting for further members of the group."""
        self.members.stop_expecting()
        self._pump()

    def close(self) -> list[Slab]:
        """Only when nobody holds it. Returns the slabs that no read writes into and nothing is copied from;
        they now belong to the caller. The other slabs go to the listener when their reads have ended, and to
        nobody before, since a read that hangs in the kernel cannot be cancelled. The files stay open until
        then too."""
        assert not self.holders
        if self.reading:
            self._cancel_reads()
        stuck = self._slabs_in_use()
        free = [slab for slab in self.slabs if slab not in stuck]
        self.slabs = stuck
        if self._pipeline is not None and (self._pipeline.reading or self._pipeline.copying):
            self.phase = moved(self.phase, Phase.DRAINING)
        else:
            self._end()
        return free

    # ---- for those who hold it ------------------------------------------------------------------

    def hold(self, key: Hashable, holder: Holder, *, skipped: int = 0, window: str = "") -> None:
        """From now on, until `leave`, the slabs stay, and no segment is reused that `key` has not released.
        `key` does not need the first `skipped` tensors, which must be at least `released_tensors`. `window`
        is the name of its window before a restart, if the client knows it."""
        self.members.join(key, holder, skipped, window)
        self.last_used = self._moved = self._loop.time()
        self._pump()

    def release(self, key: Hashable, count: int) -> None:
        """`key` no longer needs the segments below `count`."""
        if self.ring is not None:
            self._moved = self._loop.time()
            self.ring.release(key, count)
            self._pump()

    def leave(self, key: Hashable) -> None:
        """Ends the hold of `key`. A second call does nothing."""
        if not self.members.leave(key):
            return
        self.last_used = self._moved = self._loop.time()
        if self.holders:
            self._pump()
            return
        if not self.complete:
            self._cancel_reads()
        if self.idle:
            self._context.listener.entry_idle(self)
        self._context.pipeline.keeper.pump()

    async def wait_change(self) -> None:
        """Waits until anything about the entry changes."""
        await asyncio.shield(self._changed)

    async def wait_started(self) -> None:
        """Waits until the entry has started. Raises the error that kept it from starting."""
        while not self.started:
            self._raise_error()
            await self.wait_change()

    async def wait_ready(self, segment: int, key: Hashable = None) -> None:
        """Waits until the bytes of that segment are in the ring. Raises the error that ended the reading.
        Raises StagingExhaustedError if other members of the window keep `key` waiting and release nothing for
        as long as a load may wait for memory: they may have stopped, or may wait for `key` themselves."""
        assert self.ring is not None
        if isinstance(self.error, CheckpointCorruptError):
            raise self.error  # what is there may be what is damaged
        while self.ring.state(segment) is not SegmentState.READY:
            self._raise_error()
            patience_seconds = self._context.patience_seconds
            waited = self._loop.time() - self._moved
            if waited >= patience_seconds:
                self._raise_if_blocked(key, segment)
                waited = 0.0
            await asyncio.wait([self._changed], timeout=patience_seconds - waited)

    async def wait_complete(self) -> None:
        while not self.complete:
            self._raise_error()
            await self.wait_change()

    def notify(self) -> None:
        """Wakes those who wait for a change."""
        self._moved = self._loop.time()
        changed, self._changed = self._changed, self._loop.create_future()
        changed.set_result(None)

    # ---- inside ---------------------------------------------------------------------------------

    def _pin_kept(self) -> None:
        """The copies that files keep are pinned as the entry is."""
        if self._pipeline is not None:
            self._pipeline.pin(self.pinned)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _raise_if_blocked(self, key: Hashable, segment: int) -> None:
        blockers = self.members.in_the_way(key, segment)
        if blockers:
            pids = sorted({blocker.pid for blocker in blockers})
            raise StagingExhaustedError(
                "another load that shares this window made no progress for "
                f"{self._context.patience_seconds:.0f} s (pid {', '.join(map(str, pids[:8]))}); end that "
                "process, start no load while you iterate another of the same checkpoint, raise "
                "--memory-limit, or raise --queue-timeout"
            )

    def _pump(self) -> None:
        """Reads segments for which there is room, as long as anybody wants them."""
        if self._pipeline is not None and self.error is None and self.holders:
            self._pipeline.submit()

    def _read_ended(self, index: int, error: PenstockError | Cancelled | None) -> None:
        assert self._pipeline is not None
        if self.closed:
            self._drained()
            return
        if error is None:
            self._pipeline.arrived(index)
            self._context.listener.entry_read(self)
            self._pump()
            if self.complete:
                self.checkpoint.close()
            self.notify()
        elif not isinstance(error, Cancelled):
            self.fail(error)
        elif self.holders:
            self._pump()
        if not self.holders and self.idle:
            self._context.listener.entry_idle(self)

    def _copied(self) -> None:
        """Some of its slabs are not copied from any more."""
        if self.closed:
            self._drained()
            return
        self._pump()
        if not self.holders:
            self._context.listener.entry_read(self)

    def _may_copy(self) -> bool:
        """Whether segments may be copied to where they are kept. Of a window at once, or they would be gone;
        of a full entry when all is read, or nobody waits for it: until then all cores are for the load."""
        if self.closed or self.error is not None:
            return False
        if not self.full:
            return bool(self.holders)
        return self.complete if self.holders else self.keeps_warm

    def _drained(self) -> None:
        assert self._pipeline is not None
        if not (self._pipeline.reading or self._pipeline.copying):
            slabs, self.slabs = self.slabs, []
            self._end()
            self._context.listener.entry_drained(self, slabs)

    def _end(self) -> None:
        self.phase = moved(self.phase, Phase.CLOSED)
        if self._pipeline is not None:
            self._pipeline.end()
        self.checkpoint.close()

    def _slabs_in_use(self) -> list[Slab]:
        used = self._pipeline.slabs_in_use() if self._pipeline is not None else []
        return [slab for slab in self.slabs if slab in used]

    def _cancel_reads(self) -> None:
        if self._pipeline is not None:
            self._pipeline.cancel()
