"""Who shares a staged checkpoint, and who may not: real slabs, real files, the real reader threads.

The buffer has 8 slabs of 2 MiB unless a test says otherwise. Time passes only when a test says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from penstock.server.staging.ring import SegmentState
from penstock.server.staging.sharing import Group, superseded

from ..bench import GROUP, running
from ..support import (
    MIB,
    ROOT,
    SLAB_BYTES,
    advance,
    bytes_in,
    identities,
    on_clock_loop,
    turns,
    until,
)

WINDOW = 2 * SLAB_BYTES

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
        assert again.entry is first.entry
        assert await again.read() == bytes_in(3)
        assert bench.totals.read_bytes == again.entry.read_bytes == bytes_in(3)
        assert (bench.totals.stage_hits, bench.totals.stage_misses) == (1, 1)
        again.leave()


@on_clock_loop
async def test_a_warm_checkpoint_serves_some_of_its_tensors(make: Callable[..., Path]) -> None:
    path = make("a", 3)
    async with running() as bench:
        whole = bench.enter(path)
        await whole.read()
        part = bench.enter(path, names=["t4", "t1"])
        assert part.entry is whole.entry
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
        assert whole.entry is not part.entry
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
        assert new.entry is not old.entry
        await new.read()
        new.leave()
        assert list(bench.staging.entries.values()) == [new.entry]
        assert old.entry.closed


@on_clock_loop
async def test_the_old_version_of_a_checkpoint_goes_when_nobody_holds_it(make: Callable[..., Path]) -> None:
    """Pinned or not, and whatever else it holds: it cannot be loaded again. Others stay."""
    paths = [make("a", 1), make("b", 1, prefix="u"), make("c", 1)]
    async with running() as bench:
        held, pinned = bench.enter(paths[0], paths[1]), bench.enter(paths[1])
        other = bench.enter(paths[2])
        for load in (held, pinned, other):
            await load.read()
        pinned.entry.pin(pinned.entry.names[0])
        pinned.leave()
        other.leave()
        make("b", 1, prefix="u")
        new = bench.enter(paths[1])
        assert pinned.entry.closed
        assert not held.entry.closed
        assert not other.entry.closed
        held.leave()
        assert held.entry.closed
        await new.read()
        new.leave()


@on_clock_loop
async def test_a_load_that_began_earlier_does_not_take_a_newer_version_for_an_old_one(
    make: Callable[..., Path],
) -> None:
    path = make("a", 1)
    async with running() as bench:
        began = asyncio.get_running_loop().time()
        found = bench.catalog.resolve([str(path)], ROOT)
        advance(1)
        make("a", 1)
        new = bench.enter(path)
        entries = bench.staging.entries.values()
        assert superseded(entries, found, since=began) == []
        assert superseded(entries, found, since=new.entry.made_at) == [new.entry]
        found.close()
        await new.read()
        new.leave()


@on_clock_loop
async def test_a_load_joins_one_that_still_waits_for_memory(make: Callable[..., Path]) -> None:
    big, other = make("big", 8), make("other", 4)
    async with running() as bench:
        holding = bench.enter(big, gated=True)
        first, second = bench.enter(other), bench.enter(other)
        assert second.entry is first.entry
        assert bench.queued == 1
        assert bench.staging.place(second.entry) == 1
        holding.open_gates()
        await holding.read()
        holding.leave()
        await asyncio.gather(first.read(), second.read())
        assert second.entry.read_bytes == bytes_in(4)
        first.leave()
        second.leave()


@on_clock_loop
async def test_two_loads_of_one_window_read_the_file_once(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=WINDOW, gated=True)
        second = bench.enter(path, memory_limit=WINDOW)
        assert second.entry is first.entry
        first.open_gates()
        await asyncio.gather(first.read(), second.read())
        assert bench.totals.read_bytes == bytes_in(7)
        first.leave()
        second.leave()


@on_clock_loop
async def test_a_load_that_comes_after_a_window_recycled_gets_its_own(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=WINDOW)
        await first.read(3)
        assert first.ring.recycled
        second = bench.enter(path, memory_limit=WINDOW)
        assert second.entry is not first.entry
        await asyncio.gather(first.read(begin=3), second.read())
        first.leave()
        second.leave()


@on_clock_loop
async def test_a_window_waits_for_the_slowest_and_goes_on_when_it_dies(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        fast = bench.enter(path, memory_limit=WINDOW)
        slow = bench.enter(path, memory_limit=WINDOW)
        reading = asyncio.ensure_future(fast.read())
        await slow.read(1, release=False)
        await until(lambda: bench.readers.busy == 0 and not fast.entry.reading)
        assert not reading.done()
        assert slow.ring.state(0) is SegmentState.READY
        slow.leave()
        await reading
        fast.leave()


@on_clock_loop
async def test_a_group_shares_a_window_and_the_first_waits_for_the_last(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=WINDOW, group=GROUP)
        reading = asyncio.ensure_future(first.read())
        await first.entry.wait_started()
        await until(lambda: not first.entry.reading)
        assert not first.ring.recycled
        second = bench.enter(path, memory_limit=WINDOW, group=GROUP)
        assert second.entry is first.entry
        await asyncio.gather(reading, second.read())
        assert bench.totals.read_bytes == bytes_in(7)
        first.leave()
        second.leave()


@on_clock_loop
async def test_a_group_goes_on_without_a_member_that_does_not_come(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        first = bench.enter(path, memory_limit=WINDOW, group=GROUP)
        reading = asyncio.ensure_future(first.read())
        await first.entry.wait_started()
        await until(lambda: not first.entry.reading)
        advance(bench.config.group_timeout_seconds - 1)
        await turns()
        assert not first.ring.recycled
        advance(2)
        await reading
        late = bench.enter(path, memory_limit=WINDOW, group=GROUP)
        await late.read()
        first.leave()
        late.leave()


@on_clock_loop
async def test_a_group_member_that_dies_is_counted_out(make: Callable[..., Path]) -> None:
    path = make("a", 7)
    async with running() as bench:
        visits = [bench.enter(path, memory_limit=WINDOW, group=Group("three", 3)) for _ in range(2)]
        await visits[0].read(1)
        visits[0].leave()
        visits.append(bench.enter(path, memory_limit=WINDOW, group=Group("three", 3)))
        await asyncio.gather(visits[1].read(), visits[2].read())
        for visit in visits:
            visit.leave()


# ---- a group that goes on after a restart --------------------------------------------------------


def resumed(group: Group, *, released: int, members: int, window: str = "w") -> Group:
    """The group as a member resumes it."""
    return Group(group.name, group.size, window=window, released_tensors=released, members=members)


@on_clock_loop
async def test_members_who_resume_at_different_tensors_share_one_window_at_once(
    make: Callable[..., Path],
) -> None:
    """Whichever of them comes first; what none needs any more is not read."""
    path = make("a", 7, tensor_bytes=MIB // 2)
    for skips in ((3, 2), (2, 3)):
        async with running() as bench:
            group = resumed(GROUP, released=1, members=2)
            visits = [bench.enter(path, memory_limit=WINDOW, group=group, skip=skip) for skip in skips]
            assert visits[0].entry is visits[1].entry
            await asyncio.gather(*(visit.read() for visit in visits))
            assert bench.totals.read_bytes <= bytes_in(7) - MIB // 2
            for visit in visits:
                visit.leave()


@on_clock_loop
async def test_a_member_who_resumes_late_finds_what_it_needs(make: Callable[..., Path]) -> None:
    path = make("a", 7, tensor_bytes=MIB // 2)
    async with running() as bench:
        group = resumed(GROUP, released=2, members=2)
        first = bench.enter(path, memory_limit=WINDOW, group=group, skip=5)
        reading = asyncio.ensure_future(first.read())
        await first.entry.wait_started()
        await until(lambda: not first.entry.reading)
        await turns()
        assert not reading.done()
        assert not first.ring.recycled
        late = bench.enter(path, memory_limit=WINDOW, group=group, skip=2)
        assert late.entry is first.entry
        await asyncio.gather(reading, late.read())
        first.leave()
        late.leave()


@on_clock_loop
async def test_members_who_had_left_before_the_restart_are_not_waited_for(make: Callable[..., Path]) -> None:
    path = make("a", 7, tensor_bytes=MIB // 2)
    async with running() as bench:
        group = resumed(Group("three", 3), released=4, members=1)
        last = bench.enter(path, memory_limit=WINDOW, group=group, skip=6)
        await last.read()
        last.leave()


@on_clock_loop
async def test_members_who_shared_no_window_before_the_restart_share_none_after_it(
    make: Callable[..., Path],
) -> None:
    """One that had come too late reads for itself, and holds up none that are far ahead of it."""
    path = make("a", 7, tensor_bytes=MIB // 2)
    async with running() as bench:
        behind = bench.enter(
            path, memory_limit=WINDOW, group=resumed(GROUP, released=1, members=1, window="b"), skip=1
        )
        ahead = [
            bench.enter(path, memory_limit=WINDOW, group=resumed(GROUP, released=20, members=2), skip=skip)
            for skip in (20, 21)
        ]
        assert ahead[0].entry is ahead[1].entry is not behind.entry
        await asyncio.gather(*(visit.read() for visit in ahead))
        await behind.read()
        for visit in (*ahead, behind):
            visit.leave()


@on_clock_loop
async def test_a_member_who_had_not_come_before_the_restart_joins_those_who_had(
    make: Callable[..., Path],
) -> None:
    path = make("a", 7, tensor_bytes=MIB // 2)
    async with running() as bench:
        group = resumed(GROUP, released=0, members=2)
        for comes_first in (True, False):
            options = [(GROUP, 0), (group, 2)]
            visits = [
                bench.enter(path, memory_limit=WINDOW, group=which, skip=skip)
                for which, skip in (options if comes_first else options[::-1])
            ]
            assert visits[0].entry is visits[1].entry
            await asyncio.gather(*(visit.read() for visit in visits))
            for visit in visits:
                visit.leave()


@on_clock_loop
async def test_members_who_resume_what_fits_as_a_whole_share_it(make: Callable[..., Path]) -> None:
    path = make("a", 7, tensor_bytes=MIB // 2)
    async with running() as bench:
        group = resumed(GROUP, released=0, members=2)
        visits = [bench.enter(path, group=group, skip=skip) for skip in (9, 3)]
        assert visits[0].entry is visits[1].entry
        await asyncio.gather(*(visit.read() for visit in visits))
        assert visits[0].entry.full
        for visit in visits:
            visit.leave()


@on_clock_loop
async def test_a_group_that_is_told_its_progress_can_go_on_with_that(make: Callable[..., Path]) -> None:
    """What one buffer told is what the next one needs, also after a second restart."""
    path = make("a", 7)  # a segment for each tensor
    counts = [0, 0]
    group = GROUP
    for stop in (3, 6, 9):
        async with running() as bench:
            visits = [bench.enter(path, memory_limit=WINDOW, group=group, skip=skip) for skip in counts]
            total = [
                visit.slices_of[1].tensor_count + skip for visit, skip in zip(visits, counts, strict=True)
            ]
            assert visits[0].entry is visits[1].entry
            fast = asyncio.ensure_future(visits[0].read(stop + 1 - counts[0]))
            await visits[1].read(stop - counts[1])
            await fast
            window, released, members = visits[0].entry.group_progress(total[0])
            assert (released, members) == (stop, 2)
            counts = [stop + 1, stop]
            group = Group(GROUP.name, 2, window=window, released_tensors=released, members=members)
            for visit in visits:
                visit.leave()


# ---- owners -------------------------------------------------------------------------------------


@on_clock_loop
async def test_a_slab_that_one_user_held_never_goes_to_another(make: Callable[..., Path]) -> None:
    async with running() as bench:
        held: dict[int, set[int]] = {}
        for uid in (1, 2, 1, 2):
            visit = bench.enter(make("a", 7), uid=uid)
            await visit.read()
            held.setdefault(uid, set()).update(identities(visit.entry.slabs))
            visit.leave()
        assert not held[1] & held[2]


@on_clock_loop
async def test_users_do_not_share_a_checkpoint(make: Callable[..., Path]) -> None:
    path = make("a", 2)
    async with running() as bench:
        one, other = bench.enter(path, uid=1), bench.enter(path, uid=2)
        assert one.entry is not other.entry
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
        assert {slab.owner_uid for slab in prefetch.entry.slabs} == {None}
        first, other = bench.enter(path, uid=1), bench.enter(path, uid=2)
        assert first.entry is prefetch.entry
        assert other.entry is not prefetch.entry
        assert {slab.owner_uid for slab in first.entry.slabs} == {1}
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
        assert first.entry is prefetch.entry
        await first.read()
        assert {slab.owner_uid for slab in first.entry.slabs} == {1}
        prefetch.leave()
        first.leave()


@on_clock_loop
async def test_what_was_warm_counts_in_the_share_of_the_user_who_takes_it_up(
    make: Callable[..., Path],
) -> None:
    """Else one user could hold everything: load, leave, load something else, and come back."""
    first, second = make("a", 4), make("b", 4)
    async with running() as bench:
        came = bench.enter(first, uid=1000)
        await came.read()
        came.leave()
        holding = bench.enter(second, uid=1000)
        await holding.read(release=False)
        assert came.entry.idle
        again = bench.enter(first, uid=1000)
        assert again.entry is not came.entry
        newcomer = bench.enter(make("c", 1), uid=2000)
        await newcomer.read()
        newcomer.leave()
        holding.leave()
        await again.read()
        again.leave()
