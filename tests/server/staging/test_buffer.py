"""Loads through the staging buffer: real slabs, real files, the real reader threads.

The buffer has 8 slabs of 2 MiB unless a test says otherwise. Time passes only when a test says so.
"""

from __future__ import annotations

import asyncio
import functools
import math
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.server.errors import (
    CheckpointChangedError,
    MemoryLimitTooSmallError,
    PenstockError,
    SourceUnavailableError,
)
from penstock.server.staging.memory.demand import Demand
from penstock.server.staging.memory.upkeep import LOOK_SECONDS
from penstock.server.system.headroom import SPARE_SHARE, spare_bytes

from ..bench import GROUP, Bench, running
from ..machine import GIB, machine
from ..support import (
    MIB,
    SLAB_BYTES,
    advance,
    bytes_in,
    on_clock_loop,
    open_slabs,
    turns,
    until,
    until_advanced,
    write_checkpoint,
)

# ---- one load -----------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_limit", [None, 0, SLAB_BYTES, 2 * SLAB_BYTES, 5 * SLAB_BYTES])
@on_clock_loop
async def test_bytes_are_right_whole_and_through_windows(
    make: Callable[..., Path], memory_limit: int
) -> None:
    path = make("a", 6, tensor_bytes=700_001)
    async with running() as bench:
        visit = bench.enter(path, memory_limit=memory_limit)
        assert await visit.read() == bytes_in(6)
        assert visit.entry.full == (memory_limit is None)
        if memory_limit:
            assert len(visit.entry.slabs) * SLAB_BYTES <= memory_limit
        if memory_limit == 0:
            assert len(visit.entry.slabs) == 1
        visit.leave()


@on_clock_loop
async def test_a_checkpoint_larger_than_the_buffer_passes_through_a_window(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running(memory_limit=3 * SLAB_BYTES, capacity_bytes=3 * SLAB_BYTES) as bench:
        visit = bench.enter(path)
        await visit.read()
        assert not visit.entry.full
        visit.leave()
        await until(lambda: not bench.staging.entries)


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
            await visit.entry.wait_complete()
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
        assert visits[0].entry.closed
        assert bench.queued == 0
        holding.leave()
        holding.open_gates()


@on_clock_loop
async def test_leaving_while_slabs_are_being_made_gives_them_back(make: Callable[..., Path]) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 4))
        assert not visit.entry.started
        visit.leave()
        await until(lambda: visit.entry.closed)
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
        assert second.entry is first.entry
        await second.read()
        second.leave()


@pytest.mark.parametrize("memory_limit", [None, 4 * MIB])
@on_clock_loop
async def test_leaving_during_the_reads_gives_up_once_they_ended(
    make: Callable[..., Path], memory_limit: int | None
) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 6), memory_limit=memory_limit, gated=True)
        await visit.entry.wait_started()
        await until(lambda: visit.gates[0].reads == bench.config.concurrency)
        visit.leave()
        await turns()
        assert not visit.entry.idle
        assert not visit.entry.closed
        visit.open_gates()
        await until(lambda: visit.entry.idle)
        await turns()
        assert visit.gates[0].reads <= bench.config.concurrency
        if memory_limit is not None:
            bench.assert_nothing_is_left()


@on_clock_loop
async def test_a_stage_whose_reads_hang_is_evicted_but_for_the_slabs_they_write_into(
    make: Callable[..., Path],
) -> None:
    """These must not be anybody else's, nor be unmapped: a read in the kernel cannot be called back."""
    async with running() as bench:
        visit = bench.enter(make("a", 6), gated=True)
        await visit.entry.wait_started()
        await until(lambda: visit.gates[0].reads == bench.config.concurrency)
        visit.leave()
        slabs = list(visit.entry.slabs)
        freed, leased = bench.staging.evict(lambda entry: True)
        stuck = list(visit.entry.slabs)
        assert (freed, leased) == ((len(slabs) - len(stuck)) * SLAB_BYTES, len(stuck) * SLAB_BYTES)
        assert 0 < len(stuck) < len(slabs)
        assert not bench.staging.entries
        assert bench.staging.usage().stuck_bytes == bench.staging.usage().reading_bytes == leased
        other = bench.enter(make("b", 4))
        await other.read()
        assert not set(map(id, other.entry.slabs)) & set(map(id, stuck))
        assert [bytes(slab.view[:4]) for slab in stuck]  # still mapped
        bench.assert_within_the_limit()
        other.leave()
        visit.open_gates()
        await until(lambda: not bench.staging.usage().stuck_bytes)
        await until(lambda: bench.readers.busy == 0)


