"""Which parts of a stage's segments a load gets whose selection is another than the stage's. Pure."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from .plan import Indices, Segment, Selection


@dataclass(frozen=True, slots=True)
class Piece:
    """What one load gets of one segment: the segment's index, and the tensors wanted of it."""

    segment: int
    tensors: Indices


def cut(
    segments: Sequence[Segment],
    staged_versions: Sequence[str],
    selection: Selection,
    wanted_versions: Sequence[str],
) -> list[Piece] | None:
    """The pieces of `segments` that make up the selection, in its order; None if a tensor is in none.

    Files are the same if their versions are: `staged_versions` are those of the segments' file numbers,
    `wanted_versions` those of the selection's files.
    """
    number_of = {version: number for number, version in enumerate(staged_versions)}
    by_file: dict[int, list[int]] = {}
    for index, segment in enumerate(segments):
        by_file.setdefault(segment.file, []).append(index)
    pieces: list[Piece] = []
    for version, wanted in zip(wanted_versions, selection.files, strict=True):
        if not len(wanted):
            continue
        number = number_of.get(version)
        found = None if number is None else _cut_file(segments, by_file.get(number, []), wanted)
        if found is None:
            return None
        pieces += found
    return pieces


def _cut_file(segments: Sequence[Segment], indices: Sequence[int], wanted: Indices) -> list[Piece] | None:
    """The same for one file, of which `indices` are the segments in order."""
    pieces = []
    position = 0
    for index in indices:
        tensors = segments[index].tensors
        end = bisect_right(wanted, tensors[-1], position)
        if end > position:
            part = wanted[position:end]
            if part[0] < tensors[0] or not (isinstance(tensors, range) or set(part) <= set(tensors)):
                return None
            pieces.append(Piece(index, part))
            position = end
    return pieces if position == len(wanted) else None
