"""How a read tells whoever watches its thread that bytes still come."""

from __future__ import annotations

import threading
import time


class Heartbeat:
    """When bytes of the read on one thread last came, by the monotonic clock."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.monotonic()


_local = threading.local()


def watch(heartbeat: Heartbeat) -> None:
    """From now on `beat` on this thread is for `heartbeat`."""
    _local.heartbeat = heartbeat


def beat() -> None:
    """Bytes came. Cheap; does nothing on threads that nobody watches."""
    heartbeat: Heartbeat | None = getattr(_local, "heartbeat", None)
    if heartbeat is not None:
        heartbeat.at = time.monotonic()
