"""The staging buffer: a load joins an entry that serves it. If there is none, a new entry waits for slabs.

`sharing.py` finds the entry that serves a load. `allocator.py` gives entries their slabs, in the order of
`waiting.py`, and `shares.py` computes how much each user may have. `cache.py` has the entries, and evicts
some for others. `upkeep.py` has the background work.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping

from ..checkpoint.files import Checkpoint
from ..checkpoint.selection import Selection
from ..config.settings import Config
from ..errors import CheckpointCorruptError
from ..sources.kept import Writers
from ..system.counts import Totals
from ..system.headroom import spare_bytes
from .contents import Contents
from .entry import CacheEntry, EntryContext
from .members import Holder
from .memory.allocator import Allocator
from .memory.demand import Demand, measure
from .memory.shares import Usage
from .memory.upkeep import Upkeep
from .memory.waiting import PATIENCE_SECONDS
from .pool import Workers
from .reading.keeping import Keeper
from .reading.pipeline import PipelineContext
from .reading.reader import ReaderPool
from .sharing import Group, find, terms_of


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
        on_corrupt: Callable[[CheckpointCorruptError], object] = lambda error: None,
    ) -> None:
        """`readers` has the reader threads for each kind of source, `hashers` the threads on which SHA-256
        follows the reading. `writers` write the copies that files keep of it. `spare` says how much memory
        the system has to spare, as `spare_bytes` does. `on_corrupt` is told of files whose bytes are wrong,
        before their loads are."""
        self._config = config
        self._readers = readers
        self._totals = totals
        self._allocator = Allocator(config, workers=workers, totals=totals)
        self._cache = self._allocator.cache
        self.pool = self._allocator.pool
        self._context = EntryContext(
            self._allocator,
            PipelineContext(readers, hashers, Keeper(writers), totals),
            patience_seconds=max(config.queue_timeout_seconds, PATIENCE_SECONDS),
            on_corrupt=on_corrupt,
        )
        self._upkeep = Upkeep(
            config,
            self.pool,
            workers,
            may_populate=lambda: not self._allocator.waiting,
            evict_idle=self._cache.evict_idle,
            evict_for=self._cache.evict_for,
            spare=spare,
        )

    @property
    def entries(self) -> Mapping[int, CacheEntry]:
        """By id: all entries that wait, are read, are held or are warm."""
        return self._cache.entries

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
        if found is not None and self._allocator.shares.too_large(found[0], holder.uid):
            if found[0].started and found[0].idle:
                self._cache.evict_one(found[0])
            found = None
        if found is not None:
            entry, skipped = found
            self._totals.stage_hits += 1
            entry.hold(key, holder, skipped=skipped, window=group.window if group else "")
            if owner_uid is not None and entry.owner_uid is None:
                self._allocator.assign(entry, owner_uid)
            return entry
        self._totals.stage_misses += 1
        if not keep_old:
            self.evict_old_versions(checkpoint, holder.since)
        made_for = made_for or selection
        terms = terms_of(group, self.entries.values(), checkpoint, owner_uid=owner_uid)
        entry = CacheEntry(Contents(checkpoint, made_for), terms, self._context, owner_uid=owner_uid)
        entry.hold(key, holder, skipped=made_for.tensor_count - selection.tensor_count)
        self._allocator.join(entry, demand, holder.uid)
        return entry

    def place(self, entry: CacheEntry) -> int:
        """The entry's position in the queue: 1 is next, 0 means that it does not wait."""
        return self._allocator.place(entry)

    # ---- for operators and warm sets ------------------------------------------------------------

    async def spare_bytes(self, *, evicting: bool, evicting_wanted: bool) -> int:
        """How much a checkpoint can have that a warm set names: what is free, and with `evicting` what
        others use that is only warm, or even, with `evicting_wanted`, what the set names and does not pin.
        Without a limit no more than the system has to spare."""
        evictable = self._cache.idle_slabs(wanted=evicting_wanted) if evicting else 0
        slabs = self.pool.available + evictable
        if self._config.trims:
            spare = max(0, await self._upkeep.spare_slabs())
            slabs = min(slabs, self.pool.free_slabs + evictable + spare)
        return slabs * self.pool.slab_bytes

    def evict(self, match: Callable[[CacheEntry], bool]) -> tuple[int, int]:
        """As `EntryCache.evict`."""
        return self._cache.evict(match)

    def evict_old_versions(self, checkpoint: Checkpoint, since: float) -> None:
        """As `EntryCache.evict_old_versions`."""
        self._cache.evict_old_versions(checkpoint, since)

    def usage(self) -> Usage:
        return self._allocator.usage()

    def reconsider(self) -> None:
        """As `Allocator.reconsider`."""
        self._allocator.reconsider()

    async def keep(self) -> None:
        """Runs the background work, for ever."""
        await self._upkeep.run()

    async def stop(self) -> None:
        """Evicts every idle entry, grants no more slabs, and ends the workers."""
        await self._allocator.stop()
