"""A staging buffer to try, with loads that read as clients do and files whose reads wait for the test."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.files import Checkpoint
from penstock.server.checkpoint.selection import Selection, select
from penstock.server.checkpoint.selection import skip as without
from penstock.server.errors import CheckpointCorruptError
from penstock.server.sources import Source, SourceFile
from penstock.server.sources.file.local_file import FileContext
from penstock.server.sources.file.source import FileSource
from penstock.server.sources.stores import KINDS
from penstock.server.staging.buffer import StagingBuffer
from penstock.server.staging.entry import CacheEntry
from penstock.server.staging.members import Holder
from penstock.server.staging.memory.demand import Demand
from penstock.server.staging.reading.reader import ReaderPool
from penstock.server.staging.ring import SegmentRing
from penstock.server.staging.sharing import Group
from penstock.server.system.counts import Totals
from penstock.server.tier.files import TierFiles
from penstock.server.tier.source import TieredSource
from penstock.server.tier.tier import Tier

from .support import (
    ROOT,
    SLAB_BYTES,
    ClockLoop,
    WatchedExecutor,
    close_leftovers,
    make_config,
    more_fds,
    no_objects,
    open_fds,
    open_slabs,
    turns,
    until,
)

GROUP = Group("replicas", 2)


class GatedFile:
    """A file whose reads wait until the test opens the gate, and are counted."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.uri, self.version, self.size_bytes = file.uri, file.version, file.size_bytes
        self.checksums = file.checksums
        self.kind, self.alignment, self.give_up_at = file.kind, file.alignment, file.give_up_at
        self.portable_version, self.listed_version = file.portable_version, file.listed_version
        self.writes_before = file.writes_before
        self.mount, self.mount_point = file.mount, file.mount_point
        self.gate = threading.Event()
        self.waiting = 0
        """Reads that have come to the gate and have not passed it."""
        self.reads = 0
        self.read_bytes = 0
        self.error: BaseException | None = None
        self._lock = threading.Lock()

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        with self._lock:
            self.reads += 1
            self.waiting += 1
        assert self.gate.wait(60)
        with self._lock:
            self.waiting -= 1
        if self.error is not None:
            raise self.error
        self._file.read_into(offset, views)
        with self._lock:
            self.read_bytes += sum(map(len, views))

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def unmounted(self) -> bool:
        return self._file.unmounted()

    def close(self) -> None:
        self._file.close()


@dataclass(eq=False)
class Visit:
    """One load, as far as the staging buffer knows it."""

    bench: Bench
    paths: tuple[Path, ...]
    entry: CacheEntry
    demand: Demand
    slices_of: tuple[Checkpoint, Selection]
    gates: list[GatedFile]
    contents: dict[str, bytes]
    """Of its files, by name, as they were when it came."""

    @property
    def ring(self) -> SegmentRing:
        """That of a load that has its slabs."""
        assert self.entry.ring is not None
        return self.entry.ring

    def leave(self) -> None:
        self.entry.leave(self)

    def open_gates(self) -> None:
        for file in self.gates:
            file.gate.set()

    async def read(self, count: int | None = None, *, begin: int = 0, release: bool = True) -> int:
        """Reads segments as a client does, compares every tensor with the file; returns the bytes."""
        await self.entry.wait_started()
        ring = self.ring
        slices = self.entry.contents.slices(*self.slices_of)
        delivered = 0
        for number, part in enumerate(slices[:count]):
            if number < begin:
                continue
            await self.entry.wait_ready(part.segment, self)
            segment = ring.segments[part.segment]
            table = self.entry.contents.tables(self.slices_of[0])[segment.file]
            assert table is not None
            slabs = [slab.view for slab in self.entry.slabs]
            content = self.contents[self.entry.checkpoint.files[segment.file].uri]
            for index in part.tensors:
                start, end = table.start(index), table.end(index)
                at = ring.ring_offset(part.segment) + start - segment.start
                assert self._ring_bytes(slabs, at, end - start) == content[start:end], table.name(index)
                delivered += end - start
            if release:
                self.entry.release(self, part.segment + 1)
        return delivered

    @staticmethod
    def _ring_bytes(slabs: list[memoryview], at: int, size: int) -> bytes:
        parts = []
        while size:
            number, inside = divmod(at, SLAB_BYTES)
            count = min(size, SLAB_BYTES - inside)
            parts.append(bytes(slabs[number % len(slabs)][inside : inside + count]))
            at, size = at + count, size - count
        return b"".join(parts)


