"""Reading a checkpoint into the staging buffer before anybody asks for it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

from ..sources import Access
from ..staging.entry import CacheEntry
from .admission import Admission
from .request import Caller, Emit, LoadContext, Request

PROGRESS_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Progress:
    ready_bytes: int
    total_bytes: int
    done: bool


class Prefetch(Admission):
    """Stages one checkpoint whole. `run` it once."""

    kind = "prefetch"

    def __init__(
        self, request: Request, caller: Caller, access: Access, context: LoadContext, *, pin: bool
    ) -> None:
        super().__init__(request, caller, access, context)
        self._pin = pin
        self._owner_uid = None if access.privileged else caller.uid

    @property
    def waits_for(self) -> str:
        return "storage" if self.state == "streaming" else super().waits_for

    async def run(self, emit: Emit) -> None:
        """Raises PenstockError, and CancelledError when the caller goes."""
        try:
            while True:
                _, _, entry = await self._enter(emit, owner_uid=self._owner_uid, whole=True)
                if entry.full:
                    break
                self._leave()  # else the window would wait for this to release what it holds
            self.state = "streaming"
            await self._follow(entry, emit)
        finally:
            self._leave()

    def _keep(self, entry: CacheEntry) -> None:
        """It is staged whole, and not yet left."""
        if self._pin:
            entry.pin(self.request.sources)

    async def _follow(self, entry: CacheEntry, emit: Emit) -> None:
        ring = entry.ring
        assert ring is not None
        self.total_bytes = ring.total_bytes
        self.memory_bytes = sum(ring.segments[index].size_bytes for index in self.warm_segments)
        self.delivered_bytes = self.memory_bytes
        waiting = asyncio.ensure_future(entry.wait_complete())
        try:
            while not waiting.done():
                await emit(Progress(self.delivered_bytes, ring.total_bytes, done=False))
                await asyncio.wait([waiting], timeout=PROGRESS_SECONDS)
                self._count(entry)
            await waiting
        finally:
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await waiting
        self._count(entry)
        self._keep(entry)
        self.finished = True
        await emit(Progress(ring.ready_bytes, ring.total_bytes, done=True))

    def _count(self, entry: CacheEntry) -> None:
        assert entry.ring is not None
        self.delivered_bytes = entry.ring.ready_bytes
        self.tier_bytes = entry.tier_bytes - self.tier_before