@on_clock_loop
async def test_a_load_gets_what_a_stage_whose_reads_hang_does_not_need(make: Callable[..., Path]) -> None:
    async with running() as bench:
        hung = bench.enter(make("a", 6), gated=True)
        await hung.entry.wait_started()
        await until(lambda: hung.gates[0].reads == bench.config.concurrency)
        hung.leave()
        assert bench.staging.entries
        other = bench.enter(make("b", 6), memory_limit=4 * MIB)
        await other.read()
        other.leave()
        hung.open_gates()


@on_clock_loop
async def test_a_later_load_takes_a_cancelled_checkpoint_up_where_it_was_left(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        path = make("a", 6, tensor_bytes=MIB)
        first = bench.enter(path, gated=True)
        await first.entry.wait_started()
        file = first.gates[0]
        await until(lambda: file.reads == bench.config.concurrency)
        first.leave()
        first.open_gates()
        await until(lambda: first.entry.idle)
        await turns()
        assert not first.entry.complete
        assert first.entry.state == "warm"
        second = bench.enter(path)
        assert second.entry is first.entry
        await second.read()
        assert second.entry.complete
        second.leave()


@pytest.mark.parametrize("memory_limit", [None, 2 * SLAB_BYTES])
@on_clock_loop
async def test_a_load_that_comes_while_the_last_reads_of_the_one_before_end_gets_right_bytes(
    make: Callable[..., Path], memory_limit: int | None
) -> None:
    async with running() as bench:
        path = make("a", 6)
        first = bench.enter(path, memory_limit=memory_limit, gated=True)
        await first.entry.wait_started()
        await until(lambda: first.gates[0].reads == bench.config.concurrency)
        first.leave()
        second = bench.enter(path, memory_limit=memory_limit)
        assert second.entry is first.entry
        first.open_gates()
        await second.read()
        second.leave()


@on_clock_loop
async def test_a_checkpoint_that_has_been_read_keeps_no_file_open(make: Callable[..., Path]) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 2))
        await visit.entry.wait_complete()
        assert not bench.open_files()
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
        await until_advanced(lambda: open_slabs() == 0, step_seconds=bench.config.trim_after_seconds / 2)
        assert not bench.staging.entries
        keeping.cancel()


async def looks(bench: Bench, count: int = 2) -> None:
    """So many looks at the system's memory that ended after this call. Only the time between them passes."""
    before = bench.looks
    await until_advanced(lambda: bench.looks >= before + count, step_seconds=LOOK_SECONDS)
    await turns()


@on_clock_loop
async def test_what_is_warm_stays_while_the_system_has_memory_and_goes_in_the_order_of_use(
    make: Callable[..., Path], tmp_path: Path
) -> None:
    share_bytes = int(16 * GIB * SPARE_SHARE)
    root = machine(tmp_path / "machine", available=share_bytes)
    spare = functools.partial(spare_bytes, root)

    async with running(spare=spare, memory_limit=-1, trim_after_seconds=math.inf) as bench:
        keeping = asyncio.ensure_future(bench.staging.keep())
        names = ["oldest", "pinned", "leased", "newest"]
        visits = {name: bench.enter(make(name, 1), pin=name == "pinned") for name in names}
        for name, visit in visits.items():
            await visit.read(release=False)
            advance(1)
            if name != "leased":
                visit.leave()
        await looks(bench)

        def left() -> set[str]:
            return {Path(entry.checkpoint.sources[0]).stem for entry in bench.staging.entries.values()}

        assert left() == set(names)
        machine(root, available=share_bytes - 1)
        await until_advanced(lambda: open_slabs() == 3, step_seconds=LOOK_SECONDS)
        machine(root, available=share_bytes)
        await looks(bench)
        assert left() == {"pinned", "leased", "newest"}
        machine(root, available=0)
        await until_advanced(lambda: open_slabs() == 2, step_seconds=LOOK_SECONDS)
        await looks(bench)
        assert left() == {"pinned", "leased"}
        await visits["leased"].read()
        visits["leased"].leave()
        await until_advanced(lambda: open_slabs() == 1, step_seconds=LOOK_SECONDS)
        keeping.cancel()


