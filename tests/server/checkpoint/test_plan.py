"""Planning, compared with naive models over generated headers."""

from __future__ import annotations

import itertools
import json
from array import array
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.server.checkpoint import plan
from penstock.server.checkpoint.headers.decode import parse_header
from penstock.server.checkpoint.selection import Selection
from penstock.server.checkpoint.slices import SegmentSlice, WholeSegments
from penstock.server.edge.events import _segment_ready
from penstock.server.errors import TooManyLoadsError
from penstock.server.loads.load import SegmentReady
from penstock.server.system.linux import PAGE_BYTES

from ..support import header_of
from .generated import EXAMPLES, Picked, chosen, counts, selections, targets


@given(selections(), targets, counts)
@EXAMPLES
def test_segments_hold_exactly_the_selected_tensors_in_order(picked: Picked, target: int, count: int) -> None:
    tables, selection = picked
    segments = plan.segments(tables, selection, target_bytes=target, target_tensors=count)
    assert [(s.file, index) for s in segments for index in s.tensors] == chosen(selection)
    for segment in segments:
        table = tables[segment.file]
        assert segment.start == table.start(segment.tensors[0])
        assert segment.end == max(table.end(index) for index in segment.tensors)
        assert 1 <= len(segment.tensors) <= count
        for one, other in pairwise(segment.tensors):
            assert 0 <= table.start(other) - table.end(one) <= plan.GAP_BYTES
        assert segment.size_bytes <= target or len({table.end(i) for i in segment.tensors}) == 1


@given(selections(), targets, counts)
@EXAMPLES
def test_segments_are_no_smaller_than_the_target_allows(picked: Picked, target: int, count: int) -> None:
    tables, selection = picked
    segments = plan.segments(tables, selection, target_bytes=target, target_tensors=count)
    for one, other in pairwise(segments):
        if one.file != other.file or len(one.tensors) == count:
            continue
        table = tables[one.file]
        fits = table.end(other.tensors[0]) - one.start <= target
        near = table.start(other.tensors[0]) - one.end <= plan.GAP_BYTES
        assert not (fits and near)


