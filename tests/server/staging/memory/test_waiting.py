"""Who gets slabs, who waits, and what is evicted for whom: real slabs, real files, the real reader threads.

The buffer has 8 slabs of 2 MiB unless a test says otherwise. Time passes only when a test says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.server.errors import ShuttingDownError, StagingExhaustedError, TooManyLoadsError
from penstock.server.staging.memory.waiting import PATIENCE_SECONDS, STILL_SECONDS

from ...bench import running
from ...support import (
    SLAB_BYTES,
    advance,
    no_more_descriptors,
    on_clock_loop,
    turns,
    until,
)


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
        assert [bench.staging.place(visit.entry) for visit in waiting] == [1, 2, 3]
        holding.leave()
        holding.open_gates()
        await asyncio.gather(waiting[0].read(), waiting[1].read())
        assert [bench.staging.place(visit.entry) for visit in waiting] == [0, 0, 1]
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
        assert [bench.staging.place(visit.entry) for visit in (head, behind)] == [1, 2]
        first.open_gates()
        await first.read()
        first.leave()
        await head.read()
        await behind.read()
        assert head.entry.full
        head.leave()
        behind.leave()


@on_clock_loop
async def test_waiting_too_long_fails_with_the_numbers(make: Callable[..., Path]) -> None:
    async with running() as bench:
        holding = bench.enter(make("a", 8), gated=True)
        waiting, behind = bench.enter(make("b", 5)), bench.enter(make("c", 1))
        await holding.entry.wait_started()
        advance(bench.config.queue_timeout_seconds + 1)
        with pytest.raises(StagingExhaustedError) as caught:
            await waiting.entry.wait_started()
        assert caught.value.details == {"leased_bytes": "0", "reading_bytes": str(8 * SLAB_BYTES)}
        for text in ("600 s", "10.5 MB", "16.8 MB"):
            assert text in caught.value.message
        with pytest.raises(StagingExhaustedError):
            await behind.entry.wait_started()
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
        assert behind.entry.started
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
        assert [name for name, visit in warm.items() if not visit.entry.closed] == ["a", "c"]
        another = bench.enter(make("e", 2))
        await another.read()
        assert [name for name, visit in warm.items() if not visit.entry.closed] == ["c"]
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
        assert not warm.entry.closed
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
        assert not pinned.entry.closed
        assert bench.staging.evict(lambda entry: entry is pinned.entry) == (4 * SLAB_BYTES, 0)
        await waiting.read()
        assert waiting.entry.full
        waiting.leave()


@on_clock_loop
async def test_evicting_what_is_held_unpins_it_and_says_so(make: Callable[..., Path]) -> None:
    async with running() as bench:
        held = bench.enter(make("a", 4), pin=True)
        await held.read()
        assert bench.staging.evict(lambda entry: True) == (0, 4 * SLAB_BYTES)
        assert not held.entry.closed
        assert not held.entry.pinned
        held.leave()


@on_clock_loop
async def test_a_load_makes_do_with_a_window_when_the_memory_is_with_reads_that_hang(
    make: Callable[..., Path],
) -> None:
    """The client of these waits, and may wait for ever."""
    async with running() as bench:
        hung = bench.enter(make("a", 6), gated=True)
        await until(lambda: hung.gates[0].reads)
        waiting = bench.enter(make("b", 5))
        advance(PATIENCE_SECONDS + 0.1)
        bench.staging.reconsider()
        await turns()
        assert not waiting.entry.started  # storage may just be slow
        advance(STILL_SECONDS)
        bench.staging.reconsider()
        advance(PATIENCE_SECONDS + 0.1)
        await waiting.read()
        assert not waiting.entry.full
        waiting.leave()
        hung.open_gates()
        await hung.read()
        hung.leave()


@on_clock_loop
async def test_a_load_makes_do_with_a_window_when_leased_memory_does_not_return(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        leased = bench.enter(make("a", 6))
        await leased.read()
        waiting = bench.enter(make("b", 5))
        await turns()
        assert not waiting.entry.started
        advance(PATIENCE_SECONDS + 0.1)
        await waiting.read()
        assert not waiting.entry.full
        assert len(waiting.entry.slabs) <= 2
        waiting.leave()
        leased.leave()


@on_clock_loop
async def test_a_load_makes_do_with_a_window_also_when_the_other_was_read_for_long(
    make: Callable[..., Path],
) -> None:
    """Patience ended while that was still being read; when it is complete, somebody has to notice."""
    async with running() as bench:
        leased = bench.enter(make("a", 6), gated=True)
        await leased.entry.wait_started()
        waiting = bench.enter(make("b", 5))
        advance(PATIENCE_SECONDS + 1)
        await turns()
        assert not waiting.entry.started
        leased.open_gates()
        await leased.read()
        await turns()
        assert not waiting.entry.started
        advance(PATIENCE_SECONDS + 1)
        await waiting.read()
        assert not waiting.entry.full
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
        assert waiting.entry.full
        waiting.leave()


@on_clock_loop
async def test_a_load_fails_and_gives_all_back_when_the_system_has_no_descriptor(
    make: Callable[..., Path],
) -> None:
    path = make("a", 4)
    async with running() as bench:
        visit = bench.enter(path)
        with no_more_descriptors(), pytest.raises(TooManyLoadsError, match=r"4 slabs .*ulimit -n"):
            await visit.entry.wait_started()
        visit.leave()
        bench.assert_nothing_is_left()
        again = bench.enter(path)
        await again.read()
        again.leave()


@on_clock_loop
async def test_one_that_leaves_before_the_system_refuses_it_slabs_leaves_nothing(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 4))
        visit.leave()
        with no_more_descriptors():
            await until(lambda: visit.entry.error)
            await turns()
        bench.assert_nothing_is_left()


@pytest.mark.parametrize("gone", [False, True])
@on_clock_loop
async def test_stopping_lets_no_one_begin(make: Callable[..., Path], gone: bool) -> None:
    """Nor does it leave behind a load that had been granted its slabs and did not have them yet."""
    async with running() as bench:
        holding = bench.enter(make("a", 8))
        waiting = bench.enter(make("b", 4))
        await holding.read()
        holding.leave()  # which grants
        assert bench.queued == 0
        assert not waiting.entry.started
        if gone:
            waiting.leave()
        await bench.staging.stop()
        bench.workers.shutdown()
        if not gone:
            with pytest.raises(ShuttingDownError):
                await waiting.entry.wait_started()
            waiting.leave()
        await turns()
        assert not bench.staging.entries
        assert bench.staging.pool.available == bench.staging.pool.max_slabs


@on_clock_loop
async def test_stopping_tells_those_who_wait(make: Callable[..., Path]) -> None:
    async with running() as bench:
        holding = bench.enter(make("a", 8), gated=True)
        waiting = bench.enter(make("b", 4))
        await bench.staging.stop()
        with pytest.raises(ShuttingDownError):
            await waiting.entry.wait_started()
        assert bench.queued == 0
        waiting.leave()
        holding.leave()
        holding.open_gates()
        await until(lambda: holding.entry.idle)
        await turns()
        bench.staging.evict(lambda entry: True)
        await bench.staging.pool.stop()
