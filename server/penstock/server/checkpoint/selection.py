"""Which tensors of a checkpoint a load wants: all, those of some names, or those whose names match. Pure."""

from __future__ import annotations

import fnmatch
import hashlib
import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..errors import TensorNotFoundError
from .headers.table import TensorTable

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


def selected_bytes(tables: Sequence[TensorTable], selection: Selection) -> int:
    """Sum of the sizes of the selected tensors."""
    total = 0
    for table, indices in zip(tables, selection.files, strict=True):
        if isinstance(indices, range):
            total += table.end(indices[-1]) - table.start(indices[0]) if len(indices) else 0
        else:
            total += sum(table.end(index) - table.start(index) for index in indices)
    return total
