"""One checkpoint in the staging buffer: its slabs, the ring of segments in them, and who holds it.

    admitted --> start: plan against the capacity, read the first segments (filling.py) --> complete
        consumers wait for segments, release them; a window reads more in as it is released
        the last holder leaves --> warm (full, whether or not it is complete), or closed

Lives on the event loop.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

from ..checkpoint import plan
from ..checkpoint.catalog import Checkpoint
from ..checkpoint.plan import Selection
from ..checkpoint.slices import SegmentSlice, WholeSegments, cut
from ..checkpoint.table import TensorTable
from ..config.units import show_size
from ..errors import PenstockError, StagingExhaustedError
from .filling import Filling
from .reader import Cancelled, ReaderPool
from .ring import SegmentRing, SegmentState
from .slab import Slab

_ids = itertools.count(1)

MAX_NAMES = 16
"""Different ways of naming the same files that are remembered of one checkpoint."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds the slabs, for people. Times are of the loop's clock."""

    uid: int
    pid: int
    name: str
    since: float


class CacheEntry:
    """Owns the checkpoint's files and, once started, the slabs: `on_idle` is told when nobody holds them."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        *,
        uid: int | None,
        readers: Mapping[str, ReaderPool],
        block_bytes: Mapping[str, int],
        patience_seconds: float,
        group: str,
        window: str,
        expected_members: int,
        on_idle: Callable[[CacheEntry], None],
        on_read: Callable[[str, int], None],
        on_block: Callable[[str, float], None],
    ) -> None:
        """`on_read` is told of each segment's source and bytes, on the event loop; `on_block` of each block's
        source and seconds, on a reader thread."""
        self.id = next(_ids)
        self.checkpoint = checkpoint
        self.selection = selection
        self.version = checkpoint.version
        self.digest = selection.digest()
        self._uid = uid
        self.group = group
        self.window = window
        """Of a group that goes on after a restart: what its window was called; else empty."""
        self._window_name = secrets.token_hex(8)
        self.expected_members = expected_members
        """A window is not recycled before so many loads joined, or `stop_expecting`."""
        self.members = 0
        self.pinned = False
        self.names = [checkpoint.sources]
        """What it was staged as, and pinned as, which may name the same files in other ways."""
        self.evicted = False
        """To be given up as soon as nobody holds it."""
        self.slabs: list[Slab] = []
        self.ring: SegmentRing | None = None
        self.error: PenstockError | None = None
        self.closed = False
        self.holders: dict[Hashable, Holder] = {}
        self._skipped: dict[Hashable, int] = {}
        """How many tensors of the selection each holder does not need, from the first one on."""
        self.made_at = self.last_used = asyncio.get_running_loop().time()
        self.read_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._readers = readers
        self._block_bytes = block_bytes
        self._patience_seconds = patience_seconds
        self._on_idle = on_idle
        self._on_read = on_read
        self._on_block = on_block
        self._filling: Filling | None = None
        self._on_abandoned: Callable[[list[Slab]], None] | None = None
        self._changed: asyncio.Future[None] = self._loop.create_future()
        self._moved = self._loop.time()
        """When somebody last joined, left or released something, or a segment came."""

    # ---- what it is -----------------------------------------------------------------------------

    @property
    def uid(self) -> int | None:
        """Whose it is: whose share of memory and of the readers it takes. None: nobody's yet."""
        return self._uid

    @uid.setter
    def uid(self, uid: int | None) -> None:
        self._uid = uid
        if self._filling is not None:
            self._filling.give_to(uid)

    @property
    def started(self) -> bool:
        return self.ring is not None

    @property
    def complete(self) -> bool:
        return self.ring is not None and self.ring.complete

    @property
    def full(self) -> bool:
        return self.ring is not None and self.ring.full

    @property
    def reading(self) -> bool:
        """Some of its bytes are on their way."""
        return self._filling is not None and self._filling.active

    def stands_still(self, seconds: float) -> bool:
        """Nobody joined, left or released anything for so long, and no segment came: its client takes
        nothing, or its reads hang."""
        return self._loop.time() - self._moved >= seconds

    @property
    def idle(self) -> bool:
        """Nobody holds it and no read is under way: its slabs can be given to others at once."""
        return not self.holders and not self.reading

    @property
    def released_tensors(self) -> int:
        """So many of the selection, from the first one on, are gone: it serves nobody who needs them."""
        return self.ring.released_tensors if self.ring is not None else 0

    @property
    def forsaken(self) -> bool:
        """Nobody holds it, and all that keeps it from being idle are reads that were given up and have not
        ended: storage is slow, or hangs."""
        return self.started and not self.closed and not self.holders and self.reading

    @property
    def unused_slabs(self) -> int:
        """How many slabs giving it up would free at once, when nobody holds it."""
        in_use = self._filling.slabs_in_use() if self._filling is not None else []
        return len(self.slabs) - len(in_use)

    @property
    def state(self) -> str:
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

    def serves(self, checkpoint: Checkpoint, selection: Selection) -> bool:
        """It holds, or will hold, every byte that the selection of that checkpoint needs."""
        if self._was_made_for(checkpoint, selection):
            return True
        return self.full and self._slices(checkpoint, selection) is not None

    def skipped_by(self, checkpoint: Checkpoint, selection: Selection) -> int | None:
        """How many tensors have to be left out at the beginning of its own selection to get that one. None if
        that does not make it."""
        skipped = self.selection.tensor_count - selection.tensor_count
        if self.version != checkpoint.version or skipped < 0:
            return None
        digest = plan.skip(self.selection, skipped).digest() if skipped else self.digest
        return skipped if digest == selection.digest() else None

    def group_progress(self, tensor_count: int) -> tuple[str, int, int]:
        """What a load of so many tensors is told of its group: its window's name, how many of the tensors
        all members have released, how many members have not left."""
        unreleased = self.selection.tensor_count - self.released_tensors
        members = max(self.expected_members, self.members) - (self.members - len(self.holders))
        return self.window or self._window_name, max(0, tensor_count - unreleased), members

    def ready_segments(self) -> frozenset[int]:
        """Whose bytes are in the ring now."""
        if self.ring is None:
            return frozenset()
        ring = self.ring
        return frozenset(
            index for index in range(len(ring.segments)) if ring.state(index) is SegmentState.READY
        )

    # ---- its life -------------------------------------------------------------------------------

    def start(self, slabs: list[Slab], segments: Sequence[plan.Segment]) -> None:
        """Takes the slabs over, lays the segments out in them and begins to read. The slabs stay the caller's
        if this raises before they are in `slabs`."""
        ring = SegmentRing(segments, sum(slab.size_bytes for slab in slabs))
        self._filling = Filling(
            ring,
            slabs,
            self.checkpoint.files,
            uid=self._uid,
            readers=self._readers,
            block_bytes=self._block_bytes,
            on_end=self._read_ended,
            on_block=self._on_block,
        )
        self.slabs, self.ring = slabs, ring
        # Loads bring headers of their own: those of an entry that is warm for days would take room from
        # others.
        self.checkpoint = self.checkpoint.without_headers()
        for key in self.holders:
            self.ring.join(key, self.ring.segment_of(self._skipped[key]))
        self._update_hold_back()
        self._pump()
        self.notify()

    def pin(self, name: tuple[str, ...]) -> None:
        """Keeps it until it is evicted, under that name too."""
        self.pinned, self.evicted = True, False
        if name not in self.names:
            self.names = [*self.names[: MAX_NAMES - 1], name]

    def fail(self, error: PenstockError) -> None:
        """Everybody waiting, now or later, gets the error."""
        if self.error is None:
            self.error = error
            self._cancel_reads()
            self.notify()

    def hold(self, key: Hashable, holder: Holder, *, skipped: int = 0) -> None:
        """From now on, until `leave`, the slabs stay and no segment is recycled that `key` has not released.
        It does not need the first `skipped` tensors, which have to be `released_tensors` or more."""
        self.holders[key] = holder
        self._skipped[key] = skipped
        self.last_used = self._moved = self._loop.time()
        self.members += 1
        if self.ring is not None:
            self.ring.join(key, self.ring.segment_of(skipped))
            self._update_hold_back()
            self._pump()

    def release(self, key: Hashable, count: int) -> None:
        """`key` needs no segment below `count` any more."""
        if self.ring is not None:
            self._moved = self._loop.time()
            self.ring.release(key, count)
            self._pump()

    def stop_expecting(self) -> None:
        """Stops waiting for more members of the group."""
        self.expected_members = self.members
        self._update_hold_back()
        self._pump()

    def leave(self, key: Hashable) -> None:
        """Undoes `hold` and `join`. Leaving twice is leaving once."""
        if self.holders.pop(key, None) is None:
            return
        del self._skipped[key]
        self.last_used = self._moved = self._loop.time()
        if self.ring is not None:
            self.ring.leave(key)
        if self.holders:
            self._pump()
            return
        if not self.complete:
            self._cancel_reads()
        if self.idle:
            self._on_idle(self)

    def close(self) -> list[Slab]:
        """Only when idle. Closes the files; returns the slabs, which are the caller's from now on."""
        assert self.idle
        assert not self.closed
        self.closed = True
        self.checkpoint.close()
        self._filling = None
        slabs, self.slabs = self.slabs, []
        return slabs

    def abandon(self, on_end: Callable[[list[Slab]], None]) -> list[Slab]:
        """Only when forsaken. Returns the slabs that no read is writing into, which are the caller's from now
        on; `on_end` gets the others, once the last of the reads is over. Those are never given to anybody
        before, as a read that hangs in the kernel cannot be called back."""
        assert self.forsaken
        assert self._filling is not None
        self._cancel_reads()
        self.closed = True
        if not self.reading:  # what was given up had not begun
            self.checkpoint.close()
            free, self.slabs = self.slabs, []
            return free
        self._on_abandoned = on_end
        stuck = self._filling.slabs_in_use()
        free = [slab for slab in self.slabs if slab not in stuck]
        self.slabs = stuck
        return free

    # ---- what consumers see ---------------------------------------------------------------------

    def slices(self, checkpoint: Checkpoint, selection: Selection) -> Sequence[SegmentSlice]:
        """What a load of that selection gets, in order. Only when it `serves` it."""
        assert self.ring is not None
        if self._was_made_for(checkpoint, selection):
            return WholeSegments(self.ring.segments)
        slices = self._slices(checkpoint, selection)
        assert slices is not None
        return slices

    def tables(self, checkpoint: Checkpoint) -> list[TensorTable | None]:
        """Of each staged file, by the number that segments have it by, as a checkpoint that it `serves` says;
        None where that has no such file."""
        known = {file.version: table for file, table in zip(checkpoint.files, checkpoint.tables, strict=True)}
        return [known.get(file.version) for file in self.checkpoint.files]

    async def wait_change(self) -> None:
        """Until anything about it is different."""
        await asyncio.shield(self._changed)

    async def wait_started(self) -> None:
        """Raises the error that kept it from starting."""
        while not self.started:
            self._raise_error()
            await self.wait_change()

    async def wait_ready(self, segment: int, key: Hashable = None) -> None:
        """Until the bytes of that segment are in the ring. Raises the error that ended the reading, and
        StagingExhaustedError when others who share the window keep `key` waiting and release nothing for as
        long as a load may wait for memory: they may have stopped, or wait for `key` themselves."""
        assert self.ring is not None
        while self.ring.state(segment) is not SegmentState.READY:
            self._raise_error()
            waited = self._loop.time() - self._moved
            if waited >= self._patience_seconds:
                self._raise_if_blocked(key, segment)
                waited = 0.0
            await asyncio.wait([self._changed], timeout=self._patience_seconds - waited)

    async def wait_complete(self) -> None:
        while not self.complete:
            self._raise_error()
            await self.wait_change()

    # ---- inside ---------------------------------------------------------------------------------

    def notify(self) -> None:
        self._moved = self._loop.time()
        changed, self._changed = self._changed, self._loop.create_future()
        changed.set_result(None)

    def _raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _raise_if_blocked(self, key: Hashable, segment: int) -> None:
        assert self.ring is not None
        blockers = self.ring.in_the_way(key, segment)
        if blockers:
            pids = sorted({self.holders[blocker].pid for blocker in blockers})
            raise StagingExhaustedError(
                f"waited {self._patience_seconds:.0f} s for pid {', '.join(map(str, pids[:8]))}, which loads "
                "the same checkpoint through the same window, to go on; end it, keep no load waiting inside "
                "another of the same checkpoint, raise --memory-limit, or raise --queue-timeout"
            )

    def _was_made_for(self, checkpoint: Checkpoint, selection: Selection) -> bool:
        return self.version == checkpoint.version and self.digest == selection.digest()

    def _slices(self, checkpoint: Checkpoint, selection: Selection) -> list[SegmentSlice] | None:
        assert self.ring is not None
        return cut(
            self.ring.segments,
            [file.version for file in self.checkpoint.files],
            selection,
            [file.version for file in checkpoint.files],
        )

    def _update_hold_back(self) -> None:
        if self.ring is not None:
            self.ring.hold_back = self.members < self.expected_members
            self.ring.recycle()

    def _pump(self) -> None:
        """Reads what has room, as long as somebody wants it."""
        if self._filling is not None and self.error is None and self.holders:
            self._filling.submit()

    def _read_ended(self, index: int, error: PenstockError | Cancelled | None) -> None:
        assert self.ring is not None
        if self.closed:
            self._abandoned_read_ended()
            return
        if error is None:
            segment = self.ring.segments[index]
            self.read_bytes += segment.size_bytes
            self._on_read(self.checkpoint.files[segment.file].kind, segment.size_bytes)
            self._pump()
            if self.complete:
                self.checkpoint.close()
            self.notify()
        elif not isinstance(error, Cancelled):
            self.fail(error)
        elif self.holders:
            self._pump()
        if not self.holders and self.idle:
            self._on_idle(self)

    def _abandoned_read_ended(self) -> None:
        if not self.reading and self._on_abandoned is not None:
            on_end, self._on_abandoned = self._on_abandoned, None
            self.checkpoint.close()
            slabs, self.slabs = self.slabs, []
            on_end(slabs)

    def _cancel_reads(self) -> None:
        if self._filling is not None:
            self._filling.cancel()
