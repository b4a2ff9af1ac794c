"""The ring against a naive model of a ring: a set of pages for every segment that lies in it."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from penstock.server.checkpoint import plan
from penstock.server.checkpoint.selection import select
from penstock.server.staging.ring import SegmentRing, SegmentState
from penstock.server.system.linux import PAGE_BYTES

from ..support import header_of


def segments_of(sizes: list[int], *, pad_bytes: int = 0, one_each: bool = True) -> list[plan.Segment]:
    table = header_of(sizes, pad_bytes=pad_bytes).tensors
    everything = select([table], None)
    return plan.segments([table], everything, target_bytes=1, target_tensors=1 if one_each else 4096)


def pages_of(ring: SegmentRing, index: int) -> set[int]:
    """Ring pages that a segment's reads write to."""
    segment = ring.segments[index]
    if not segment.size_bytes:
        return set()
    first = ring.ring_offset(index) // PAGE_BYTES
    count = plan.span_bytes(segment.start, segment.end) // PAGE_BYTES
    return {(first + number) % (ring.capacity_bytes // PAGE_BYTES) for number in range(count)}


class StageMachine(RuleBasedStateMachine):
    """Knows only: who joined, what each released, which reads were begun and ended, what lies where."""

    @initialize(
        sizes=st.lists(st.integers(0, 5 * PAGE_BYTES), max_size=14),
        pad=st.integers(0, PAGE_BYTES),
        spare_pages=st.integers(0, 12),
        hold_back=st.booleans(),
    )
    def make(self, sizes: list[int], pad: int, spare_pages: int, hold_back: bool) -> None:
        self.segments = segments_of(sizes, pad_bytes=pad)
        spans = [plan.span_bytes(segment.start, segment.end) for segment in self.segments]
        self.ring = SegmentRing(self.segments, max([*spans, PAGE_BYTES]) + spare_pages * PAGE_BYTES)
        self.ring.hold_back = hold_back
        self.released: dict[int, int] = {}
        self.reading: set[int] = set()
        self.ready: set[int] = set()
        self.ever_ready: set[int] = set()
        self.overwritten: set[int] = set()
        self.joined = 0

    @rule()
    def join(self) -> None:
        if self.overwritten or self.ring.recycled:
            with pytest.raises(ValueError, match="recycled"):
                self.ring.join(self.joined)
        else:
            self.ring.join(self.joined)
            self.released[self.joined] = 0
            self.joined += 1

    @rule()
    def begin_reads(self) -> None:
        for index in self.ring.begin_reads():
            assert index not in self.reading | self.ever_ready
            written = pages_of(self.ring, index)
            for other in self.reading | (self.ready - self.overwritten):
                if pages_of(self.ring, other) & written:
                    assert other in self.ready, "two reads into the same page"
                    assert not self.ring.full
                    assert not self.ring.hold_back
                    for count in self.released.values():
                        assert count > other, "a segment that somebody still needs is overwritten"
                    self.overwritten.add(other)
            self.reading.add(index)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def finish_reading(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.reading)))
        self.ring.read(index)
        self.reading.remove(index)
        self.ready.add(index)
        self.ever_ready.add(index)

    @precondition(lambda self: self.reading)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        index = data.draw(st.sampled_from(sorted(self.reading)))
        self.ring.cancel(index)
        self.reading.remove(index)
        assert self.ring.state(index) is SegmentState.PLANNED

    @precondition(lambda self: self.released)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        consumer = data.draw(st.sampled_from(sorted(self.released)))
        read = next((i for i in range(len(self.segments)) if i not in self.ever_ready), len(self.segments))
        count = data.draw(st.integers(0, read))
        self.ring.release(consumer, count)
        self.released[consumer] = max(self.released[consumer], count)

    @precondition(lambda self: self.released)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        consumer = data.draw(st.sampled_from(sorted(self.released)))
        self.ring.leave(consumer)
        del self.released[consumer]

    @rule()
    def stop_holding_back(self) -> None:
        self.ring.hold_back = False
        self.ring.recycle()

    @invariant()
    def every_consumer_can_still_read_what_it_has_not_released(self) -> None:
        if not hasattr(self, "ring"):
            return
        for consumer, count in self.released.items():
            for index in self.ever_ready:
                if index >= count:
                    assert self.ring.state(index) is SegmentState.READY, (consumer, index)

    @invariant()
    def counts_agree(self) -> None:
        if not hasattr(self, "ring"):
            return
        assert self.ring.consumers == len(self.released)
        assert self.ring.complete == (len(self.ever_ready) == len(self.segments))
        assert self.ring.ready_bytes == sum(self.segments[index].size_bytes for index in self.ever_ready)
        for index in self.reading:
            assert self.ring.state(index) is SegmentState.READING

    def teardown(self) -> None:
        """Consumers that go on come to the end, whatever happened before."""
        if not hasattr(self, "ring") or not self.released:
            return
        self.stop_holding_back()
        while not self.ring.complete:
            ready = next(i for i in range(len(self.segments)) if i not in self.ever_ready)
            for consumer in self.released:
                self.ring.release(consumer, ready)
                self.released[consumer] = max(self.released[consumer], ready)
            self.begin_reads()
            assert self.reading, "nothing is being read and nothing can be: a deadlock"
            index = min(self.reading)
            self.ring.read(index)
            self.reading.remove(index)
            self.ready.add(index)
            self.ever_ready.add(index)