class Bench:
    """A staging buffer, and what has to be zero when all have left."""

    def __init__(
        self, *, spare: Callable[[], int] = lambda: 1 << 40, tier: Tier | None = None, **config: Any
    ) -> None:
        """`spare` says how many bytes the system has to spare. The tier keeps the files that `tier_files`
        covers."""
        gc.collect()
        self._asked = spare
        self._read: dict[str, tuple[str, bytes]] = {}
        self.looks = 0
        """How often the system's memory was looked at."""
        self.fds = open_fds()
        self.config = make_config(**config)
        self.workers = WatchedExecutor(3)
        self.headers = ThreadPoolExecutor(1)
        self.readers = ReaderPool(self.config.concurrency, block_bytes=self.config.block_bytes)
        self.totals = Totals(KINDS)
        self.gates: list[GatedFile] = []
        self.told: list[tuple[object, CheckpointCorruptError]] = []
        """Of files whose bytes are wrong: who was told, the buffer's owner or a visit."""
        self.tier = tier
        self.tier_files = TierFiles(())
        files: Source = FileSource(lambda path, uid: self.headers, FileContext(settled_seconds=0))
        if tier is not None:
            files = TieredSource(files, tier, self.tier_files.cover)
        self.catalog = Catalog([files, no_objects(self.headers)])
        self.staging = StagingBuffer(
            self.config,
            readers={"file": self.readers},
            workers=self.workers,
            hashers=self.workers,
            totals=self.totals,
            spare=self._spare,
            writers=tier,
            on_corrupt=lambda error: self.told.append((self.staging, error)),
        )

        loop = asyncio.get_running_loop()
        if isinstance(loop, ClockLoop):
            loop.stand_still_while(self._threads_work)

    def _threads_work(self) -> bool:
        """Slabs are being made, blocks are read or could be read now, or the tier writes. A read at a closed
        gate waits for the test."""
        at_gates = sum(file.waiting for file in self.gates if not file.gate.is_set())
        if self.workers.under_way or self.readers.busy > at_gates or (self.tier and self.tier.writes):
            return True
        if self.readers.idle_since() is not None:
            return True
        # A thread tells of the end of its read when it has left it.
        return any(entry.reading and not self._waits(entry) for entry in self.staging.entries.values())

    @staticmethod
    def _waits(entry: CacheEntry) -> bool:
        """For the test, which has closed its gate."""
        files = (file for file in entry.checkpoint.files if isinstance(file, GatedFile))
        return any(not file.gate.is_set() for file in files)

    def _spare(self) -> int:
        try:
            return self._asked()
        finally:
            self.looks += 1

    def enter(
        self,
        *paths: Path,
        uid: int = 0,
        memory_limit: int | None = None,
        names: Sequence[str] | None = None,
        group: Group | None = None,
        skip: int = 0,
        pin: bool = False,
        prefetch: bool = False,
        gated: bool = False,
    ) -> Visit:
        """`prefetch` is whole or nothing, and nobody's; what is to `pin` is pinned at once."""
        checkpoint = self.catalog.resolve([str(path) for path in paths], ROOT)
        gates: list[GatedFile] = []
        if gated:
            gates = [GatedFile(file) for file in checkpoint.files]
            self.gates += gates
            checkpoint = Checkpoint(checkpoint.sources, tuple(gates), checkpoint.headers)
        try:
            every = select(checkpoint.tables, names)
            selection = without(every, skip)
            made_for = without(every, group.released_tensors if group else skip)
            demand = self.staging.demand(checkpoint, made_for, memory_limit, uid)
            if prefetch:
                demand = demand.only_whole(self.config.capacity_bytes)
        except BaseException:
            checkpoint.close()
            raise
        contents = {file.uri: self._content(file) for file in checkpoint.files}
        visit = Visit(self, paths, None, demand, (checkpoint, selection), gates, contents)  # type: ignore[arg-type]
        visit.entry = self.staging.enter(
            checkpoint,
            selection,
            demand,
            key=visit,
            holder=Holder(
                uid,
                1,
                "test",
                asyncio.get_running_loop().time(),
                on_corrupt=lambda error: self.told.append((visit, error)),
            ),
            group=group,
            owner_uid=None if pin or prefetch else uid,
            made_for=made_for,
        )
        if pin:
            visit.entry.pin(visit.entry.names[0])
        if visit.entry.checkpoint is not checkpoint:
            checkpoint.close()
        return visit

    def _content(self, file: SourceFile) -> bytes:
        """Read once for each version."""
        version, content = self._read.get(file.uri, ("", b""))
        if version != file.version:
            content = Path(file.uri).read_bytes()
            self._read[file.uri] = file.version, content
        return content

    @property
    def queued(self) -> int:
        return self.staging.usage().waiting

    def assert_within_the_limit(self) -> None:
        usage = self.staging.usage()
        known = usage.free_bytes + usage.reading_bytes + usage.leased_bytes + usage.warm_bytes
        limit = self.config.capacity_bytes
        assert known <= self.staging.pool.existing_slabs * SLAB_BYTES <= limit
        assert usage.peak_bytes <= limit
        assert self.workers.most_slabs * SLAB_BYTES <= limit

    def open_files(self) -> list[str]:
        """Checkpoints that were opened since this buffer was made, and not closed. Others may be open too: a
        test that failed before leaves its own."""
        return [target for target in more_fds(self.fds).values() if target.endswith(".safetensors")]

    def assert_nothing_is_left(self) -> None:
        """No entry, nobody in the queue, no reservation, no file: only free slabs."""
        assert not self.staging.entries
        assert self.queued == 0
        pool = self.staging.pool
        assert pool.available == pool.max_slabs
        assert pool.free_slabs == pool.existing_slabs == open_slabs()
        assert self.readers.busy == 0
        assert not self.open_files()

    async def close(self) -> None:
        def emptied() -> bool:
            self.staging.evict(lambda entry: True)
            # A read whose file is being checked writes into no slab, and ends all the same.
            usage = self.staging.usage()
            if self.staging.entries or usage.stuck_bytes or self.readers.busy:
                return False
            return not self.open_files()

        await until(emptied)
        await turns()
        self.assert_within_the_limit()
        self.assert_nothing_is_left()
        await self.staging.stop()
        assert open_slabs() == 0


@asynccontextmanager
async def running(**config: Any) -> AsyncIterator[Bench]:
    """A buffer that must be empty at the end."""
    bench = Bench(**config)
    try:
        yield bench
        await bench.close()
    except BaseException:
        close_leftovers()
        raise
    finally:
        for file in bench.gates:
            file.gate.set()
        bench.readers.stop()
        for thread in bench.readers.threads:
            await asyncio.to_thread(thread.join, 60)
        bench.workers.shutdown()
        bench.headers.shutdown()
        bench.catalog.shutdown()
    assert len(open_fds()) <= len(bench.fds) + 1  # the loop's own executor may have made a pipe
