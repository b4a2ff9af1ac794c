"""Bytes that reader threads are to read, as a whole: the blocks of one segment, and whom to tell."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable


class Job:
    """Bytes to be read as a whole: their blocks, and the callbacks.

    `read(start, end)` reads one block. `check()` runs after the last one. Both block, run on reader threads,
    and raise the error that fails the job, or RetryLater. `done` is called once, on a reader thread, after
    the last of its reads ended, with None or the error. Jobs with the same `domain` hang together. By default
    each queue is a domain of its own.
    """

    __slots__ = ("blocks", "check", "delayed", "domain", "done", "error", "in_flight", "read", "under_way")

    def __init__(
        self,
        blocks: Iterable[tuple[int, int]],
        *,
        read: Callable[[int, int], None],
        check: Callable[[], None],
        done: Callable[[BaseException | None], None],
        domain: Hashable = None,
    ) -> None:
        self.blocks = deque(blocks)
        self.read = read
        self.check = check
        self.done = done
        self.domain = domain
        self.in_flight = 0
        self.under_way: set[tuple[int, int]] = set()
        """The blocks that threads are reading."""
        self.delayed = 0
        self.error: BaseException | None = None


class Cancelled(Exception):
    """A job whose remaining blocks were cancelled."""
