"""Which bytes of a file are where. Pure."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from .records import Block


class Piece(NamedTuple):
    """The bytes `start` to `end` of the file, which are in `block`, as others of the block need not be."""

    start: int
    end: int
    block: Block


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of the file that are all kept, in one block, or all not."""

    end: int
    block: Block | None


class Pieces:
    """Pieces that do not overlap. A block that is added later takes the place of earlier ones."""

    def __init__(self, blocks: Iterable[Block] = ()) -> None:
        self._pieces: list[Piece] = []
        for block in blocks:
            self.add(block)

    @property
    def kept_bytes(self) -> int:
        return sum(piece.end - piece.start for piece in self._pieces)

    def add(self, block: Block) -> None:
        self.remove(block.start, block.end)
        insort(self._pieces, Piece(block.start, block.end, block), key=_start)

    def remove(self, start: int, end: int) -> None:
        """Nothing of that range is kept any more."""
        first = self._first_after(start)
        last = first
        left: list[Piece] = []
        while last < len(self._pieces) and self._pieces[last].start < end:
            piece = self._pieces[last]
            if piece.start < start:
                left.append(Piece(piece.start, start, piece.block))
            if piece.end > end:
                left.append(Piece(end, piece.end, piece.block))
            last += 1
        self._pieces[first:last] = left

    def at(self, position: int, end: int) -> Span:
        """Whether the bytes from `position` on are kept, and how far that goes, up to `end`."""
        index = self._first_after(position)
        if index == len(self._pieces) or self._pieces[index].start >= end:
            return Span(end, None)
        piece = self._pieces[index]
        if piece.start > position:
            return Span(piece.start, None)
        return Span(min(piece.end, end), piece.block)

    def _first_after(self, position: int) -> int:
        """The index of the first piece that ends behind `position`."""
        index = bisect_right(self._pieces, position, key=_start)
        return index - 1 if index and self._pieces[index - 1].end > position else index


class Ranges:
    """Ranges of bytes that neither overlap nor touch."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        first = bisect_left(self._ranges, start, key=_second)
        last = bisect_right(self._ranges, end, key=_first)
        if first < last:
            start = min(start, self._ranges[first][0])
            end = max(end, self._ranges[last - 1][1])
        self._ranges[first:last] = [(start, end)]

    def remove(self, start: int, end: int) -> int:
        """How many bytes of that range there were."""
        first = bisect_right(self._ranges, start, key=_second)
        last = bisect_left(self._ranges, end, key=_first)
        touched = self._ranges[first:last]
        left = [(begin, start) for begin, _ in touched if begin < start]
        left += [(end, finish) for _, finish in touched if finish > end]
        self._ranges[first:last] = left
        return sum(min(finish, end) - max(begin, start) for begin, finish in touched)

    def __len__(self) -> int:
        return len(self._ranges)


def _start(piece: Piece) -> int:
    return piece.start


def _first(pair: tuple[int, int]) -> int:
    return pair[0]


def _second(pair: tuple[int, int]) -> int:
    return pair[1]
