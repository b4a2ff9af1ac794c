"""What the keepers of one warm set have in common."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol

from ..at_start import Run
from ..request import LoadContext

AT_ONCE = 4
"""Checkpoints staged at a time: the first of the file are warm first."""
SLOT_SECONDS = 60.0
"""Then the next one begins beside it: a mount that hangs holds up only its own checkpoints."""


class Turn:
    """Memory is given in the order of the file. A mount that hangs delays others for a while only."""

    def __init__(self, ahead: Turn | None) -> None:
        """`ahead` is of the entry that stands before it."""
        self._ahead = ahead
        self._decided = asyncio.Event()

    def decide(self) -> None:
        """It has taken its memory, or can have none for now."""
        self._decided.set()

    async def wait(self) -> None:
        """For the one ahead, the first time."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            deciding = asyncio.ensure_future(ahead._decided.wait())
            try:
                await asyncio.wait([deciding], timeout=SLOT_SECONDS)
            finally:
                deciding.cancel()


class Promise(Protocol):
    """A keeper that stages its checkpoint."""

    @property
    def promised_bytes(self) -> int:
        """The memory that it is about to take, as long as it has not taken it."""


@dataclass(slots=True)
class Shared:
    """On the event loop."""

    context: LoadContext
    run: Run
    interval_seconds: float
    has_tier: bool
    """There is a local disk that keeps what is read."""
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    disk: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one whose checkpoint passes to the local disk."""
    staging: set[Promise] = field(default_factory=set)
    """Those that stage their checkpoint, and may have no memory for it yet."""

    async def left_bytes(self, *, free_only: bool, pin: bool) -> int:
        """The memory that one more entry can have. With `free_only` nothing is evicted for it."""
        spare_bytes = await self.context.staging.spare_bytes(evicting=not free_only, evicting_wanted=pin)
        return spare_bytes - sum(keeper.promised_bytes for keeper in self.staging)