TestStage = StageMachine.TestCase
TestStage.settings = settings(
    derandomize=True, database=None, deadline=None, max_examples=150, stateful_step_count=40
)

PAGES = [PAGE_BYTES] * 4


def aligned(sizes: list[int]) -> list[plan.Segment]:
    """Segments that begin on a page, so that each takes just its size."""
    raw_bytes = header_of(sizes).data_start
    return segments_of(sizes, pad_bytes=-raw_bytes % PAGE_BYTES)


def read_all_begun(ring: SegmentRing) -> list[int]:
    begun = ring.begin_reads()
    for index in begun:
        ring.read(index)
    return begun


def test_a_full_stage_never_recycles() -> None:
    ring = SegmentRing(aligned(PAGES), 4 * PAGE_BYTES)
    ring.join("a")
    assert ring.full
    assert read_all_begun(ring) == [0, 1, 2, 3]
    ring.release("a", 4)
    assert not ring.recycled
    ring.join("b")
    assert [ring.state(index) for index in range(4)] == [SegmentState.READY] * 4


def test_a_window_reads_on_as_the_slowest_consumer_releases() -> None:
    ring = SegmentRing(aligned(PAGES), 2 * PAGE_BYTES)
    ring.join("fast")
    ring.join("slow")
    assert read_all_begun(ring) == [0, 1]
    ring.release("fast", 2)
    assert ring.begin_reads() == []
    ring.release("slow", 1)
    assert read_all_begun(ring) == [2]
    ring.leave("slow")
    assert read_all_begun(ring) == [3]
    assert ring.complete


def test_a_window_that_is_held_back_recycles_only_when_let_go() -> None:
    ring = SegmentRing(aligned(PAGES), 2 * PAGE_BYTES)
    ring.hold_back = True
    ring.join("early")
    read_all_begun(ring)
    ring.release("early", 2)
    assert ring.begin_reads() == []
    assert not ring.recycled
    ring.join("awaited")
    ring.hold_back = False
    ring.recycle()
    assert ring.begin_reads() == []
    ring.release("awaited", 2)
    assert ring.begin_reads() == [2, 3]


def test_nothing_is_recycled_while_nobody_consumes() -> None:
    ring = SegmentRing(aligned(PAGES), 2 * PAGE_BYTES)
    ring.join("a")
    read_all_begun(ring)
    ring.leave("a")
    assert not ring.recycled
    ring.join("b")
    assert ring.state(0) is SegmentState.READY


def test_a_cancelled_segment_is_read_again_before_later_ones() -> None:
    ring = SegmentRing(aligned(PAGES), 4 * PAGE_BYTES)
    ring.join("a")
    assert ring.begin_reads() == [0, 1, 2, 3]
    ring.read(0)
    ring.cancel(3)
    ring.cancel(1)
    assert ring.begin_reads() == [1, 3]


def test_releasing_backwards_past_the_end_or_by_a_stranger_means_nothing() -> None:
    ring = SegmentRing(aligned(PAGES), 2 * PAGE_BYTES)
    ring.join("a")
    read_all_begun(ring)
    ring.release("a", 2)
    ring.release("a", 1)
    ring.release("stranger", 99)
    assert ring.begin_reads() == [2, 3]
    ring.release("a", 99)
    assert ring.state(2) is SegmentState.READING


def test_a_segment_cannot_become_ready_twice() -> None:
    ring = SegmentRing(aligned(PAGES), 4 * PAGE_BYTES)
    ring.join("a")
    read_all_begun(ring)
    with pytest.raises(AssertionError, match="READY cannot become READY"):
        ring.read(0)


def test_a_checkpoint_without_segments_is_complete_from_the_start() -> None:
    ring = SegmentRing([], PAGE_BYTES)
    assert ring.full
    assert ring.complete
    assert ring.begin_reads() == []
