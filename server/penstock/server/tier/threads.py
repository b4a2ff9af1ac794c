"""The threads that wait for the disk. A call that hangs in the kernel cannot be ended, so callers stop
waiting for it: they read from the store instead."""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, wait
from typing import TypeVar

from ..system.fair import FairExecutor

_T = TypeVar("_T")

READERS = 24
"""With `READ_BYTES` each, 48 MiB of memory. While some compare and copy, the others keep a disk at work that
reads 2.6 GB/s: 16 were 10 % slower (benchmarks/tier.py)."""
READ_BYTES = 2 << 20
HANG_SECONDS = 5.0
"""A disk that has not answered for so long is not asked until it does."""


class UnavailableError(Exception):
    """The disk hangs, or there is no thread to ask it."""


class Ticket:
    """Whether the caller still waits. What a thread does for it must be done inside `held`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._gone = False

    def held(self, work: Callable[[], None]) -> None:
        """Does the work, which must not wait for a disk, unless the caller is gone: it goes before or after,
        never meanwhile."""
        with self._lock:
            if not self._gone:
                work()

    def leave(self) -> None:
        with self._lock:
            self._gone = True


class DiskThreads:
    """Serve users in turn. Every thread may use them."""

    def __init__(self, *, hang_seconds: float = HANG_SECONDS) -> None:
        self._hang_seconds = hang_seconds
        self._executor = FairExecutor(READERS, "tier-reader")
        self._began: dict[int, float] = {}
        """By thread, when the call began that it is in."""
        self._own = threading.local()

    @property
    def hang(self) -> bool:
        """Some call has not ended for so long that the disk is not to be asked."""
        now = time.monotonic()
        return any(now - began >= self._hang_seconds for began in list(self._began.values()))

    def call(self, uid: int, work: Callable[[Ticket], _T]) -> _T:
        """What `work` gives, on a thread that may hang. Raises UnavailableError, and what `work` raises."""
        return self.calls(uid, [work])[0]

    def calls(self, uid: int, works: Sequence[Callable[[Ticket], _T]]) -> list[_T]:
        """As `call` for several, which are begun in their order. Ends when all have ended. Returns what they
        give, up to the first that failed; raises what that raised if it is the first of all."""
        if self.hang:
            raise UnavailableError
        begun: list[tuple[Future[_T], Ticket]] = []
        future: Future[_T] | None = None
        try:
            for work in works:
                begun.append(self._begin(uid, work))
            while wait([future for future, _ in begun], timeout=self._hang_seconds / 4).not_done:
                if self.hang:
                    raise UnavailableError
            results: list[_T] = []
            for future, _ in begun:
                if results and future.exception() is not None:
                    break
                results.append(future.result())
            return results
        except CancelledError:
            raise UnavailableError from None
        finally:
            for future, ticket in begun:
                ticket.leave()
                future.cancel()
            begun.clear()  # or an error and this frame would keep each other
            future = None

    def buffer(self) -> memoryview:
        """Of the thread that asks, which is one of these: `READ_BYTES` at whole pages."""
        if not hasattr(self._own, "buffer"):
            self._own.buffer = memoryview(mmap.mmap(-1, READ_BYTES))
        buffer: memoryview = self._own.buffer
        return buffer

    def shutdown(self) -> None:
        self._executor.shutdown()

    def _begin(self, uid: int, work: Callable[[Ticket], _T]) -> tuple[Future[_T], Ticket]:
        ticket = Ticket()
        try:
            return self._executor.submit(uid, self._run, work, ticket), ticket
        except RuntimeError as error:
            raise UnavailableError from error

    def _run(self, work: Callable[[Ticket], _T], ticket: Ticket) -> _T:
        me = threading.get_ident()
        self._began[me] = time.monotonic()
        try:
            return work(ticket)
        finally:
            del self._began[me]
