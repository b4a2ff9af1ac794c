"""Users who wait for memory are served in turn: real slabs, real files, the real reader threads.

The buffer has 8 slabs of 2 MiB. Time passes only when a test says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.server.staging.memory.turns import Turns
from penstock.server.staging.memory.waiting import PATIENCE_SECONDS, STILL_SECONDS, TURN_SECONDS

from ...bench import Visit, running
from ...support import MIB, advance, on_clock_loop, turns, until, until_advanced

GREEDY = (70001, 70002, 70003)
MODEST = 70009
ALL_A_USER_MAY = 7
ONE_TENSOR = 16 * MIB
"""Larger than any checkpoint here: it has one tensor then, and can do with no window."""

# ---- whose turn it is ---------------------------------------------------------------------------


def test_each_of_three_users_gets_every_third_turn() -> None:
    order = Turns()
    served = []
    for _ in range(9):
        uid = min(GREEDY, key=order.next_of)
        order.take(uid)
        served.append(uid)
    assert served == [*GREEDY] * 3


def test_a_user_who_comes_back_neither_has_an_advantage_nor_owes_anything() -> None:
    order = Turns()
    for _ in range(5):
        order.take(GREEDY[0])
    assert order.next_of(MODEST) < order.next_of(GREEDY[0])
    order.take(MODEST)
    assert order.next_of(MODEST) == order.next_of(GREEDY[0])  # also if it went away in between
    for _ in range(3):
        order.take(GREEDY[0])
    assert order.next_of(MODEST) == order.next_of(GREEDY[1])


def test_turns_of_users_who_are_gone_are_forgotten() -> None:
    order = Turns()
    for uid in range(1000):
        order.take(uid)
    order.take(0)
    order.take(0)
    assert len(order._taken) < 3


# ---- the queue ----------------------------------------------------------------------------------


async def serve(waiting: list[Visit], count: int) -> list[Visit]:
    """Reads what has been granted slabs and lets it go, until so many were served; in which order."""
    served: list[Visit] = []
    while len(served) < count:
        await until(lambda: any(visit.entry.started for visit in waiting))
        visit = next(visit for visit in waiting if visit.entry.started)
        waiting.remove(visit)
        await visit.read()
        visit.leave()
        served.append(visit)
    return served


def leave_all(visits: list[Visit]) -> None:
    for visit in visits:
        visit.leave()


@pytest.mark.parametrize("users", [2, 3])
@on_clock_loop
async def test_a_load_waits_for_one_load_of_each_other_user_however_many_they_queue(
    make: Callable[..., Path], users: int
) -> None:
    async with running() as bench:
        holding = bench.enter(make("holding", 8))
        waiting = {uid: [] for uid in (*GREEDY[:users], MODEST)}  # type: dict[int, list[Visit]]
        for number in range(4):
            for uid in GREEDY[:users]:
                path = make(f"{uid}-{number}", ALL_A_USER_MAY, tensor_bytes=ONE_TENSOR)
                waiting[uid].append(bench.enter(path, uid=uid))
        everybody = [visit for uid in GREEDY[:users] for visit in waiting[uid]]
        await holding.read()
        holding.leave()
        await serve(everybody, users)
        modest = bench.enter(make("modest", ALL_A_USER_MAY, tensor_bytes=ONE_TENSOR), uid=MODEST)
        everybody.append(modest)
        served = await serve(everybody, users + 2)  # one had been granted its slabs already
        assert modest in served
        again = bench.enter(make("again", ALL_A_USER_MAY, tensor_bytes=ONE_TENSOR), uid=MODEST)
        everybody.append(again)
        assert again in await serve(everybody, users + 2)
        leave_all(everybody)


@on_clock_loop
async def test_a_user_s_own_loads_are_served_in_the_order_in_which_they_came(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        holding = bench.enter(make("holding", 8))
        sizes = {GREEDY[0]: (7, 1, 7), GREEDY[1]: (1, 6, 1)}
        lines = {
            uid: [
                bench.enter(make(f"{uid}-{n}", size, tensor_bytes=ONE_TENSOR), uid=uid)
                for n, size in enumerate(sizes[uid])
            ]
            for uid in sizes
        }
        await holding.read()
        holding.leave()
        served = await serve([visit for line in lines.values() for visit in line], 6)
        for line in lines.values():
            assert [visit for visit in served if visit in line] == line


@on_clock_loop
async def test_places_tell_the_order_in_which_users_take_turns(make: Callable[..., Path]) -> None:
    async with running() as bench:
        holding = bench.enter(make("holding", 8))
        first = [
            bench.enter(make(f"first{n}", ALL_A_USER_MAY, tensor_bytes=ONE_TENSOR), uid=GREEDY[0])
            for n in range(3)
        ]
        assert [bench.staging.place(visit.entry) for visit in first] == [1, 2, 3]
        changed = asyncio.ensure_future(first[2].entry.wait_change())
        second = [
            bench.enter(make(f"second{n}", ALL_A_USER_MAY, tensor_bytes=ONE_TENSOR), uid=GREEDY[1])
            for n in range(2)
        ]
        assert [bench.staging.place(visit.entry) for visit in first] == [1, 3, 5]
        assert [bench.staging.place(visit.entry) for visit in second] == [2, 4]
        advance(1)
        await changed  # those who wait are woken to look
        places = sorted([*first, *second], key=lambda visit: bench.staging.place(visit.entry))
        await holding.read()
        holding.leave()
        assert await serve([*first, *second], 5) == places


@on_clock_loop
async def test_small_loads_of_other_users_do_not_starve_a_large_one(make: Callable[..., Path]) -> None:
    """They come without end, and each fits beside the others while the large one waits."""
    async with running() as bench:
        number = 0
        small: list[Visit] = []

        def refill() -> None:
            nonlocal number
            while len(small) < 12:
                number += 1
                small.append(bench.enter(make(f"s{number}", 1), uid=GREEDY[number % 3]))

        refill()
        await until(lambda: sum(visit.entry.started for visit in small) >= 7)
        large = bench.enter(make("large", ALL_A_USER_MAY, tensor_bytes=ONE_TENSOR), uid=MODEST)
        granted_before = [visit for visit in small if visit.entry.started]
        overtook: list[Visit] = []
        while not large.entry.started:
            refill()
            await until(lambda: large.entry.started or any(visit.entry.started for visit in small))
            for visit in [visit for visit in small if visit.entry.started]:
                small.remove(visit)
                overtook += [visit] if visit not in granted_before else []
                await visit.read()
                visit.leave()
            assert len(overtook) <= 2 * len(GREEDY), "starved"
        await large.read()
        assert large.entry.full
        large.leave()
        leave_all(small)


async def run_slowly(visit: Visit, seconds: float) -> None:
    """Passes the time of a load that runs: its client asks for more before it counts as standing still."""
    while seconds > 0:
        visit.entry.release(visit, 0)
        step = min(seconds, STILL_SECONDS / 2)
        advance(step)
        await turns()
        seconds -= step


@on_clock_loop
async def test_one_who_waits_for_slow_loads_gives_its_turn_away_and_waits_longer_next_time(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        slow = bench.enter(make("slow", 6), uid=GREEDY[0], gated=True)
        await slow.entry.wait_started()
        large = bench.enter(make("large", 5, tensor_bytes=ONE_TENSOR), uid=GREEDY[1])
        small = [bench.enter(make(f"small{n}", 1), uid=MODEST) for n in range(3)]
        await run_slowly(slow, TURN_SECONDS - 1)
        assert not small[0].entry.started  # though it would fit
        await run_slowly(slow, 2)
        await small[0].read()
        small[0].leave()
        await run_slowly(slow, 2 * TURN_SECONDS - 1)
        assert not small[1].entry.started
        await run_slowly(slow, 2)
        await small[1].read()
        small[1].leave()
        slow.leave()
        slow.open_gates()
        await large.read()  # small[2] waits
        assert large.entry.full
        large.leave()
        await small[2].read()
        small[2].leave()


@on_clock_loop
async def test_one_who_finds_all_memory_leased_lets_other_users_pass(make: Callable[..., Path]) -> None:
    """Leases may last for ever. Its own user's later loads wait behind it."""
    async with running() as bench:
        leased = bench.enter(make("leased", 6), uid=GREEDY[0])
        await leased.read()
        large = bench.enter(make("large", 4, tensor_bytes=ONE_TENSOR), uid=GREEDY[1])
        behind = bench.enter(make("behind", 1), uid=GREEDY[1])
        modest = bench.enter(make("modest", 1), uid=MODEST)
        await turns()
        assert not modest.entry.started
        advance(PATIENCE_SECONDS + 0.1)
        await modest.read()
        assert not large.entry.started
        assert not behind.entry.started
        modest.leave()
        leased.leave()
        await large.read()
        await behind.read()
        large.leave()
        behind.leave()


