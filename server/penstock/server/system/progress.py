"""How a read tells whoever watches its thread that bytes still come."""

from __future__ import annotations

import threading
import time


class Pulse:
    """When the read on one thread last moved, by the monotonic clock."""

    __slots__ = ("at",)

    def __init__(self) -> None:
        self.at = time.monotonic()


_local = threading.local()


def watch(pulse: Pulse) -> None:
    """From now on `moved` on this thread is for `pulse`."""
    _local.pulse = pulse


def moved() -> None:
    """Bytes came. Cheap; does nothing on threads that nobody watches."""
    pulse: Pulse | None = getattr(_local, "pulse", None)
    if pulse is not None:
        pulse.at = time.monotonic()
