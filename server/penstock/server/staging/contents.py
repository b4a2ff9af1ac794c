"""What an entry of the staging buffer holds, and what of it a load gets. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ..checkpoint import plan
from ..checkpoint.catalog import Checkpoint
from ..checkpoint.plan import Segment, Selection
from ..checkpoint.slices import SegmentSlice, WholeSegments, cut
from ..checkpoint.table import TensorTable


class Contents:
    """A selection of a checkpoint, whose files are open until `checkpoint.close()`."""

    def __init__(self, checkpoint: Checkpoint, selection: Selection) -> None:
        self.checkpoint = checkpoint
        self.selection = selection
        self.version = checkpoint.version
        self._digest = selection.digest()
        self._segments: Sequence[Segment] | None = None

    def lay_out(self, segments: Sequence[Segment]) -> None:
        """In these segments it is read. Loads bring headers of their own, so it needs none from now on: those
        of an entry that is warm for days would take room from others."""
        self._segments = segments
        self.checkpoint = self.checkpoint.without_headers()

    def skipped_by(self, checkpoint: Checkpoint, selection: Selection) -> int | None:
        """How many tensors have to be left out at the beginning of its own selection to get that one. None if
        that does not make it."""
        skipped = self.selection.tensor_count - selection.tensor_count
        if self.version != checkpoint.version or skipped < 0:
            return None
        digest = plan.skip(self.selection, skipped).digest() if skipped else self._digest
        return skipped if digest == selection.digest() else None

    def serves(self, checkpoint: Checkpoint, selection: Selection) -> bool:
        """It has every byte that a load of that selection needs. Only when the segments are laid out."""
        return self._find(checkpoint, selection) is not None

    def slices(self, checkpoint: Checkpoint, selection: Selection) -> Sequence[SegmentSlice]:
        """What a load of that selection gets, in order. Only when it `serves` it."""
        slices = self._find(checkpoint, selection)
        assert slices is not None
        return slices

    def tables(self, checkpoint: Checkpoint) -> list[TensorTable | None]:
        """Of each file, by the number that segments have it by, as a load's checkpoint says; None where that
        has no such file."""
        known = {file.version: table for file, table in zip(checkpoint.files, checkpoint.tables, strict=True)}
        return [known.get(file.version) for file in self.checkpoint.files]

    def _find(self, checkpoint: Checkpoint, selection: Selection) -> Sequence[SegmentSlice] | None:
        assert self._segments is not None
        if self.skipped_by(checkpoint, selection) == 0:
            return WholeSegments(self._segments)
        return cut(
            self._segments,
            [file.version for file in self.checkpoint.files],
            selection,
            [file.version for file in checkpoint.files],
        )
