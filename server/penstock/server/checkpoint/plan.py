"""From headers to the bytes that are read and delivered, and how they are cut. Pure.

    headers --select--> selection --segments--> segments --blocks--> blocks

A segment is consecutive tensors of one file: the unit that becomes ready, is delivered, and is released. A
block is the part that one reader thread reads at once.

A segment has `SEGMENT_BYTES`: smaller ones cost messages, and larger ones make the client wait for its first
tensor. It has at most a quarter of a window, so that three segments can be read while one is consumed. It has
at least one tensor, because a tensor is delivered whole. It has at most `SEGMENT_TENSORS` tensors, and no
more than `SEGMENT_DESCRIPTION_BYTES` can describe, so the message that announces it stays small whatever the
file says.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from ..errors import TensorNotFoundError
from ..system.linux import PAGE_BYTES
from .table import TensorTable

SEGMENT_BYTES = 64 << 20
SEGMENT_TENSORS = 4096
SEGMENT_DESCRIPTION_BYTES = 512 << 10
"""Most bytes of the description of one segment's tensors, if it has more than one
(`TensorTable.described_bytes`)."""
SEGMENT_OBJECT_BYTES = 256
"""Memory of a segment in the daemon, its state in a ring included. Measured: 230."""
_RESERVED_SEGMENTS = 256
GAP_BYTES = 128 << 10
"""A gap of so many unselected bytes between two selected tensors is read along. A larger one ends the
segment."""

Indices = range | array  # type: ignore[type-arg]
"""Ascending indices into a TensorTable; a range where they are consecutive."""


@dataclass(frozen=True)
class Selection:
    """Which tensors of each file a load wants, in order of delivery."""

    files: tuple[Indices, ...]

    @property
    def tensor_count(self) -> int:
        return sum(len(indices) for indices in self.files)

    def digest(self) -> str:
        """Equal for equal selections of the same files."""
        return self._digest

    @cached_property
    def masks(self) -> tuple[int, ...]:
        """For each file its tensors as the bits of a number; 0 for a range, which needs none. Takes a while
        the first time."""
        return tuple(0 if isinstance(indices, range) else _mask(indices) for indices in self.files)

    def within(self, file: int, other: Selection, other_file: int) -> bool:
        """Whether all tensors of a file are among the other selection's of the same file. Takes microseconds,
        once both have their masks."""
        wanted, there = self.files[file], other.files[other_file]
        if not len(wanted):
            return True
        if not len(there) or wanted[0] < there[0] or wanted[-1] > there[-1]:
            return False
        if isinstance(there, range):
            return True
        mask = self.masks[file] or ((1 << len(wanted)) - 1) << wanted[0]
        return mask & ~other.masks[other_file] == 0

    @cached_property
    def _digest(self) -> str:
        state = hashlib.sha256()
        for indices in self.files:
            if isinstance(indices, range):
                state.update(f"{indices.start}-{indices.stop};".encode())
            else:
                state.update(indices.tobytes() + b";")
        return state.hexdigest()


def _mask(indices: Sequence[int]) -> int:
    last = indices[-1]
    digits = bytearray(b"0") * (last + 1)
    for index in indices:
        digits[last - index] = ord("1")
    return int(digits, 2)


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


def select(
    tables: Sequence[TensorTable],
    names: Iterable[str] | None,
    delivered: Sequence[Indices] | None = None,
) -> Selection:
    """Selects all tensors, or those with the given names in whatever file, if they are `delivered` at all.
    Raises TensorNotFoundError."""
    if delivered is None:
        ranges = {len(table): range(len(table)) for table in tables}  # one for a file that is named often
        delivered = [ranges[len(table)] for table in tables]
    if names is None:
        return Selection(tuple(delivered))
    found = dict.fromkeys(names, False)
    files: list[Indices] = []
    for table, counts in zip(tables, delivered, strict=True):
        indices = array("I")
        for index in counts:
            name = table.name(index)
            if name in found:
                indices.append(index)
                found[name] = True
        files.append(compact(indices))
    missing = [name for name, was_found in found.items() if not was_found]
    if missing:
        some = sorted(missing)[:3]
        more = f" and {len(missing) - len(some)} more" if len(missing) > len(some) else ""
        raise TensorNotFoundError(
            f"the checkpoint has no tensor named {', '.join(repr(name[:200]) for name in some)}{more}; "
            "compare with the names that a load without a selection yields",
            tensor=some[0],
        )
    return Selection(tuple(files))


def select_matching(
    tables: Sequence[TensorTable], patterns: Sequence[str], delivered: Sequence[Indices] | None = None
) -> Selection:
    """The tensors whose names match one of the patterns of a shell, of those that are `delivered` at all.
    Raises TensorNotFoundError if there is none."""
    matches = [re.compile(fnmatch.translate(pattern)).match for pattern in patterns]
    files = []
    for table, counts in zip(tables, select(tables, None, delivered).files, strict=True):
        matching = (index for index in counts if any(match(table.name(index)) for match in matches))
        files.append(compact(array("I", matching)))
    selection = Selection(tuple(files))
    if not selection.tensor_count:
        shown = ", ".join(repr(pattern[:200]) for pattern in patterns[:3])
        raise TensorNotFoundError(
            f"the checkpoint has no tensor whose name matches {shown}; compare with the names that a load "
            "without a selection yields",
            tensor=patterns[0],
        )
    return selection


def listed_bytes(files: Iterable[Indices]) -> int:
    """Memory of the indices; a range has none to speak of."""
    return sum(indices.itemsize * len(indices) for indices in files if isinstance(indices, array))


def skip(selection: Selection, count: int) -> Selection:
    """The selection without its first `count` tensors."""
    files: list[Indices] = []
    for indices in selection.files:
        files.append(indices[min(count, len(indices)) :])
        count = max(0, count - len(indices))
    return Selection(tuple(files))


def compact(indices: array[int]) -> Indices:
    """The same indices as a range, if they are consecutive."""
    if len(indices) == 0:
        return range(0)
    if indices[-1] - indices[0] + 1 == len(indices):
        return range(indices[0], indices[-1] + 1)
    return indices


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
    """As few equal ranges of at most `block_bytes` as possible. For storage where all offsets are alike, and
    a request for a remainder takes as long as one for a whole block."""
    count = -(-segment.size_bytes // block_bytes)
    cuts = [segment.start + segment.size_bytes * number // count for number in range(count)]
    return pairwise([*cuts, segment.end])


def selected_bytes(tables: Sequence[TensorTable], selection: Selection) -> int:
    """Sum of the sizes of the selected tensors."""
    total = 0
    for table, indices in zip(tables, selection.files, strict=True):
        if isinstance(indices, range):
            total += table.end(indices[-1]) - table.start(indices[0]) if len(indices) else 0
        else:
            total += sum(table.end(index) - table.start(index) for index in indices)
    return total
