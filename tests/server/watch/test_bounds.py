"""What the daemon remembers and tells of loads is bounded, however many there are and whatever they name."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.server.staging.members import Holder
from penstock.server.staging.retention import MAX_NAMES
from penstock.server.system.shown import SHOWN_BYTES, SHOWN_SOURCES, shown_sources, utf8_bytes
from penstock.server.watch.status import SHOWN_HOLDERS, SHOWN_HOLDERS_OF_A_STAGE, _stage

from ..bench import running
from ..support import on_clock_loop


@pytest.mark.parametrize(
    "sources",
    [
        ["/a"] * 2000,
        ["/" + "é" * 500] * 100,
        ["/" + "x" * 8000, "/b"],
        ["/" + "\udcff" * 2000],
        ["/" + "日" * 4000],
    ],
)
def test_sources_that_are_shown_are_few_and_short(sources: list[str]) -> None:
    kept = shown_sources(sources)
    assert 1 <= len(kept) <= SHOWN_SOURCES
    assert sum(map(utf8_bytes, kept)) <= SHOWN_BYTES
    for source, original in zip(kept, sources, strict=False):
        assert source == original or source.endswith("more characters]")


@on_clock_loop
async def test_holders_that_status_tells_are_bounded(make: Callable[..., Path]) -> None:
    """Each session may hold as many entries as it has loads."""
    async with running() as bench:
        visits = [bench.enter(make(name, 1)) for name in "abcd"]
        now = asyncio.get_running_loop().time()
        keys = [(visit, number) for visit in visits for number in range(400)]
        for visit, number in keys:
            visit.entry.hold((visit, number), Holder(70001, number, "n" * 200, now, "g" * 200))
        told = [_stage(visit.entry, [], now, None, SHOWN_HOLDERS_OF_A_STAGE) for visit in visits]
        assert [len(stage.holders) for stage in told] == [SHOWN_HOLDERS_OF_A_STAGE] * 4
        assert len(visits) * SHOWN_HOLDERS_OF_A_STAGE < SHOWN_HOLDERS
        for visit, number in keys:
            visit.entry.leave((visit, number))
        for visit in visits:
            visit.leave()


@on_clock_loop
async def test_names_of_a_pinned_checkpoint_are_bounded_and_the_newest_is_among_them(
    make: Callable[..., Path],
) -> None:
    async with running() as bench:
        visit = bench.enter(make("a", 1))
        for number in range(100):
            visit.entry.pin((f"/name/{number}",))
        assert len(visit.entry.names) == MAX_NAMES
        assert visit.entry.names[0] == visit.entry.checkpoint.sources
        assert visit.entry.names[-1] == ("/name/99",)
        visit.entry.unpin()
        visit.leave()
