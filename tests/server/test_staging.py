"""Admission, sharing, eviction and reading together: real slabs, real files, the real reader threads.

The buffer has 8 slabs of 2 MiB unless a test says otherwise. Time passes only when a test says so.
"""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from penstock.server import plan
from penstock.server.catalog import Catalog, Checkpoint
from penstock.server.demand import Demand
from penstock.server.errors import (
    CheckpointChangedError,
    MemoryLimitTooSmallError,
    PenstockError,
    ShuttingDownError,
    SourceUnavailableError,
    StagingExhaustedError,
)
from penstock.server.metrics import Totals
from penstock.server.reader import ReaderPool
from penstock.server.sources import SourceFile
from penstock.server.sources.file import FileSource
from penstock.server.stage import SegmentState
from penstock.server.staged import Holder, StagedCheckpoint
from penstock.server.staging import PATIENCE_SECONDS, Group, Staging

from .support import (
    MIB,
    ROOT,
    SLAB_BYTES,
    WatchedExecutor,
    advance,
    close_leftovers,
    make_config,
    no_objects,
    on_clock_loop,
    open_fds,
    open_slabs,
    turns,
    until,
    write_checkpoint,
)
from .test_pool import identities, no_more_descriptors


class GatedFile:
    """A file whose reads wait until the test opens the gate, and are counted."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self.uri, self.version, self.size_bytes = file.uri, file.version, file.size_bytes
        self.kind, self.alignment = file.kind, file.alignment
        self.gate = threading.Event()
        self.reads = 0
        self.read_bytes = 0
        self.error: BaseException | None = None
        self._lock = threading.Lock()

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        with self._lock:
            self.reads += 1
        assert self.gate.wait(60)
        if self.error is not None:
            raise self.error
        self._file.read_into(offset, views)
        with self._lock:
            self.read_bytes += sum(map(len, views))

    def check_unchanged(self) -> None:
        self._file.check_unchanged()

    def close(self) -> None:
        self._file.close()


def content_of(path: str) -> bytes:
    return Path(path).read_bytes()


@dataclass(eq=False)
class Visit:
    """One load, as far as the staging buffer knows it."""

    bench: Bench
    paths: tuple[Path, ...]
    staged: StagedCheckpoint
    pieces_of: tuple[Checkpoint, plan.Selection]
    gates: list[GatedFile]

    def leave(self) -> None:
        self.staged.leave(self)

    def open_gates(self) -> None:
        for file in self.gates:
            file.gate.set()

    async def read(self, count: int | None = None, *, begin: int = 0, release: bool = True) -> int:
        """Reads segments as a client does, compares every tensor with the file; returns the bytes."""
        await self.staged.wait_started()
        stage = self.staged.stage
        assert stage is not None
        pieces = self.staged.pieces(*self.pieces_of)
        delivered = 0
        for number, piece in enumerate(pieces[:count]):
            if number < begin:
                continue
            await self.staged.wait_ready(piece.segment)
            segment = stage.segments[piece.segment]
            table = self.staged.checkpoint.tables[segment.file]
            ring = [slab.view for slab in self.staged.slabs]
            content = content_of(self.staged.checkpoint.files[segment.file].uri)
            for index in piece.tensors:
                start, end = table.start(index), table.end(index)
                at = stage.ring_offset(piece.segment) + start - segment.start
                assert self._ring_bytes(ring, at, end - start) == content[start:end], table.name(index)
                delivered += end - start
            if release:
                self.staged.release(self, number + 1)
        return delivered

    @staticmethod
    def _ring_bytes(ring: list[memoryview], at: int, size: int) -> bytes:
        parts = []
        while size:
            number, inside = divmod(at, SLAB_BYTES)
            count = min(size, SLAB_BYTES - inside)
            parts.append(bytes(ring[number % len(ring)][inside : inside + count]))
            at, size = at + count, size - count
        return b"".join(parts)


class Bench:
    """A staging buffer, and what has to be zero when all have left."""

    def __init__(self, **config: Any) -> None:
        gc.collect()
        self.fds = len(open_fds())
        self.config = make_config(**config)
        self.workers = WatchedExecutor(3)
        self.headers = ThreadPoolExecutor(1)
        self.readers = ReaderPool(self.config.concurrency)
        self.totals = Totals()
        self.gates: list[GatedFile] = []
        self.catalog = Catalog(FileSource(self.headers), no_objects(self.headers))
        self.staging = Staging(
            self.config, readers={"file": self.readers}, workers=self.workers, totals=self.totals
        )

    def enter(
        self,
        *paths: Path,
        uid: int = 0,
        memory_limit: int | None = None,
        names: Sequence[str] | None = None,
        group: Group | None = None,
        pin: bool = False,
        gated: bool = False,
    ) -> Visit:
        checkpoint = self.catalog.resolve([str(path) for path in paths], ROOT)
        gates: list[GatedFile] = []
        if gated:
            gates = [GatedFile(file) for file in checkpoint.files]
            self.gates += gates
            checkpoint = Checkpoint(checkpoint.sources, tuple(gates), checkpoint.headers)
        try:
            selection = plan.select(checkpoint.tables, names)
            demand = self.staging.demand(checkpoint, selection, memory_limit, 0)
        except BaseException:
            checkpoint.close()
            raise
        visit = Visit(self, paths, None, (checkpoint, selection), gates)  # type: ignore[arg-type]
        visit.staged = self.staging.enter(
            checkpoint,
            selection,
            demand,
            key=visit,
            holder=Holder(uid, 1, "test", 0.0),
            group=group,
            tenant=None if pin else uid,
        )
        visit.staged.pinned = visit.staged.pinned or pin
        if visit.staged.checkpoint is not checkpoint:
            checkpoint.close()
        return visit

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

    def assert_nothing_is_left(self) -> None:
        """No stage, no queue entry, no reservation, no file: only free slabs."""
        assert not self.staging.stages
        assert self.queued == 0
        pool = self.staging.pool
        assert pool.available == pool.max_slabs
        assert pool.free_slabs == pool.existing_slabs == open_slabs()
        assert self.readers.busy == 0
        assert not [name for name in open_fds().values() if name.endswith(".safetensors")]

    async def close(self) -> None:
        def emptied() -> bool:
            self.staging.evict(lambda staged: True)
            return not self.staging.stages

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
    assert len(open_fds()) <= bench.fds + 1  # the loop's own executor may have made a pipe


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make("a", 3)`: a checkpoint that takes 3 slabs as a whole, in tensors of at most 1 MiB."""
    written = 0

    def write(name: str, slabs: float, *, tensor_bytes: int = MIB) -> Path:
        nonlocal written
        written += 1
        size = int(slabs * SLAB_BYTES) - 64 * 1024
        sizes = [tensor_bytes] * (size // tensor_bytes) + [size % tensor_bytes]
        return write_checkpoint(tmp_path / f"{name}.safetensors", sizes, seed=written)

    return write


# ---- one load -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [None, 0, SLAB_BYTES, 2 * SLAB_BYTES, 5 * SLAB_BYTES])
@on_clock_loop
async def test_bytes_are_right_whole_and_through_windows(
    make: Callable[..., Path], memory_limit: int
) -> None:
    path = make("a", 6, tensor_bytes=700_001)
    async with running() as bench:
        visit = bench.enter(path, memory_limit=memory_limit)
        assert await visit.read() == 6 * SLAB_BYTES - 64 * 1024
        assert visit.staged.full == (memory_limit is None)
        if memory_limit:
            assert len(visit.staged.slabs) * SLAB_BYTES <= memory_limit
        if memory_limit == 0:
            assert len(visit.staged.slabs) == 1
        visit.leave()


@on_clock_loop
async def test_a_checkpoint_larger_than_the_buffer_passes_through_a_window(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running(memory_limit=3 * SLAB_BYTES, capacity_bytes=3 * SLAB_BYTES) as bench:
        visit = bench.enter(path)
        await visit.read()
        assert not visit.staged.full
        visit.leave()
        await until(lambda: not bench.staging.stages)


@on_clock_loop
async def test_a_tensor_that_crosses_slabs_and_the_end_of_the_ring_is_whole(
    make: Callable[..., Path],
) -> None:
    path = make("a", 7, tensor_bytes=int(1.3 * SLAB_BYTES))
    async with running(memory_limit=2 * SLAB_BYTES, capacity_bytes=2 * SLAB_BYTES) as bench:
        visit = bench.enter(path)
        await visit.read()
        visit.leave()


@on_clock_loop
async def test_a_tensor_that_needs_a_page_more_than_the_longest_one_gets_it(tmp_path: Path) -> None:
    """The first tensor is a slab long and aligned; the other, as long, is not."""
    sizes = [SLAB_BYTES, 1, SLAB_BYTES - 1, SLAB_BYTES]
    raw = len(write_checkpoint(tmp_path / "a.safetensors", sizes).read_bytes()) - sum(sizes)
    path = write_checkpoint(tmp_path / "a.safetensors", sizes, pad_bytes=-raw % 4096)
    async with running(memory_limit=0) as bench:
        visit = bench.enter(path)
        assert await visit.read() == sum(sizes)
        visit.leave()
    sizes = [SLAB_BYTES, 1, SLAB_BYTES - 1, 1]
    path = write_checkpoint(tmp_path / "b.safetensors", [SLAB_BYTES, 1, SLAB_BYTES], pad_bytes=-raw % 4096)
    async with running(memory_limit=0) as bench:
        visit = bench.enter(path)
        assert await visit.read() == 2 * SLAB_BYTES + 1
        visit.leave()


@on_clock_loop
async def test_a_checkpoint_without_bytes_is_complete_at_once(tmp_path: Path) -> None:
    empty = write_checkpoint(tmp_path / "empty.safetensors", [])
    zeros = write_checkpoint(tmp_path / "zeros.safetensors", [0, 0, 0])
    async with running() as bench:
        for path in (empty, zeros):
            visit = bench.enter(path)
            assert await visit.read() == 0
            await visit.staged.wait_complete()
            visit.leave()


@on_clock_loop
async def test_a_tensor_larger_than_the_limit_is_refused_by_name(make: Callable[..., Path]) -> None:
    path = make("a", 4, tensor_bytes=3 * SLAB_BYTES)
    async with running() as bench:
        with pytest.raises(MemoryLimitTooSmallError, match=rf"'t0' .* {3 * SLAB_BYTES} bytes") as caught:
            bench.enter(path, memory_limit=2 * SLAB_BYTES)
        assert caught.value.details["tensor"] == "t0"
        assert caught.value.details["limit_bytes"] == str(2 * SLAB_BYTES)


@on_clock_loop
async def test_a_load_may_not_take_more_than_the_daemon_has(make: Callable[..., Path]) -> None:
    path = make("a", 4, tensor_bytes=3 * SLAB_BYTES)
    async with running(memory_limit=2 * SLAB_BYTES, capacity_bytes=2 * SLAB_BYTES) as bench:
        with pytest.raises(MemoryLimitTooSmallError, match="--memory-limit"):
            bench.enter(path, memory_limit=100 * SLAB_BYTES)


def test_only_whole_refuses_what_does_not_fit_as_a_whole() -> None:
    assert Demand(3, 2, 1).only_whole(99) == Demand(3, 3, 3, 3, whole_only=True)
    with pytest.raises(MemoryLimitTooSmallError, match="99 bytes"):
        Demand(0, 2, 1).only_whole(99)


# ---- sharing ------------------------------------------------------------------------------------


@on_clock_loop
async def test_a_warm_checkpoint_is_not_read_again(make: Callable[..., Path]) -> None:
    path = make("a", 3)
    async with running() as bench:
        first = bench.enter(path)
        await first.read()
        first.leave()
        assert bench.staging.usage().warm_bytes == 3 * SLAB_BYTES
        again = bench.enter(path)
        assert again.staged is first.staged
        assert await again.read() == 3 * SLAB_BYTES - 64 * 1024
        assert bench.totals.read_bytes == again.staged.read_bytes == 3 * SLAB_BYTES - 64 * 1024
        assert (bench.totals.stage_hits, bench.totals.stage_misses) == (1, 1)
        again.leave()


@on_clock_loop
async def test_a_warm_checkpoint_serves_some_of_its_tensors(make: Callable[..., Path]) -> None:
    path = make("a", 3)
    async with running() as bench:
        whole = bench.enter(path)
        await whole.read()
        part = bench.enter(path, names=["t4", "t1"])
        assert part.staged is whole.staged
        assert await part.read() == 2 * MIB
        whole.leave()
        part.leave()


@on_clock_loop
async def test_a_part_does_not_serve_the_whole(make: Callable[..., Path]) -> None:
    path = make("a", 3)
    async with running() as bench:
        part = bench.enter(path, names=["t4", "t1"])
        await part.read()
        whole = bench.enter(path)
        assert whole.staged is not part.staged
        await whole.read()
        part.leave()
        whole.leave()


@on_clock_loop
async def test_an_overwritten_checkpoint_is_read_anew(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with running() as bench:
        old = bench.enter(path)
        await old.read()
        old.leave()
        make("a", 2)
        new = bench.enter(path)
        assert new.staged is not old.staged
        await new.read()
        new.leave()


@on_clock_loop
async def test_a_load_joins_one_that_still_waits_for_memory(make: Callable[..., Path]) -> None:
    big, other = make("big", 8), make("other", 4)
    async with running() as bench:
        holding = bench.enter(big, gated=True)
        first, second = bench.enter(other), bench.enter(other)
        assert second.staged is first.staged
        assert bench.queued == 1
        assert bench.staging.place(second.staged) == 1
        holding.open_gates()
        await holding.read()
        holding.leave()
        await asyncio.gather(first.read(), second.read())
        assert second.staged.read_bytes == 4 * SLAB_BYTES - 64 * 1024
        first.leave()
        second.leave()


@on_clock_loop
async def test_two_loads_of_one_window_read_the_file_once(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=2 * SLAB_BYTES, gated=True)
        second = bench.enter(path, memory_limit=2 * SLAB_BYTES)
        assert second.staged is first.staged
        first.open_gates()
        await asyncio.gather(first.read(), second.read())
        assert bench.totals.read_bytes == 7 * SLAB_BYTES - 64 * 1024
        first.leave()
        second.leave()


@on_clock_loop
async def test_a_load_that_comes_after_a_window_recycled_gets_its_own(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=2 * SLAB_BYTES)
        await first.read(3)
        assert first.staged.stage is not None
        assert first.staged.stage.recycled
        second = bench.enter(path, memory_limit=2 * SLAB_BYTES)
        assert second.staged is not first.staged
        await asyncio.gather(first.read(begin=3), second.read())
        first.leave()
        second.leave()


@on_clock_loop
async def test_a_window_waits_for_the_slowest_and_goes_on_when_it_dies(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        fast = bench.enter(path, memory_limit=2 * SLAB_BYTES)
        slow = bench.enter(path, memory_limit=2 * SLAB_BYTES)
        reading = asyncio.ensure_future(fast.read())
        await slow.read(1, release=False)
        await until(lambda: bench.readers.busy == 0 and not fast.staged._reading)
        assert not reading.done()
        assert slow.staged.stage is not None
        assert slow.staged.stage.state(0) is SegmentState.READY
        slow.leave()
        await reading
        fast.leave()


GROUP = Group("replicas", 2)


@on_clock_loop
async def test_a_group_shares_a_window_and_the_first_waits_for_the_last(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=2 * SLAB_BYTES, group=GROUP)
        reading = asyncio.ensure_future(first.read())
        await first.staged.wait_started()
        await until(lambda: not first.staged._reading)
        assert first.staged.stage is not None
        assert not first.staged.stage.recycled
        second = bench.enter(path, memory_limit=2 * SLAB_BYTES, group=GROUP)
        assert second.staged is first.staged
        await asyncio.gather(reading, second.read())
        assert bench.totals.read_bytes == 7 * SLAB_BYTES - 64 * 1024
        first.leave()
        second.leave()


@on_clock_loop
async def test_a_group_goes_on_without_a_member_that_does_not_come(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=2 * SLAB_BYTES, group=GROUP)
        reading = asyncio.ensure_future(first.read())
        await first.staged.wait_started()
        await until(lambda: not first.staged._reading)
        advance(bench.config.group_timeout_seconds - 1)
        await turns()
        assert first.staged.stage is not None
        assert not first.staged.stage.recycled
        advance(2)
        await reading
        late = bench.enter(path, memory_limit=2 * SLAB_BYTES, group=GROUP)
        await late.read()
        first.leave()
        late.leave()


@on_clock_loop
async def test_a_group_member_that_dies_is_counted_out(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        visits = [bench.enter(path, memory_limit=2 * SLAB_BYTES, group=Group("three", 3)) for _ in range(2)]
        await visits[0].read(1)
        visits[0].leave()
        visits.append(bench.enter(path, memory_limit=2 * SLAB_BYTES, group=Group("three", 3)))
        await asyncio.gather(visits[1].read(), visits[2].read())
        for visit in visits:
            visit.leave()


# ---- admission ----------------------------------------------------------------------------------


@on_clock_loop
async def test_two_loads_race_for_memory_that_fits_one(make: Callable[..., Path]) -> None:
    paths = [make("a", 6), make("b", 6)]
    async with running() as bench:

        async def load(path: Path) -> None:
            visit = bench.enter(path)
            await visit.read()
            visit.leave()

        await asyncio.gather(*map(load, paths))
        assert bench.totals.evictions == 1


@on_clock_loop
async def test_loads_that_come_at_the_same_moment_are_not_granted_the_same_slabs(
    make: Callable[..., Path],
) -> None:
    """No turn of the loop lies between them: what the first was granted must count already."""
    paths = [make(name, 5) for name in "abc"]
    async with running() as bench:
        visits = [bench.enter(path) for path in paths]
        assert bench.queued == 2
        for visit in visits:
            await visit.read()
            visit.leave()


@on_clock_loop
async def test_several_that_fit_start_at_once_when_memory_returns(make: Callable[..., Path]) -> None:
    big, small = make("big", 8), [make(name, 3) for name in "abc"]
    async with running() as bench:
        holding = bench.enter(big, gated=True)
        waiting = [bench.enter(path) for path in small]
        assert [bench.staging.place(visit.staged) for visit in waiting] == [1, 2, 3]
        holding.leave()
        holding.open_gates()
        await asyncio.gather(waiting[0].read(), waiting[1].read())
        assert [bench.staging.place(visit.staged) for visit in waiting] == [0, 0, 1]
        waiting[0].leave()
        await waiting[2].read()
        waiting[1].leave()
        waiting[2].leave()


@on_clock_loop
async def test_a_large_load_at_the_head_is_not_overtaken(make: Callable[..., Path]) -> None:
    running_path, large, small = make("a", 6), make("large", 5), make("small", 1)
    async with running() as bench:
        first = bench.enter(running_path, gated=True)
        head, behind = bench.enter(large), bench.enter(small)
        advance(PATIENCE_SECONDS + 1)
        await turns()
        assert bench.staging.pool.available == 2
        assert [bench.staging.place(visit.staged) for visit in (head, behind)] == [1, 2]
        first.open_gates()
        await first.read()
        first.leave()
        await head.read()
        await behind.read()
        assert head.staged.full
        head.leave()
        behind.leave()


@on_clock_loop
async def test_waiting_too_long_fails_with_the_numbers(make: Callable[..., Path]) -> None:
    async with running() as bench:
        holding = bench.enter(make("a", 8), gated=True)
        waiting, behind = bench.enter(make("b", 5)), bench.enter(make("c", 1))
        await holding.staged.wait_started()
        advance(bench.config.queue_timeout_seconds + 1)
        with pytest.raises(StagingExhaustedError) as caught:
            await waiting.staged.wait_started()
        assert caught.value.details == {"leased_bytes": "0", "reading_bytes": str(8 * SLAB_BYTES)}
        for text in ("600 s", "10.5 MB", "16.8 MB"):
            assert text in caught.value.message
        with pytest.raises(StagingExhaustedError):
            await behind.staged.wait_started()
        assert bench.queued == 0
        for visit in (waiting, behind):
            visit.leave()
        holding.open_gates()
        await holding.read()
        holding.leave()


@on_clock_loop
async def test_one_that_gives_up_waiting_lets_the_next_one_go(make: Callable[..., Path]) -> None:
    async with running() as bench:
        holding = bench.enter(make("a", 7), gated=True)
        waiting, behind = bench.enter(make("b", 5)), bench.enter(make("c", 1))
        waiting.leave()
        await behind.read(0)
        assert behind.staged.started
        behind.leave()
        holding.leave()
        holding.open_gates()


@on_clock_loop
async def test_only_idle_checkpoints_are_evicted_least_recently_used_first(make: Callable[..., Path]) -> None:
    async with running() as bench:
        warm = {}
        for name in ("a", "b", "c"):
            warm[name] = bench.enter(make(name, 2))
            await warm[name].read()
            warm[name].leave()
            advance(1)
        again = bench.enter(*warm["a"].paths)
        advance(1)
        again.leave()
        held = bench.enter(*warm["c"].paths)
        newcomer = bench.enter(make("d", 4))
        await newcomer.read()
        assert [name for name, visit in warm.items() if not visit.staged.closed] == ["a", "c"]
        another = bench.enter(make("e", 2))
        await another.read()
        assert [name for name, visit in warm.items() if not visit.staged.closed] == ["c"]
        assert bench.totals.evictions == 2
        for visit in (held, newcomer, another):
            visit.leave()


@on_clock_loop
async def test_nothing_is_evicted_for_a_load_that_would_not_fit_even_so(make: Callable[..., Path]) -> None:
    async with running() as bench:
        warm = bench.enter(make("a", 2))
        await warm.read()
        warm.leave()
        held = bench.enter(make("b", 4), gated=True)
        waiting = bench.enter(make("c", 5))
        await turns()
        assert not warm.staged.closed
        assert bench.queued == 1
        waiting.leave()
        held.leave()
        held.open_gates()


@on_clock_loop
async def test_a_pinned_checkpoint_is_not_evicted_until_it_is_asked_for(make: Callable[..., Path]) -> None:
    async with running() as bench:
        pinned = bench.enter(make("a", 4), pin=True)
        await pinned.read()
        pinned.leave()
        waiting = bench.enter(make("b", 8))
        assert bench.queued == 1
        assert not pinned.staged.closed
        assert bench.staging.evict(lambda staged: staged is pinned.staged) == (4 * SLAB_BYTES, 0)
        await waiting.read()
        assert waiting.staged.full
        waiting.leave()


@on_clock_loop
async def test_evicting_what_is_held_unpins_it_and_says_so(make: Callable[..., Path]) -> None:
    async with running() as bench:
        held = bench.enter(make("a", 4), pin=True)
        await held.read()
        assert bench.staging.evict(lambda staged: True) == (0, 4 * SLAB_BYTES)
        assert not held.staged.closed
        assert not held.staged.pinned
        held.leave()


@on_clock_loop
async def test_a_load_makes_do_with_a_window_when_leased_memory_does_not_return(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        leased = bench.enter(make("a", 6))
        await leased.read()
        waiting = bench.enter(make("b", 5))
        await turns()
        assert not waiting.staged.started
        advance(PATIENCE_SECONDS + 0.1)
        await waiting.read()
        assert not waiting.staged.full
        assert len(waiting.staged.slabs) <= 2
        waiting.leave()
        leased.leave()


@on_clock_loop
async def test_a_load_makes_do_with_a_window_also_when_the_other_was_read_for_long(
    make: Callable[..., Path],
) -> None:
    """Patience ended while that was still being read; when it is complete, somebody has to notice."""
    async with running() as bench:
        leased = bench.enter(make("a", 6), gated=True)
        await leased.staged.wait_started()
        waiting = bench.enter(make("b", 5))
        advance(PATIENCE_SECONDS + 1)
        await turns()
        assert not waiting.staged.started
        leased.open_gates()
        await leased.read()
        await turns()
        assert not waiting.staged.started
        advance(PATIENCE_SECONDS + 1)
        await waiting.read()
        assert not waiting.staged.full
        waiting.leave()
        leased.leave()


@on_clock_loop
async def test_a_load_does_not_settle_for_a_window_while_memory_is_about_to_return(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        other = bench.enter(make("a", 6), gated=True)
        waiting = bench.enter(make("b", 5))
        advance(PATIENCE_SECONDS + 1)
        await turns()
        other.leave()
        other.open_gates()
        await waiting.read()
        assert waiting.staged.full
        waiting.leave()


@on_clock_loop
async def test_a_load_fails_and_gives_all_back_when_the_system_has_no_memory(
    make: Callable[..., Path],
) -> None:
    path = make("a", 4)
    async with running() as bench:
        visit = bench.enter(path)
        with no_more_descriptors(), pytest.raises(StagingExhaustedError, match="no memory for 4 slabs"):
            await visit.staged.wait_started()
        visit.leave()
        bench.assert_nothing_is_left()
        again = bench.enter(path)
        await again.read()
        again.leave()


@on_clock_loop
async def test_one_that_leaves_before_the_system_refuses_it_memory_leaves_nothing(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 4))
        visit.leave()
        with no_more_descriptors():
            await until(lambda: visit.staged.error)
            await turns()
        bench.assert_nothing_is_left()


@on_clock_loop
async def test_stopping_tells_those_who_wait(make: Callable[..., Path]) -> None:
    async with running() as bench:
        holding = bench.enter(make("a", 8), gated=True)
        waiting = bench.enter(make("b", 4))
        await bench.staging.stop()
        with pytest.raises(ShuttingDownError):
            await waiting.staged.wait_started()
        assert bench.queued == 0
        waiting.leave()
        holding.leave()
        holding.open_gates()
        await until(lambda: holding.staged.idle)
        await turns()
        bench.staging.evict(lambda staged: True)
        await bench.staging.pool.stop()


# ---- leaving ------------------------------------------------------------------------------------


@on_clock_loop
async def test_the_last_to_leave_a_queue_leaves_nothing_behind(make: Callable[..., Path]) -> None:
    async with running() as bench:
        holding = bench.enter(make("a", 8), gated=True)
        path = make("b", 4)
        visits = [bench.enter(path), bench.enter(path)]
        for visit in visits:
            visit.leave()
            visit.leave()
        assert visits[0].staged.closed
        assert bench.queued == 0
        holding.leave()
        holding.open_gates()


@on_clock_loop
async def test_leaving_while_slabs_are_being_made_gives_them_back(make: Callable[..., Path]) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 4))
        assert not visit.staged.started
        visit.leave()
        await until(lambda: visit.staged.closed)
        await turns()
        bench.assert_nothing_is_left()
        assert bench.staging.pool.free_slabs == 4


@on_clock_loop
async def test_a_load_that_joins_while_slabs_are_being_made_keeps_them(make: Callable[..., Path]) -> None:
    async with running() as bench:
        path = make("a", 4)
        first = bench.enter(path)
        first.leave()
        second = bench.enter(path)
        assert second.staged is first.staged
        await second.read()
        second.leave()


@pytest.mark.parametrize("memory_limit", [None, 2 * SLAB_BYTES])
@on_clock_loop
async def test_leaving_during_the_reads_gives_up_once_they_ended(
    make: Callable[..., Path], memory_limit: int | None
) -> None:
    """Slabs that a read still writes to must not be anybody else's."""
    async with running() as bench:
        visit = bench.enter(make("a", 6), memory_limit=memory_limit, gated=True)
        await visit.staged.wait_started()
        await until(lambda: visit.gates[0].reads == bench.config.concurrency)
        visit.leave()
        await turns()
        assert not visit.staged.idle
        assert bench.staging.evict(lambda staged: True)[0] == 0
        assert not visit.staged.closed
        visit.open_gates()
        await until(lambda: visit.staged.idle)
        await turns()
        assert visit.gates[0].reads <= bench.config.concurrency
        if memory_limit is not None:
            bench.assert_nothing_is_left()


@on_clock_loop
async def test_a_later_load_takes_a_parked_checkpoint_up_where_it_was_left(make: Callable[..., Path]) -> None:
    async with running() as bench:
        path = make("a", 6, tensor_bytes=MIB)
        first = bench.enter(path, gated=True)
        await first.staged.wait_started()
        file = first.gates[0]
        await until(lambda: file.reads == bench.config.concurrency)
        first.leave()
        first.open_gates()
        await until(lambda: first.staged.idle)
        await turns()
        assert not first.staged.complete
        assert first.staged.state == "warm"
        second = bench.enter(path)
        assert second.staged is first.staged
        await second.read()
        assert second.staged.complete
        second.leave()


@pytest.mark.parametrize("memory_limit", [None, 2 * SLAB_BYTES])
@on_clock_loop
async def test_a_load_that_comes_while_the_last_reads_of_the_one_before_end_gets_right_bytes(
    make: Callable[..., Path], memory_limit: int | None
) -> None:
    async with running() as bench:
        path = make("a", 6)
        first = bench.enter(path, memory_limit=memory_limit, gated=True)
        await first.staged.wait_started()
        await until(lambda: first.gates[0].reads == bench.config.concurrency)
        first.leave()
        second = bench.enter(path, memory_limit=memory_limit)
        assert second.staged is first.staged
        first.open_gates()
        await second.read()
        second.leave()


@on_clock_loop
async def test_a_checkpoint_that_has_been_read_keeps_no_file_open(make: Callable[..., Path]) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 2))
        await visit.staged.wait_complete()
        assert not [name for name in open_fds().values() if name.endswith(".safetensors")]
        visit.leave()


@on_clock_loop
async def test_without_a_limit_memory_goes_back_to_the_system(make: Callable[..., Path]) -> None:
    async with running(memory_limit=-1) as bench:
        keeping = asyncio.ensure_future(bench.staging.keep())
        visit = bench.enter(make("a", 3))
        await visit.read()
        advance(10 * bench.config.trim_after_seconds)
        await turns()
        assert open_slabs() == 3
        visit.leave()
        await turns()
        assert open_slabs() == 3

        def trimmed() -> bool:
            advance(bench.config.trim_after_seconds / 2)
            return open_slabs() == 0

        await until(trimmed)
        assert not bench.staging.stages
        keeping.cancel()


@on_clock_loop
async def test_with_the_minimal_limit_nothing_stays_warm(make: Callable[..., Path]) -> None:
    async with running(memory_limit=0) as bench:
        visit = bench.enter(make("a", 0.5, tensor_bytes=MIB))
        await visit.read()
        assert visit.staged.full
        visit.leave()
        bench.assert_nothing_is_left()


# ---- tenants ------------------------------------------------------------------------------------


@on_clock_loop
async def test_a_slab_that_one_user_held_never_goes_to_another(make: Callable[..., Path]) -> None:
    async with running() as bench:
        held: dict[int, set[int]] = {}
        for uid in (1, 2, 1, 2):
            visit = bench.enter(make("a", 7), uid=uid)
            await visit.read()
            held.setdefault(uid, set()).update(identities(visit.staged.slabs))
            visit.leave()
        assert not held[1] & held[2]


@on_clock_loop
async def test_users_do_not_share_a_checkpoint(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with running() as bench:
        one, other = bench.enter(path, uid=1), bench.enter(path, uid=2)
        assert one.staged is not other.staged
        await asyncio.gather(one.read(), other.read())
        one.leave()
        other.leave()


@on_clock_loop
async def test_a_prefetched_checkpoint_is_the_first_users_who_loads_it(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with running() as bench:
        prefetch = bench.enter(path, pin=True)
        await prefetch.read()
        prefetch.leave()
        assert {slab.tenant for slab in prefetch.staged.slabs} == {None}
        first, other = bench.enter(path, uid=1), bench.enter(path, uid=2)
        assert first.staged is prefetch.staged
        assert other.staged is not prefetch.staged
        assert {slab.tenant for slab in first.staged.slabs} == {1}
        await asyncio.gather(first.read(), other.read())
        first.leave()
        other.leave()


@on_clock_loop
async def test_who_joins_a_prefetch_that_waits_for_slabs_gets_them_as_its_own(
    make: Callable[..., Path],
) -> None:
    path = make("a", 2)
    async with running() as bench:
        prefetch, first = bench.enter(path, pin=True), bench.enter(path, uid=1)
        assert first.staged is prefetch.staged
        await first.read()
        assert {slab.tenant for slab in first.staged.slabs} == {1}
        prefetch.leave()
        first.leave()


# ---- failing ------------------------------------------------------------------------------------


@on_clock_loop
async def test_a_file_that_changes_while_it_is_read_fails_every_load_of_it(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with running() as bench:
        visits = [bench.enter(path, gated=True)]
        visits.append(bench.enter(path))
        await visits[0].staged.wait_started()
        os.utime(path, ns=(1, 1))
        visits[0].open_gates()
        for visit in visits:
            with pytest.raises(CheckpointChangedError):
                await visit.staged.wait_complete()
        anew = bench.enter(path)
        assert anew.staged is not visits[0].staged
        await anew.read()
        for visit in (*visits, anew):
            visit.leave()


@pytest.mark.parametrize("error", [OSError("boom"), MemoryError(), RuntimeError("a bug")])
@on_clock_loop
async def test_a_read_that_fails_unexpectedly_fails_the_load_and_nothing_else(
    make: Callable[..., Path], error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as bench:
        bad, good = bench.enter(make("a", 3), gated=True), bench.enter(make("b", 3))
        bad.gates[0].error = error
        bad.open_gates()
        with pytest.raises(SourceUnavailableError, match="reading failed"):
            await bad.staged.wait_complete()
        await good.read()
        bad.leave()
        good.leave()
        await until(lambda: bad.staged.closed)
    assert "reading failed unexpectedly" in caplog.text


@on_clock_loop
async def test_segments_read_before_a_failure_are_still_delivered(make: Callable[..., Path]) -> None:
    path = make("a", 6)
    async with running() as bench:
        visit = bench.enter(path, memory_limit=2 * SLAB_BYTES)
        await visit.read(1)
        visit.staged.fail(SourceUnavailableError("storage went away"))
        with pytest.raises(SourceUnavailableError, match="storage went away"):
            await visit.read(begin=1)
        visit.leave()
        await until(lambda: visit.staged.closed)


# ---- everything at once -------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@on_clock_loop
async def test_any_mixture_of_loads_stays_within_the_limit_and_leaves_nothing(
    tmp_path: Path, seed: int
) -> None:
    """Three users, checkpoints of all sizes, windows, groups, early leavers, evictions and populating."""
    choose = random.Random(seed)
    paths = [
        write_checkpoint(
            tmp_path / f"{number}.safetensors",
            [
                choose.randrange(0, int(choose.choice([0.1, 0.9, 2.5]) * MIB))
                for _ in range(choose.randint(1, 9))
            ],
            pad_bytes=choose.randrange(4096),
            seed=number,
        )
        for number in range(6)
    ]
    async with running(populate=True) as bench:
        keeping = asyncio.ensure_future(bench.staging.keep())
        tenant_of: dict[int, int] = {}
        outcomes: list[str] = []

        async def client() -> None:
            for _ in range(choose.randint(0, 20)):
                await asyncio.sleep(0)
            uid = choose.choice([1, 1, 2, 3])
            visit = bench.enter(
                choose.choice(paths),
                uid=uid,
                memory_limit=choose.choice([None, None, 0, 2 * SLAB_BYTES, 3 * SLAB_BYTES]),
                group=choose.choice([None, None, None, GROUP]),
            )
            bench.assert_within_the_limit()
            reading = asyncio.ensure_future(visit.read())
            if choose.random() < 0.3:
                for _ in range(choose.randint(0, 60)):
                    await asyncio.sleep(0)
                reading.cancel()
            try:
                await reading
                outcomes.append("read")
            except asyncio.CancelledError:
                outcomes.append("left")
            except PenstockError as error:
                outcomes.append(error.reason)
            for slab in visit.staged.slabs:
                assert slab.tenant == uid
                assert tenant_of.setdefault(os.fstat(slab.fd).st_ino, uid) == uid
            visit.leave()
            bench.assert_within_the_limit()
            if choose.random() < 0.1:
                bench.staging.evict(lambda staged: staged.id % 2 == 0)

        clients = asyncio.gather(*(client() for _ in range(30)))

        def done() -> bool:
            advance(0.05)  # patience and the groups' timeouts pass
            bench.assert_within_the_limit()
            return clients.done()

        await until(done)
        await clients
        await keeping
        assert outcomes.count("read") > 10
        assert set(outcomes) <= {"read", "left"}
