"""Segments that are copied to where they are kept: what that holds up, and for how long."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from penstock.server.checkpoint import plan
from penstock.server.checkpoint.selection import select
from penstock.server.staging.reading.keeping import Keeper, Keeping
from penstock.server.staging.ring import SegmentRing, SegmentState
from penstock.server.system.linux import PAGE_BYTES

from ...support import header_of, turns

COUNT = 6


@dataclass
class Writes:
    """Takes writes, and ends each part of them when the test says so."""

    most: int = 1
    begun: list[tuple[int, int]] = field(default_factory=list)
    copied: list[Callable[[], object]] = field(default_factory=list)
    done: list[Callable[[], object]] = field(default_factory=list)
    under_way: int = 0

    @property
    def free(self) -> bool:
        return self.under_way < self.most

    def call_when_free(self, call: Callable[[], object]) -> None:
        self.when_free = call

    def end(self) -> None:
        self.under_way -= 1
        self.done.pop(0)()


class Kept:
    """A file of which nothing is kept at first, and its hold."""

    def __init__(self, writes: Writes) -> None:
        self.writes = writes
        self.kept_until = 0
        self.state = "held"
        self.rests = 0

    def take_disk_bytes(self, start: int, end: int) -> int:
        return 0

    keeps_more = True
    kept_version = "one"

    def has(self, start: int, end: int) -> bool:
        return end <= self.kept_until

    def keep(self) -> Kept:
        return self

    def keep_bytes(self, offset: int, views: Sequence[memoryview]) -> None:
        """Not here."""

    def missing(self, start: int, end: int) -> tuple[int, int] | None:
        start = max(start, self.kept_until)
        return (start, end) if start < end else None

    def write(
        self,
        start: int,
        end: int,
        views: Sequence[memoryview],
        copied: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        self.kept_until = end
        self.writes.under_way += 1
        self.writes.begun.append((start, end))
        self.writes.copied.append(copied)
        self.writes.done.append(done)

    def pin(self, pinned: bool) -> None:
        self.state = "pinned" if pinned else "held"

    def rest(self) -> None:
        self.state = "resting"
        self.rests += 1

    def release(self) -> None:
        self.state = "released"


class Slabs:
    """Stands for the filling of a ring that is one slab."""

    def __init__(self, ring: SegmentRing) -> None:
        self.ring = ring

    def range_of(self, index: int) -> tuple[int, int]:
        return self.ring.segments[index].start, self.ring.segments[index].end

    def views(self, index: int, begin: int, finish: int) -> list[memoryview]:
        return []

    def slabs_of(self, index: int, begin: int, finish: int) -> list[str]:
        return ["slab"]


class Bench:
    """A ring of `pages` for six segments, which take two each, with a load and one file that keeps them."""

    def __init__(self, pages: int) -> None:
        table = header_of([PAGE_BYTES] * COUNT).tensors
        segments = plan.segments([table], select([table], None), target_bytes=1, target_tensors=1)
        self.ring = SegmentRing(segments, pages * PAGE_BYTES)
        self.ring.join("load")
        self.writes = Writes()
        self.file = Kept(self.writes)
        self.may_copy = True
        self.freed = 0
        self.keeper = Keeper(self.writes)
        filling: Any = Slabs(self.ring)
        files: Any = [self.file]
        keeping = self.keeper.keep(
            self.ring, filling, files, may_copy=lambda: self.may_copy, on_copied=self._on_copied
        )
        assert isinstance(keeping, Keeping)
        self.keeping = keeping

    def _on_copied(self) -> None:
        self.freed += 1

    def read(self) -> list[int]:
        """All segments that have room."""
        begun = self.ring.begin_reads()
        for index in begun:
            self.ring.read(index)
            self.keeping.read(index)
            self.keeper.pump()
        return begun


async def test_a_segment_is_held_until_it_is_copied_and_not_until_it_is_written() -> None:
    bench = Bench(pages=4)
    bench.read()
    assert len(bench.writes.begun) == 1
    bench.ring.release("load", 2)
    assert bench.ring.state(0) is SegmentState.READY
    assert len(bench.keeping.slabs_in_use) == 1
    bench.writes.copied.pop()()
    await turns()
    assert bench.freed == 1
    assert bench.ring.state(0) is bench.ring.state(1) is SegmentState.FREE
    assert bench.keeping.slabs_in_use == []
    assert bench.read(), "the window goes on while the disk hangs"


async def test_what_is_gone_when_its_turn_comes_is_left_out() -> None:
    bench = Bench(pages=8)
    bench.read()
    bench.writes.copied.pop()()
    await turns()
    bench.ring.release("load", 2)
    bench.writes.end()
    await turns()
    first, second = bench.writes.begun
    assert first[0] == bench.ring.segments[0].start
    assert second[0] == bench.ring.segments[2].start, "segment 1 is free already"


async def test_nothing_is_copied_before_it_may_be_and_then_all_of_it() -> None:
    bench = Bench(pages=64)
    bench.may_copy = False
    bench.read()
    assert bench.ring.complete
    assert not bench.writes.begun
    bench.may_copy = True
    bench.keeper.pump()
    while bench.writes.done:
        bench.writes.copied.pop(0)()
        bench.writes.end()
        await turns()
    assert sum(end - start for start, end in bench.writes.begun) == COUNT * PAGE_BYTES
    bench.keeper.pump()
    assert (bench.file.state, bench.file.rests) == ("resting", 1)
    bench.keeping.close()
    assert bench.file.state == "released"


async def test_no_more_writes_begin_than_there_are_writers_for() -> None:
    bench = Bench(pages=64)
    bench.read()
    assert len(bench.writes.begun) == 1
    bench.writes.copied.pop()()
    await turns()
    assert len(bench.writes.begun) == 1, "the disk has not taken the first"
    bench.writes.end()
    await turns()
    assert len(bench.writes.begun) == 2


async def test_a_write_of_somebody_else_that_ends_makes_room_for_one() -> None:
    bench = Bench(pages=64)
    bench.writes.under_way = 1  # a header
    bench.read()
    assert not bench.writes.begun
    bench.writes.under_way = 0
    bench.writes.when_free()
    await turns()
    assert len(bench.writes.begun) == 1


def test_a_write_that_ends_after_the_loop_is_no_error() -> None:
    async def begin() -> Bench:
        bench = Bench(pages=64)
        bench.read()
        return bench

    bench = asyncio.run(begin())
    bench.writes.copied.pop()()
    bench.writes.end()