@given(selections(), targets)
@EXAMPLES
def test_ring_pages_are_disjoint_and_as_many_as_ring_bytes_says(picked: Picked, target: int) -> None:
    tables, selection = picked
    segments = plan.segments(tables, selection, target_bytes=target, target_tensors=4096)
    used: set[int] = set()
    for segment, page in zip(segments, plan.ring_pages(segments), strict=True):
        assert page % PAGE_BYTES == 0
        first = page + segment.start % PAGE_BYTES
        mine = set(range(first // PAGE_BYTES, -(-(first + segment.size_bytes) // PAGE_BYTES)))
        if not segment.size_bytes:
            mine = set()
        assert not mine & used
        used |= mine
    assert used == set(range(len(used)))
    assert plan.ring_bytes(segments) == len(used) * PAGE_BYTES


@given(selections(), targets, st.sampled_from([4096, 8192, 64 << 10, 1 << 20]))
@EXAMPLES
def test_blocks_tile_their_segment_and_share_no_page(picked: Picked, target: int, block_bytes: int) -> None:
    tables, selection = picked
    for segment in plan.segments(tables, selection, target_bytes=target, target_tensors=4096):
        blocks = list(plan.blocks(segment, block_bytes))
        if not segment.size_bytes:
            assert not blocks
            continue
        assert blocks[0][0] == segment.start
        assert blocks[-1][1] == segment.end
        for (_, end), (start, _) in pairwise(blocks):
            assert end == start
            assert start % block_bytes == 0
        assert all(0 < end - start <= block_bytes for start, end in blocks)


@given(selections(), targets, st.sampled_from([1, 100, 4096, 64 << 10]))
@EXAMPLES
def test_even_blocks_tile_their_segment_and_are_about_as_long_as_each_other(
    picked: Picked, target: int, block_bytes: int
) -> None:
    tables, selection = picked
    unit = max(1, block_bytes // 2)
    for segment in plan.segments(tables, selection, target_bytes=target, target_tensors=4096):
        if segment.size_bytes > 1000 * block_bytes:
            continue
        blocks = list(plan.even_blocks(segment, block_bytes))
        sizes = {end - start for start, end in blocks}
        assert len(blocks) == -(-segment.size_bytes // block_bytes)
        assert sum(end - start for start, end in blocks) == segment.size_bytes
        if blocks:
            assert (blocks[0][0], blocks[-1][1]) == (segment.start, segment.end)
            assert all(before[1] == after[0] for before, after in pairwise(blocks))
            assert all(start % unit == 0 for start, _ in blocks[1:])
            assert min(sizes) > 0
            assert max(sizes) <= block_bytes + unit


def test_large_blocks_are_cut_where_parts_of_objects_begin() -> None:
    mib = 1 << 20
    segment = plan.Segment(0, 100, 100 * mib, range(1))
    cuts = [start for start, _ in plan.even_blocks(segment, 32 * mib)]
    assert cuts == [100, 24 * mib, 48 * mib, 72 * mib]


@given(selections())
@EXAMPLES
def test_a_table_gives_many_tensors_as_it_gives_each(picked: Picked) -> None:
    for table, indices in zip(picked[0], picked[1].files, strict=True):
        assert list(table.extents(indices)) == [(table.start(i), table.end(i)) for i in indices]
        entries = [(name, dtype, tuple(shape), *ends) for name, dtype, shape, *ends in table.entries(indices)]
        assert entries == [
            (table.name(i), table.dtype(i), table.shape(i), table.start(i), table.end(i)) for i in indices
        ]


@given(selections())
@EXAMPLES
def test_the_largest_tensor_is_the_one_that_takes_most_pages(picked: Picked) -> None:
    tables, selection = picked
    largest = plan.largest_tensor(tables, selection)

    def pages(file: int, index: int) -> int:
        start, end = tables[file].start(index), tables[file].end(index)
        return len(range(start // PAGE_BYTES, -(-end // PAGE_BYTES))) if end > start else 0

    if largest is None:
        assert not chosen(selection)
        return
    assert (largest.file, largest.index) in chosen(selection)
    assert largest.ring_bytes == PAGE_BYTES * max(pages(*tensor) for tensor in chosen(selection))
    assert largest.ring_bytes == PAGE_BYTES * pages(largest.file, largest.index)
    table = tables[largest.file]
    assert largest.size_bytes == table.end(largest.index) - table.start(largest.index)


@given(selections(), st.sampled_from([PAGE_BYTES, 1 << 20]))
@EXAMPLES
def test_every_segment_of_a_window_fits_where_the_largest_tensor_does(picked: Picked, room: int) -> None:
    """What `SegmentRing` assumes, and `StagingBuffer.demand` grants."""
    tables, selection = picked
    largest = plan.largest_tensor(tables, selection)
    if largest is None:
        return
    capacity = max(largest.ring_bytes, 16 * PAGE_BYTES) // room * room + room
    for segment in plan.segments(tables, selection, target_bytes=capacity // 4, target_tensors=4096):
        assert plan.span_bytes(segment.start, segment.end) <= capacity


@given(
    st.lists(st.tuples(st.integers(1, 12_000), st.integers(0, 60)), min_size=1, max_size=120), st.booleans()
)
@settings(EXAMPLES, max_examples=40)
@example([(12_000, 0)] * 120, False)
@example([(12_000, 0)] * 120, True)
@example([(1, 60)] * 2000, False)
def test_a_segment_s_tensors_are_described_in_a_bounded_message(
    shapes: list[tuple[int, int]], sparse: bool
) -> None:
    """Whatever their names and ranks are; and cut no more than that takes."""
    entries = {
        f"{number:04d}".ljust(length, "n"): {
            "dtype": "U8",
            "shape": [1] * dims,
            "data_offsets": [number, number + 1],
        }
        for number, (length, dims) in enumerate(shapes)
    }
    raw = json.dumps(entries).encode()
    table = parse_header(raw, file_bytes=8 + len(raw) + len(entries)).tensors
    indices = array("I", range(0, len(table), 2)) if sparse else range(len(table))
    made = plan.segments([table], Selection((indices,)), target_bytes=1 << 20, target_tensors=4096)
    assert [index for segment in made for index in segment.tensors] == list(indices)
    for segment, after in itertools.zip_longest(made, made[1:]):
        event = SegmentReady(0, 0, segment.start, segment.end, table, segment.tensors)
        size_bytes = len(_segment_ready(event))
        described = sum(plan._described_bytes(table, index) for index in segment.tensors)
        assert size_bytes <= described + 100
        assert described <= plan.SEGMENT_DESCRIPTION_BYTES
        if after is not None:
            more = described + plan._described_bytes(table, after.tensors[0])
            assert more > plan.SEGMENT_DESCRIPTION_BYTES


def test_the_memory_of_segments_is_asked_for_before_it_is_taken() -> None:
    """A tensor larger than the target is a segment by itself; a sparse file may have any number of them."""
    table = header_of([4 << 20] * 2000).tensors
    asked: list[int] = []
    made = plan.segments_within(
        [table], Selection((range(2000),)), 8 << 20, lambda size_bytes: asked.append(size_bytes)
    )
    assert len(made) == 2000
    assert asked[-1] >= 2000 * plan.SEGMENT_OBJECT_BYTES

    def refuse(size_bytes: int) -> None:
        if size_bytes > 1000 * plan.SEGMENT_OBJECT_BYTES:
            raise TooManyLoadsError("no room")

    with pytest.raises(TooManyLoadsError):
        plan.segments_within([table], Selection((range(2000),)), 8 << 20, refuse)


def test_all_of_a_stage_is_the_pieces_of_its_segments() -> None:
    table = header_of([1 << 20] * 20).tensors
    made = plan.segments([table], Selection((range(20),)), target_bytes=4 << 20, target_tensors=4096)
    slices = WholeSegments(made)
    assert list(slices) == [SegmentSlice(number, segment.tensors) for number, segment in enumerate(made)]
    assert (len(slices), slices[-1], list(slices[1:3])) == (
        5,
        SegmentSlice(4, range(16, 20)),
        list(slices)[1:3],
    )
    with pytest.raises(IndexError):
        slices[5]
