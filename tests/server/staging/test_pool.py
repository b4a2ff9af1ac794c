"""The pool with real slabs. How many exist is what the kernel says after every call on a worker thread."""

from __future__ import annotations

import asyncio
import os
import random

import pytest

from penstock.server.staging.pool import SlabPool
from penstock.server.staging.slab import Slab

from ..support import (
    SLAB_BYTES,
    WatchedExecutor,
    advance,
    identities,
    more_fds,
    no_more_descriptors,
    on_clock_loop,
    open_fds,
    open_slabs,
    turns,
    until,
)


class Bench:
    def __init__(self, max_slabs: int) -> None:
        self.workers = WatchedExecutor(3)
        self.seen_available: list[int] = []
        self.pool = SlabPool(
            slab_bytes=SLAB_BYTES, max_slabs=max_slabs, workers=self.workers, on_free=self._on_free
        )

    def _on_free(self) -> None:
        self.seen_available.append(self.pool.available)

    async def close(self) -> None:
        await self.pool.stop()
        self.workers.shutdown()
        assert open_slabs() == 0


def mark(slabs: list[Slab], owner_uid: int) -> list[Slab]:
    for slab in slabs:
        slab.owner_uid = owner_uid
    return slabs


@on_clock_loop
async def test_slabs_are_made_when_first_taken_and_then_reused() -> None:
    bench = Bench(4)
    first = await bench.pool.take(2, 1)
    assert open_slabs() == bench.pool.existing_slabs == 2
    known = identities(first)
    bench.pool.release(first)
    assert bench.pool.free_slabs == 2
    again = await bench.pool.take(2, 1)
    assert identities(again) == known
    bench.pool.release(again)
    await bench.close()


@on_clock_loop
async def test_a_slab_once_held_by_one_user_is_closed_for_another() -> None:
    bench = Bench(2)
    slabs = mark(await bench.pool.take(2, 1), 1)
    known = identities(slabs)
    bench.pool.release(slabs)
    others = await bench.pool.take(2, 2)
    assert not identities(others) & known
    assert bench.workers.most_slabs == 2
    bench.pool.release(mark(others, 2))
    await bench.close()


@on_clock_loop
async def test_a_slab_for_nobody_in_particular_was_never_held_by_anybody() -> None:
    bench = Bench(2)
    slabs = mark(await bench.pool.take(2, 1), 1)
    known = identities(slabs)
    bench.pool.release(slabs)
    fresh = await bench.pool.take(1, None)
    assert not identities(fresh) & known
    bench.pool.release(fresh)
    await bench.close()


@on_clock_loop
async def test_two_takers_that_replace_slabs_at_once_stay_within_the_cap() -> None:
    """Three of four exist: the first needs to close one, the second must not count on the same room."""
    bench = Bench(4)
    bench.pool.release(mark(await bench.pool.take(3, 1), 1))
    one, other = await asyncio.gather(bench.pool.take(2, 2), bench.pool.take(2, 3))
    assert open_slabs() == bench.pool.existing_slabs == 4
    assert bench.workers.most_slabs == bench.pool.peak_slabs == 4
    bench.pool.release(one + other)
    await bench.close()


@on_clock_loop
async def test_populating_counts_on_no_room_that_a_taker_was_promised() -> None:
    bench = Bench(4)
    bench.pool.release(mark(await bench.pool.take(3, 1), 1))
    taking = bench.pool.take(2, 2)
    await bench.pool.populate(lambda: True)
    slabs = await taking
    assert open_slabs() == 4
    assert bench.workers.most_slabs <= 4
    bench.pool.release(slabs)
    await bench.close()


@on_clock_loop
async def test_slabs_are_taken_before_the_first_await() -> None:
    bench = Bench(4)
    taking = bench.pool.take(3, 1)
    assert bench.pool.available == 1
    with pytest.raises(AssertionError, match="2 slabs asked for, 1 available"):
        await bench.pool.take(2, 1)
    bench.pool.release(await taking)
    assert bench.pool.available == 4
    await bench.close()


@on_clock_loop
async def test_a_failure_to_make_slabs_gives_all_back() -> None:
    bench = Bench(4)
    bench.pool.release(mark(await bench.pool.take(1, 1), 1))
    before = open_fds()
    taking = bench.pool.take(3, 1)
    with no_more_descriptors(), pytest.raises(OSError):
        await taking
    assert bench.pool.available == bench.seen_available[-1] == 4
    assert bench.pool.existing_slabs == bench.pool.free_slabs == 1
    assert not more_fds(before)
    bench.pool.release(await bench.pool.take(4, 1))
    await bench.close()