@on_clock_loop
async def test_a_load_that_stands_still_is_waited_for_no_longer_than_a_lease(
    make: Callable[..., Path],
) -> None:
    """Nothing that happens tells that it does."""
    async with running() as bench:
        still = bench.enter(make("still", 20), uid=GREEDY[0])  # a window of 7 slabs
        await still.read(2)
        await until(lambda: not still.entry.reading)
        root = bench.enter(make("root", 7))
        await turns()
        assert not root.entry.started
        advance(STILL_SECONDS)
        await until_advanced(lambda: root.entry.started, step_seconds=PATIENCE_SECONDS)
        assert not root.entry.full
        await root.read()
        leave_all([still, root])


@on_clock_loop
async def test_one_whose_user_holds_too_much_keeps_back_its_own_until_only_leases_are_left(
    make: Callable[..., Path],
) -> None:
    """Else a user's small loads would starve a large one of the same user."""
    async with running() as bench:
        holds = bench.enter(make("holds", 5), uid=GREEDY[0], gated=True)
        await holds.entry.wait_started()
        large = bench.enter(make("large", 5, tensor_bytes=ONE_TENSOR), uid=GREEDY[0])
        small = bench.enter(make("small", 1), uid=GREEDY[0])
        other = bench.enter(make("other", 1), uid=MODEST)
        await other.read()  # waiting aside keeps nobody else
        other.leave()
        await turns()
        assert not small.entry.started
        holds.open_gates()
        await holds.read()  # and is a lease from now on
        await small.read()
        assert not large.entry.started
        small.leave()
        holds.leave()
        await large.read()
        large.leave()


@on_clock_loop
async def test_a_user_gets_nothing_of_what_root_prefetches_that_its_share_does_not_allow(
    make: Callable[..., Path],
) -> None:
    """Neither while it is read, nor when it is warm; another user does."""
    path = make("prefetched", 1)
    async with running() as bench:
        holds = bench.enter(make("holds", ALL_A_USER_MAY, tensor_bytes=ONE_TENSOR), uid=GREEDY[0])
        await holds.read()
        prefetch = bench.enter(path, prefetch=True, gated=True)
        await prefetch.entry.wait_started()
        greedy = bench.enter(path, uid=GREEDY[0])
        assert greedy.entry is not prefetch.entry
        modest = bench.enter(path, uid=MODEST)
        assert modest.entry is prefetch.entry
        prefetch.open_gates()
        await modest.read()
        leave_all([greedy, prefetch, modest, holds])
