"""From the tensors that are selected to the bytes that are read and delivered, and how they are cut. Pure.

    headers --selection.py--> selection --segments--> segments --blocks--> blocks

A segment is consecutive tensors of one file: the unit that becomes ready, is delivered, and is released. A
block is the part that one reader thread reads at once.

A segment has `SEGMENT_BYTES`: smaller ones cost messages, and larger ones make the client wait for its first
tensor. It has at most a quarter of a window, so that three segments can be read while one is consumed. It has
at least one tensor, because a tensor is delivered whole. It has at most `SEGMENT_TENSORS` tensors, and no
more than `SEGMENT_DESCRIPTION_BYTES` can describe, so the message that announces it stays small whatever the
file says.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ..system.linux import PAGE_BYTES
from .headers.table import TensorTable
from .selection import Indices, Selection

SEGMENT_BYTES = 64 << 20
SEGMENT_TENSORS = 4096
SEGMENT_DESCRIPTION_BYTES = 512 << 10
"""Most bytes of the description of one segment's tensors, if it has more than one
(`TensorTable.described_bytes`)."""
SEGMENT_OBJECT_BYTES = 256
"""Memory of a segment in the daemon, its state in a ring included. Measured: 230."""
_RESERVED_SEGMENTS = 256
PART_BYTES = 8 << 20
"""Most tools upload objects in parts of a multiple of this (the AWS CLI and boto3: `multipart_chunksize`)."""
GAP_BYTES = 128 << 10
"""A gap of so many unselected bytes between two selected tensors is read along. A larger one ends the
segment."""


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes `start` to `end` of file number `file`, and the indices of the selected tensors in them."""

    file: int
    start: int
    end: int
    tensors: Indices

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class LargestTensor:
    """The tensor that needs most space in the ring."""

    file: int
    index: int
    size_bytes: int
    ring_bytes: int


def largest_tensor(tables: Sequence[TensorTable], selection: Selection) -> LargestTensor | None:
    """None when no tensor is selected."""
    best: LargestTensor | None = None
    longest_bytes = -1
    covered_bytes = -1
    """A tensor of so many bytes takes no more than that, wherever it starts."""
    for file, (table, indices) in enumerate(zip(tables, selection.files, strict=True)):
        for index, (start, end) in zip(indices, table.extents(indices), strict=True):
            if end - start <= covered_bytes:
                continue
            ring = span_bytes(start, end)  # not always the longest: an unaligned one takes a page more
            if ring > longest_bytes:
                longest_bytes = ring
                covered_bytes = ring - PAGE_BYTES + 1
                best = LargestTensor(file, index, end - start, ring)
    return best


