"""The threads that write to the disk, and the copies that they write from.

A block is copied into a thread's own buffer before the disk is asked, so a disk that hangs holds no memory of
a load. What waits for a thread is bounded.
"""

from __future__ import annotations

import logging
import mmap
import os
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from ..system.copying import copy
from ..system.fair import FairExecutor
from .records import BLOCK_BYTES
from .version import Version

logger = logging.getLogger(__name__)

WRITERS = 2
"""With a block of memory each."""
WAITING_BYTES = 16 << 20
"""Of headers that wait to be written."""
WAITING_AT_LEAST_BYTES = 16 << 10
"""What each of them counts as, however short it is: it is more than its bytes."""


class Owner(Protocol):
    """The tier, as its writers need it."""

    def take(self, version: Version) -> None:
        """One use more."""

    def give_back(self, version: Version) -> None:
        """One use less."""

    def keep(self, version: Version, start: int, size_bytes: int, buffer: memoryview) -> bool:
        """Writes the first bytes of the buffer. False: there was no room. Waits for the disk; raises
        OSError."""

    def turn_off(self, error: OSError) -> None:
        """The disk fails."""


class WriterThreads:
    """Every thread may use them."""

    def __init__(self, owner: Owner) -> None:
        self.when_free: Callable[[], object] = lambda: None
        """Called when something has ended of which no caller of `write` is told."""
        self._owner = owner
        self._executor = FairExecutor(WRITERS, "tier-writer")
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(WRITERS):
            self._buffers.put(memoryview(mmap.mmap(-1, BLOCK_BYTES)))
        self._lock = threading.Lock()
        self._writes = 0
        self._waiting_bytes = 0

    @property
    def writes(self) -> int:
        """How many wait or are under way."""
        return self._writes

    @property
    def waiting_bytes(self) -> int:
        """Of `write_copy`."""
        return self._waiting_bytes

    def write(
        self,
        version: Version,
        start: int,
        end: int,
        views: Sequence[memoryview],
        copied: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        """Begins to write what `Version.missing` gave."""
        self._begin()
        self._owner.take(version)
        version.begin_write(start, end)

        def run() -> None:
            room = True
            try:
                buffer = self._buffers.get()
                try:
                    copy(views, buffer)
                    copied()
                    room = self._owner.keep(version, start, end - start, buffer)
                finally:
                    self._buffers.put(buffer)
            except OSError as error:
                self._owner.turn_off(error)
            except Exception:  # a fault of the program's own costs no load
                logger.exception("keeping a block failed unexpectedly")
            finally:
                version.end_write(start, end, room=room)
                self._ended(version, done)

        try:
            self._executor.submit(os.geteuid(), run)
        except RuntimeError:  # penstockd stops, or there is no thread
            version.end_write(start, end)
            copied()
            self._ended(version, done)

    def write_copy(self, version: Version, start: int, views: Sequence[memoryview]) -> None:
        """The same for bytes that are gone when this returns, unless too many wait already."""
        size_bytes = sum(map(len, views))
        counted_bytes = max(size_bytes, WAITING_AT_LEAST_BYTES)
        with self._lock:
            if self._waiting_bytes + counted_bytes > WAITING_BYTES:
                return
            self._waiting_bytes += counted_bytes

        def done() -> None:
            with self._lock:
                self._waiting_bytes -= counted_bytes
            self.when_free()

        held = memoryview(b"".join(views))
        self.write(version, start, start + size_bytes, [held], lambda: None, done)

    def call(self, work: Callable[[], None]) -> None:
        """Has one of the threads do something else that waits for the disk, unless they have been stopped."""
        self._begin()  # else a write might begin that has to wait for it

        def run() -> None:
            try:
                work()
            finally:
                ended()

        def ended() -> None:
            with self._lock:
                self._writes -= 1
            self.when_free()

        try:
            self._executor.submit(os.geteuid(), run)
        except RuntimeError:  # penstockd stops, or there is no thread
            ended()

    def shutdown(self) -> None:
        """Begins nothing more. Does not wait."""
        self._executor.shutdown()

    def _begin(self) -> None:
        with self._lock:
            self._writes += 1

    def _ended(self, version: Version, done: Callable[[], object]) -> None:
        self._owner.give_back(version)
        with self._lock:
            self._writes -= 1
        done()