@on_clock_loop
async def test_free_slabs_go_back_before_what_is_warm(make: Callable[..., Path]) -> None:
    spare = [0]
    async with running(spare=lambda: spare[0], memory_limit=-1) as bench:
        keeping = asyncio.ensure_future(bench.staging.keep())
        window = bench.enter(make("window", 4), memory_limit=2 * SLAB_BYTES)
        await window.read()
        window.leave()
        warm = bench.enter(make("warm", 1))
        await warm.read()
        warm.leave()
        assert open_slabs() == 2
        spare[0] = -1
        await until(lambda: open_slabs() == 1)
        spare[0] = 0
        assert list(bench.staging.entries.values()) == [warm.entry]
        keeping.cancel()


@on_clock_loop
async def test_a_look_that_fails_is_logged_once_and_ends_no_later_one(
    make: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    fails = [True]

    def spare() -> int:
        if fails[0]:
            raise OSError("no /proc")
        return -1

    async with running(spare=spare, memory_limit=-1, trim_after_seconds=math.inf) as bench:
        keeping = asyncio.ensure_future(bench.staging.keep())
        visit = bench.enter(make("a", 1))
        await visit.read()
        visit.leave()
        await looks(bench, 3)
        assert [record.message for record in caplog.records if "no /proc" in record.message] == [
            "how much memory is left could not be asked: no /proc"
        ]
        assert open_slabs() == 1
        fails[0] = False
        await until_advanced(lambda: open_slabs() == 0, step_seconds=LOOK_SECONDS)
        keeping.cancel()


@on_clock_loop
async def test_with_the_minimal_limit_nothing_stays_warm(make: Callable[..., Path]) -> None:
    async with running(memory_limit=0) as bench:
        visit = bench.enter(make("a", 0.5, tensor_bytes=MIB))
        await visit.read()
        assert visit.entry.full
        visit.leave()
        bench.assert_nothing_is_left()


# ---- failing ------------------------------------------------------------------------------------


@on_clock_loop
async def test_a_file_that_changes_while_it_is_read_fails_every_load_of_it(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with running() as bench:
        visits = [bench.enter(path, gated=True)]
        visits.append(bench.enter(path))
        await visits[0].entry.wait_started()
        os.utime(path, ns=(1, 1))
        visits[0].open_gates()
        for visit in visits:
            with pytest.raises(CheckpointChangedError):
                await visit.entry.wait_complete()
        anew = bench.enter(path)
        assert anew.entry is not visits[0].entry
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
            await bad.entry.wait_complete()
        await good.read()
        bad.leave()
        good.leave()
        await until(lambda: bad.entry.closed)
    assert "reading failed unexpectedly" in caplog.text


@on_clock_loop
async def test_segments_read_before_a_failure_are_still_delivered(make: Callable[..., Path]) -> None:
    path = make("a", 6)
    async with running() as bench:
        visit = bench.enter(path, memory_limit=2 * SLAB_BYTES)
        await visit.read(1)
        visit.entry.fail(SourceUnavailableError("storage went away"))
        with pytest.raises(SourceUnavailableError, match="storage went away"):
            await visit.read(begin=1)
        visit.leave()
        await until(lambda: visit.entry.closed)


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
            for slab in visit.entry.slabs:
                assert slab.owner_uid == uid
                assert tenant_of.setdefault(os.fstat(slab.fd).st_ino, uid) == uid
            visit.leave()
            bench.assert_within_the_limit()
            if choose.random() < 0.1:
                bench.staging.evict(lambda entry: entry.id % 2 == 0)

        clients = asyncio.gather(*(client() for _ in range(30)))

        def done() -> bool:
            bench.assert_within_the_limit()
            return clients.done()

        await until_advanced(done, step_seconds=0.05)  # patience and the groups' timeouts pass
        await clients
        await keeping
        assert outcomes.count("read") > 10
        assert set(outcomes) <= {"read", "left"}
