"""A flag that is set once."""

from __future__ import annotations

import threading


class Latch:
    """As threading.Event, without a way back. An exception of a signal handler cannot leave it locked: Event
    takes its lock in Python code, which such an exception may break off."""

    __slots__ = ("_is_set", "_unset")

    def __init__(self) -> None:
        self._is_set = False
        self._unset = threading.Lock()
        """Held by nobody in particular until it is set."""
        self._unset.acquire()

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        """May be called again."""
        self._is_set = True
        try:
            self._unset.release()
        except RuntimeError:  # it was set before
            return

    def wait(self, timeout_seconds: float = -1) -> bool:
        """Whether it is set. Waits for that, if the timeout is not negative for at most so long."""
        if not self._is_set and self._unset.acquire(timeout=timeout_seconds):
            self.set()  # for whoever else waits
        return self._is_set
