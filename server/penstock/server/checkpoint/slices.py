"""Which parts of an entry's segments a load gets whose selection is another than the entry's. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from .plan import Indices, Segment, Selection


@dataclass(frozen=True, slots=True)
class SegmentSlice:
    """What one load gets of one segment: the segment's index, and the tensors wanted of it."""

    segment: int
    tensors: Indices


class WholeSegments(Sequence[SegmentSlice]):
    """All tensors of all segments, each slice made when it is asked for: every load of an entry has a list of
    them."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = segments

    def __len__(self) -> int:
        return len(self._segments)

    @overload
    def __getitem__(self, index: int) -> SegmentSlice: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[SegmentSlice]: ...

    def __getitem__(self, index: int | slice) -> SegmentSlice | Sequence[SegmentSlice]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return SegmentSlice(number, self._segments[number].tensors)


def cut(
    segments: Sequence[Segment],
    staged_versions: Sequence[str],
    selection: Selection,
    wanted_versions: Sequence[str],
) -> list[SegmentSlice] | None:
    """The slices of `segments` that make up the selection, in its order; None if a tensor is in none.

    Files are the same if their versions are: `staged_versions` are those of the segments' file numbers,
    `wanted_versions` those of the selection's files.
    """
    number_of = {version: number for number, version in enumerate(staged_versions)}
    named = [pair for pair in zip(wanted_versions, selection.files, strict=True) if len(pair[1])]
    if any(version not in number_of for version, _ in named):
        return None
    slices: list[SegmentSlice] = []
    for version, wanted in named:
        number = number_of[version]
        first = bisect_left(segments, number, key=_file)
        found = _cut_file(segments, range(first, bisect_right(segments, number, first, key=_file)), wanted)
        if found is None:
            return None
        slices += found
    return slices


def _file(segment: Segment) -> int:
    """Segments are in the order of their files."""
    return segment.file


def _cut_file(
    segments: Sequence[Segment], indices: Sequence[int], wanted: Indices
) -> list[SegmentSlice] | None:
    """The same for one file, of which `indices` are the segments in order."""
    slices = []
    position = 0
    for index in indices:
        tensors = segments[index].tensors
        end = bisect_right(wanted, tensors[-1], position)
        if end > position:
            part = wanted[position:end]
            if part[0] < tensors[0] or not (isinstance(tensors, range) or set(part) <= set(tensors)):
                return None
            slices.append(SegmentSlice(index, part))
            position = end
    return slices if position == len(wanted) else None
