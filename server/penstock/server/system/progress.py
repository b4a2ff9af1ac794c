"""Heartbeats, by which a read shows the watcher of its thread that bytes still arrive."""

from __future__ import annotations

import threading
import time


class Heartbeat:
    """When bytes last arrived for the read on one thread, by the monotonic clock."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.monotonic()


_local = threading.local()


def watch(heartbeat: Heartbeat) -> None:
    """From now on `beat` on this thread updates `heartbeat`."""
    _local.heartbeat = heartbeat


def beat() -> None:
    """Bytes have arrived. Cheap. Does nothing on threads that nobody watches."""
    heartbeat: Heartbeat | None = getattr(_local, "heartbeat", None)
    if heartbeat is not None:
        heartbeat.at = time.monotonic()
