"""Which bytes of a file are in which block. Pure."""

from __future__ import annotations

from bisect import bisect_right, insort
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


def _start(piece: Piece) -> int:
    return piece.start
