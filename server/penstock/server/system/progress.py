"""Signals of a read to the watcher of its thread: bytes still arrive, or it begins to wait for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable


class Heartbeat:
    """When bytes last arrived for the read on one thread, by the monotonic clock."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.monotonic()


_local = threading.local()


def watch(heartbeat: Heartbeat, on_wait: Callable[[Heartbeat], None]) -> None:
    """From now on `beat` and `about_to_wait` on this thread are for `heartbeat`."""
    _local.heartbeat = heartbeat
    _local.on_wait = on_wait


def beat() -> None:
    """Bytes have arrived. Cheap. Does nothing on threads that nobody watches."""
    heartbeat: Heartbeat | None = getattr(_local, "heartbeat", None)
    if heartbeat is not None:
        heartbeat.at = time.monotonic()


def about_to_wait() -> None:
    """The rest of the read on this thread mostly waits for storage: another one may use the processor.
    Does nothing on threads that nobody watches."""
    heartbeat: Heartbeat | None = getattr(_local, "heartbeat", None)
    if heartbeat is not None:
        _local.on_wait(heartbeat)
