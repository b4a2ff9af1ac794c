"""What control, status and history need of whatever runs for a caller: a load, a prefetch, a fetch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ..staging.entry import CacheEntry
from .request import Caller, Emit


class Asked(Protocol):
    """What its client asked for, as far as people are told."""

    @property
    def sources(self) -> Sequence[str]: ...

    @property
    def client_name(self) -> str: ...


class Running(Protocol):
    """One call. `run` it once; the figures are for status and log."""

    id: str
    state: str
    """"resolving", "waiting" or "streaming"."""
    caller: Caller
    delivered_bytes: int
    memory_bytes: int
    tier_bytes: int
    """Of `delivered_bytes`, those that were in the staging buffer before, and those of the local disk."""
    total_bytes: int
    began: float
    """Of the event loop's clock."""
    queued_since: float
    waited_seconds: float
    finished: bool
    """It has all it came for: the caller going away now is no loss."""

    @property
    def kind(self) -> str:
        """What log and status call it."""

    @property
    def request(self) -> Asked: ...

    @property
    def entry(self) -> CacheEntry | None: ...

    @property
    def waits_for(self) -> str:
        """In words; empty when it goes on."""

    async def run(self, emit: Emit) -> None:
        """Raises PenstockError, and CancelledError when the caller goes."""

    def count(self, result: str) -> None:
        """How it ended: "ok", "failed" or "cancelled"."""

    def first_line(self) -> dict[str, object]:
        """What the log says of it when it begins."""

    def log_line(self) -> dict[str, object]:
        """What the log says of it when it ended."""
