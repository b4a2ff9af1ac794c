"""What the local disk of the tier has of an entry of the warm set, and how the rest of it gets there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from dataclasses import replace

from ...checkpoint import plan
from ...checkpoint.catalog import Checkpoint
from ...checkpoint.plan import Selection
from ...checkpoint.table import TensorTable
from ...sources import Access, SourceFile
from ...sources.kept import Keep, KeptFile
from ...staging.entry import CacheEntry
from ...staging.sharing import Group
from ..prefetch import Prefetch, Progress
from ..request import Caller, Emit, LoadContext, Request

WINDOW_BYTES = 256 << 20
"""Of a checkpoint that passes to the disk, unless its largest tensors need more."""
LOOK_SECONDS = 0.05
PATIENCE_SECONDS = 60.0
"""A disk that has not taken a segment for so long does not get the rest."""


def is_on_disk(checkpoint: Checkpoint, selection: Selection) -> bool:
    """All bytes of the selected tensors are there. Takes a while for very many tensors."""
    for file, table, indices in zip(checkpoint.files, checkpoint.tables, selection.files, strict=True):
        if isinstance(indices, range) and len(indices):
            extents = iter([(table.start(indices[0]), table.end(indices[-1]))])
        else:
            extents = table.extents(indices)
        if not all(isinstance(file, KeptFile) and file.has(start, end) for start, end in extents):
            return False
    return True


class Pins:
    """What is kept of an entry's files goes after everything else."""

    def __init__(self) -> None:
        self._keeps: tuple[Keep, ...] = ()

    def hold(self, files: Iterable[SourceFile]) -> None:
        """Those of these files, instead of those before."""
        keeps = [file.keep() for file in set(files) if isinstance(file, KeptFile)]
        before, self._keeps = self._keeps, tuple(keep for keep in keeps if keep is not None)
        for keep in self._keeps:
            keep.pin(True)
            keep.rest()
        for keep in before:
            keep.release()


def window_bytes(tables: tuple[TensorTable, ...], selection: Selection) -> int:
    """How much memory a pass to the disk takes: less than the checkpoint, if its tensors allow for that."""
    largest = plan.largest_tensor(tables, selection)
    if largest is None:
        return 0
    half_bytes = plan.selected_bytes(tables, selection) // 2
    return max(largest.ring_bytes, min(half_bytes, max(WINDOW_BYTES, 2 * largest.ring_bytes)))


class ToDisk(Prefetch):
    """Reads a checkpoint through a window that no load shares: it waits for the disk. `run` it once."""

    def __init__(
        self, request: Request, caller: Caller, access: Access, context: LoadContext, *, memory_bytes: int
    ) -> None:
        alone = Group(f"tier-{secrets.token_hex(8)}", 1)
        request = replace(request, memory_limit=memory_bytes, group=alone)
        super().__init__(request, caller, access, context, pin=False)
        self.complete = False
        """All of it is on the disk."""

    async def run(self, emit: Emit) -> None:
        """Raises as `Prefetch.run` does."""
        keeps: list[Keep] = []
        try:
            _, _, entry = await self._enter(emit, owner_uid=None)
            self.state = "streaming"
            files = [file for file in set(entry.checkpoint.files) if isinstance(file, KeptFile)]
            keeps = [keep for file in files if (keep := file.keep()) is not None]
            await self._pass(entry, emit)
        finally:
            self._leave()
            for keep in keeps:
                keep.release()

    async def _pass(self, entry: CacheEntry, emit: Emit) -> None:
        ring = entry.ring
        assert ring is not None
        self.total_bytes = ring.total_bytes
        for index, segment in enumerate(ring.segments):
            await entry.wait_ready(index, self)
            if not await self._taken(entry.checkpoint.files[segment.file], segment):
                return
            entry.release(self, index + 1)
            self.delivered_bytes += segment.size_bytes
            self.tier_bytes += entry.tier_bytes_of(index)
            await emit(Progress(self.delivered_bytes, self.total_bytes, done=False))
        self.complete = self.finished = True

    async def _taken(self, file: SourceFile, segment: plan.Segment) -> bool:
        """Waits until the segment is on the disk."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + PATIENCE_SECONDS
        while isinstance(file, KeptFile):
            if file.has(segment.start, segment.end):
                return True
            if loop.time() >= ends or not file.keeps_more:
                return False
            await asyncio.sleep(LOOK_SECONDS)
        return False
