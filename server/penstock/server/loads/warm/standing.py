"""The state of an entry of a warm set, for status, and for the log when it changes."""

from __future__ import annotations

import asyncio
import logging

from ...config.units import show_size
from ...system.log import event
from ...system.shown import encodable
from .wishes import Wish

logger = logging.getLogger(__name__)

STATES = ("waiting", "reading", "warm", "on_disk", "failed", "does_not_fit")


class Standing:
    """Of one wish. The fields are for status."""

    def __init__(self, wish: Wish) -> None:
        self.wish = wish
        self.state = "waiting"
        self.reason = ""
        """Why it is not warm, or why it may not be the newest version."""
        self.since = asyncio.get_running_loop().time()
        """When it came into its state."""
        self.needed_bytes = self.left_bytes = 0
        """What it takes, and what it can have; told where it does not fit."""
        self.checked_at: float | None = None
        """When storage was last asked which version it has."""

    @property
    def lacks_memory(self) -> bool:
        return self.state in ("does_not_fit", "on_disk")

    def numbers(self) -> str:
        """Why it lacks memory."""
        return (
            f"it needs {show_size(self.needed_bytes)}, and {show_size(self.left_bytes)} can be had beside "
            "what is in use or kept warm already; raise --memory-limit, or keep less warm"
        )

    def become(self, state: str, reason: str = "") -> None:
        reason = encodable(reason)
        if state != self.state:
            self.since = asyncio.get_running_loop().time()
        numbers_moved = state == self.state and self.lacks_memory
        if (state, reason) != (self.state, self.reason) and not numbers_moved:
            trouble = state in ("failed", "does_not_fit") or (state == "warm" and reason)
            fields = {"name": self.wish.name, "state": state, **({"why": reason} if reason else {})}
            event(logger, "warm set", fields, level=logging.WARNING if trouble else logging.INFO)
        self.state, self.reason = state, reason
