"""How an entry of the warm set gets to the local disk of the tier, and stays there."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from dataclasses import replace

from ...checkpoint import plan
from ...sources import Access, SourceFile
from ...sources.kept import Keep, KeptFile
from ...staging.entry import CacheEntry
from ...staging.sharing import Group
from ..prefetch import Prefetch, Progress
from ..request import Caller, Emit, LoadContext, Request

LOOK_SECONDS = 0.05
PATIENCE_SECONDS = 60.0
"""A disk that has not taken a segment for so long does not get the rest."""


class Pins:
    """What is kept of an entry's files goes after everything else, until `close`."""

    def __init__(self) -> None:
        self._keeps: tuple[Keep, ...] = ()
        self._closed = False

    def hold(self, files: Iterable[SourceFile]) -> None:
        """Those of these files, instead of those before. After `close` none."""
        if self._closed:
            return
        keeps = [file.keep() for file in set(files) if isinstance(file, KeptFile)]
        before, self._keeps = self._keeps, tuple(keep for keep in keeps if keep is not None)
        for keep in self._keeps:
            keep.pin(True)
            keep.rest()
        for keep in before:
            keep.release()

    def close(self) -> None:
        self.hold(())
        self._closed = True


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
