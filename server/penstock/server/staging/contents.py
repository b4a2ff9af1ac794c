"""What an entry of the staging buffer holds, and which parts of it a load gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint.files import Checkpoint
from ..checkpoint.headers.table import TensorTable
from ..checkpoint.plan import Segment
from ..checkpoint.selection import Selection, skip
from ..checkpoint.slices import SegmentSlice, WholeSegments, cut


class Contents:
    """A selection of a checkpoint. The checkpoint's files are open until `checkpoint.close()`."""

    def __init__(self, checkpoint: Checkpoint, selection: Selection) -> None:
        self.checkpoint = checkpoint
        self.selection = selection
        self.version = checkpoint.version
        self._digest = selection.digest()
        self._numbers = {file.version: number for number, file in enumerate(checkpoint.files)}
        self._segments: Sequence[Segment] | None = None

    def lay_out(self, segments: Sequence[Segment]) -> None:
        """Sets the segments in which the checkpoint is read. Each load brings its own headers, so the entry
        drops its own: an entry that stays warm for days would take memory for headers from others."""
        self._segments = segments
        self.checkpoint = self.checkpoint.without_headers()

    def _is_same(self, checkpoint: Checkpoint, selection: Selection) -> bool:
        return self.version == checkpoint.version and self._digest == selection.digest()

    def skipped_by(self, checkpoint: Checkpoint, selection: Selection) -> int | None:
        """How many tensors of the entry's selection a load does not need, counted from the first. None if the
        rest is not the load's selection."""
        skipped = self.selection.tensor_count - selection.tensor_count
        if self.version != checkpoint.version or skipped < 0:
            return None
        digest = skip(self.selection, skipped).digest() if skipped else self._digest
        return skipped if digest == selection.digest() else None

    def serves(self, checkpoint: Checkpoint, selection: Selection) -> bool:
        """Whether the entry has every byte that a load of that selection needs. Quick: a load asks this of
        every entry, on the event loop."""
        if self._is_same(checkpoint, selection):
            return True
        return all(
            not len(indices)
            or (
                file.version in self._numbers
                and selection.within(number, self.selection, self._numbers[file.version])
            )
            for number, (file, indices) in enumerate(zip(checkpoint.files, selection.files, strict=True))
        )

    def slices(self, checkpoint: Checkpoint, selection: Selection) -> Sequence[SegmentSlice]:
        """The parts of segments that a load of that selection gets, in order. Only if `serves` is true."""
        slices = self._find(checkpoint, selection)
        assert slices is not None
        return slices

    def tables(self, checkpoint: Checkpoint) -> list[TensorTable | None]:
        """The tensor table of each file, as the load's checkpoint has it, by the file's number in the
        segments. None for a file that the load's checkpoint does not have."""
        known = {file.version: table for file, table in zip(checkpoint.files, checkpoint.tables, strict=True)}
        return [known.get(file.version) for file in self.checkpoint.files]

    def _find(self, checkpoint: Checkpoint, selection: Selection) -> Sequence[SegmentSlice] | None:
        assert self._segments is not None
        if self._is_same(checkpoint, selection):
            return WholeSegments(self._segments)
        return cut(
            self._segments,
            [file.version for file in self.checkpoint.files],
            selection,
            [file.version for file in checkpoint.files],
        )