@on_clock_loop
async def test_trimming_closes_only_what_was_free_for_long() -> None:
    bench = Bench(4)
    old, new = await bench.pool.take(1, 1), await bench.pool.take(2, 1)
    kept = identities(new)
    bench.pool.release(old)
    advance(50)
    bench.pool.release(new)
    await bench.pool.trim(40)
    assert open_slabs() == bench.pool.free_slabs == 2
    left = await bench.pool.take(2, 1)
    assert identities(left) == kept
    bench.pool.release(left)
    await bench.close()


@on_clock_loop
async def test_slabs_that_are_being_trimmed_are_announced_when_they_may_be_taken_again() -> None:
    bench = Bench(4)
    bench.pool.release(await bench.pool.take(4, 1))
    trimming = asyncio.ensure_future(bench.pool.trim(0))
    await asyncio.sleep(0)
    assert bench.pool.available == 0
    await trimming
    assert bench.seen_available[-1] == 4
    await bench.close()


@on_clock_loop
async def test_populating_fills_the_buffer_with_resident_slabs() -> None:
    bench = Bench(5)
    await bench.pool.populate(lambda: True)
    assert open_slabs() == bench.pool.free_slabs == 5
    slabs = await bench.pool.take(5, 1)
    assert all(slab.populated for slab in slabs)
    assert all(os.fstat(slab.fd).st_blocks * 512 == SLAB_BYTES for slab in slabs)
    bench.pool.release(slabs)
    await bench.close()


@on_clock_loop
async def test_no_more_slabs_exist_than_the_system_has_room_for() -> None:
    bench = Bench(4)
    bench.pool.limit_headroom(2)
    populating = asyncio.ensure_future(bench.pool.populate(lambda: True))
    await until(lambda: (open_slabs(), bench.pool.available) == (2, 2))
    advance(60)
    await turns()
    assert (open_slabs(), bench.pool.available) == (2, 2)
    with pytest.raises(AssertionError):
        await bench.pool.take(3, 1)
    slabs = await bench.pool.take(2, 1)
    bench.pool.grow_headroom(1)
    assert bench.pool.available == 0
    bench.seen_available.clear()
    bench.pool.grow_headroom(9)
    assert bench.seen_available == [2]
    advance(60)
    await populating
    assert open_slabs() == 4
    bench.pool.release(slabs)
    await bench.close()


@on_clock_loop
async def test_populating_waits_while_it_may_not_go_on() -> None:
    bench = Bench(2)
    allowed = False
    populating = asyncio.ensure_future(bench.pool.populate(lambda: allowed))
    await turns()
    advance(1)
    await turns()
    assert open_slabs() == 0
    allowed = True
    advance(1)
    await populating
    assert open_slabs() == 2
    await bench.close()


@on_clock_loop
async def test_a_failure_to_populate_leaves_the_room_to_others(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(3)
    populating = asyncio.ensure_future(bench.pool.populate(lambda: True))
    with no_more_descriptors():
        await populating
    assert "populating the staging buffer stopped" in caplog.text
    assert bench.pool.available == bench.seen_available[-1] == 3
    assert bench.pool.existing_slabs == 0
    bench.pool.release(await bench.pool.take(3, 1))
    await bench.close()


@pytest.mark.parametrize("seed", range(4))
@on_clock_loop
async def test_any_mixture_of_users_stays_within_the_cap_and_keeps_tenants_apart(seed: int) -> None:
    """Takers of three users, trims and populating, all at once."""
    bench, choose = Bench(6), random.Random(seed)
    pool = bench.pool
    tenant_of: dict[int, int] = {}

    async def taker(uid: int) -> None:
        for _ in range(25):
            count = choose.randint(1, 4)
            await until(lambda count=count: pool.available >= count)  # type: ignore[misc]
            slabs = await pool.take(count, uid)
            assert len(slabs) == count
            for slab in slabs:
                assert slab.owner_uid in (None, uid)
                assert tenant_of.setdefault(os.fstat(slab.fd).st_ino, uid) == uid
            mark(slabs, uid)
            assert pool.existing_slabs <= pool.max_slabs
            for _ in range(choose.randint(0, 3)):
                await asyncio.sleep(0)
            pool.release(slabs)

    async def trimmer() -> None:
        for _ in range(30):
            await asyncio.sleep(0.001)
            advance(choose.randint(0, 10))
            await pool.trim(5)

    async def populator() -> None:
        for _ in range(10):
            await asyncio.sleep(0.001)
            await pool.populate(lambda: choose.random() < 0.8)

    await asyncio.gather(*(taker(uid) for uid in (1, 1, 2, 3)), trimmer(), populator())
    assert bench.workers.most_slabs <= pool.peak_slabs <= 6
    assert pool.available == 6
    assert pool.existing_slabs == pool.free_slabs == open_slabs()
    await bench.close()
