"""The parts of an entry's segments that a load gets if its selection differs from the entry's. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from .plan import Segment
from .selection import Indices, Selection


@dataclass(frozen=True, slots=True)
class SegmentSlice:
    """The part of one segment that a load gets: the segment's index, and the tensors wanted of it."""

    segment: int
    tensors: Indices


class WholeSegments(Sequence[SegmentSlice]):
    """All tensors of all segments. Each slice is made when it is asked for, since every load of an entry has
    such a list."""

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
    """The slices of `segments` that make up the selection, in its order; None if a tensor is in no segment.

    Files with equal versions are the same. `staged_versions` are by the file numbers of the segments,
    `wanted_versions` by those of the selection.
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
    """The key by which segments are in order of their files."""
    return segment.file


def _cut_file(
    segments: Sequence[Segment], indices: Sequence[int], wanted: Indices
) -> list[SegmentSlice] | None:
    """The same for one file, whose segments are `indices`, in order."""
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