def span_bytes(start: int, end: int) -> int:
    """Whole pages that hold the bytes `start` to `end` of a file when alignment is kept."""
    if end == start:
        return 0
    return -(-end // PAGE_BYTES) * PAGE_BYTES - start // PAGE_BYTES * PAGE_BYTES


def segments(
    tables: Sequence[TensorTable],
    selection: Selection,
    *,
    target_bytes: int,
    target_tensors: int,
    reserve: Callable[[int], None] = lambda size_bytes: None,
) -> list[Segment]:
    """The segments in order of delivery: by file, then by offset. `reserve` is called with the bytes that the
    list will take, before it takes them, and may raise: each large tensor of a sparse file is a segment."""
    result: list[Segment] = []
    for file, (table, indices) in enumerate(zip(tables, selection.files, strict=True)):
        cut = _dense if isinstance(indices, range) else _sparse
        for segment in cut(file, table, indices, target_bytes, target_tensors):
            if len(result) % _RESERVED_SEGMENTS == 0:
                reserve((len(result) + _RESERVED_SEGMENTS) * SEGMENT_OBJECT_BYTES)
            result.append(segment)
    return result


def _dense(
    file: int, table: TensorTable, indices: Indices, target_bytes: int, target_tensors: int
) -> Iterator[Segment]:
    """Consecutive tensors are contiguous in the file (the format says so), so bisection finds where to
    cut."""
    assert isinstance(indices, range)
    first = indices.start
    while first < indices.stop:
        start = table.start(first)
        last = bisect_right(range(len(table)), start + target_bytes, first, indices.stop, key=table.end)
        last = min(max(last, first + 1), first + target_tensors)
        described = table.described_bytes(first) + SEGMENT_DESCRIPTION_BYTES
        # The counts from first + 1 to last. The last one is too large if it does not fit.
        fitting = bisect_right(range(last + 1), described, first + 1, last + 1, key=table.described_bytes) - 1
        last = max(fitting, first + 1)
        yield Segment(file, start, table.end(last - 1), range(first, last))
        first = last


def _sparse(
    file: int, table: TensorTable, indices: Indices, target_bytes: int, target_tensors: int
) -> Iterator[Segment]:
    first = 0
    while first < len(indices):
        start, end = table.start(indices[first]), table.end(indices[first])
        last = first + 1
        described = _described_bytes(table, indices[first])
        while (
            last < len(indices)
            and (described := described + _described_bytes(table, indices[last])) <= SEGMENT_DESCRIPTION_BYTES
            and last - first < target_tensors
            and table.start(indices[last]) - end <= GAP_BYTES
            and table.end(indices[last]) - start <= target_bytes
        ):
            end = table.end(indices[last])
            last += 1
        yield Segment(file, start, end, indices[first:last])
        first = last


def _described_bytes(table: TensorTable, index: int) -> int:
    return table.described_bytes(index + 1) - table.described_bytes(index)


def ring_pages(segments: Sequence[Segment]) -> list[int]:
    """Where the pages of each segment start on the endless ring.

    Each has pages of its own, so that a client's write to one segment cannot shadow another. On its pages it
    starts at its file offset modulo a page, so that direct I/O needs no copy.
    """
    pages = []
    free = 0
    for segment in segments:
        pages.append(free)
        free += span_bytes(segment.start, segment.end)
    return pages


def ring_bytes(segments: Sequence[Segment]) -> int:
    """Capacity of a ring that holds all segments."""
    return sum(span_bytes(segment.start, segment.end) for segment in segments)


def segments_within(
    tables: Sequence[TensorTable],
    selection: Selection,
    capacity_bytes: int,
    reserve: Callable[[int], None] = lambda size_bytes: None,
) -> list[Segment]:
    """Segments of the size for a full ring, if that fits; else of the size for a window of that capacity.
    `reserve` is as in `segments`."""
    made = segments(
        tables,
        selection,
        target_bytes=SEGMENT_BYTES,
        target_tensors=SEGMENT_TENSORS,
        reserve=reserve,
    )
    if ring_bytes(made) <= capacity_bytes:
        return made
    made.clear()
    smaller = min(SEGMENT_BYTES, capacity_bytes // 4)
    return segments(tables, selection, target_bytes=smaller, target_tensors=SEGMENT_TENSORS, reserve=reserve)


def blocks(segment: Segment, block_bytes: int) -> Iterator[tuple[int, int]]:
    """File ranges to be read, cut at multiples of `block_bytes` of the file."""
    start = segment.start
    while start < segment.end:
        end = min(segment.end, (start // block_bytes + 1) * block_bytes)
        yield start, end
        start = end


def even_blocks(segment: Segment, block_bytes: int) -> Iterator[tuple[int, int]]:
    """As few ranges of about `block_bytes` as possible, of about the same length. For storage where a request
    for a remainder takes as long as one for a whole block.

    They are cut at multiples of 8 MiB of the file, or of half a block if that is less: stores keep an object
    in parts of such lengths, and a range that begins in the middle of one makes them read more. Ranges at any
    offset were 8 % slower from SeaweedFS (benchmarks/stores.py)."""
    count = -(-segment.size_bytes // block_bytes)
    unit = max(1, min(PART_BYTES, block_bytes // 2))
    cuts = (segment.start + segment.size_bytes * number // count for number in range(1, count))
    aligned = [(cut + unit // 2) // unit * unit for cut in cuts]
    return pairwise([segment.start, *aligned, segment.end] if count else [])
