"""Whether the daemon is alive and ready, and a watchdog that notices when a part of it hangs.

    starting -> serving -> draining      what the daemon does; `ready` only while serving
    live                                 the event loop turns, and so does at least one reader

One reader that hangs is told (`penstock_stalled`, the log) but costs only its own load: storage may come
back, and a restart would throw away everything that is warm. When all hang nothing can be read any more, and
when the loop hangs nobody is answered: then the daemon is not live, and whoever watches it should restart it.

Everything here may be asked from any thread, above all while the event loop hangs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection

from .log import event
from .reader import ReaderPool

logger = logging.getLogger(__name__)

MAX_TICK_SECONDS = 1.0


class Health:
    """Made on the event loop that it watches. `start` begins to watch, `stop` ends that."""

    def __init__(
        self, readers: Collection[ReaderPool], *, stall_seconds: float, on_change: Callable[[], None]
    ) -> None:
        """`on_change` is called on the event loop when `ready` or `live` may be different."""
        self.waits_for = "penstockd is starting"
        """What keeps a daemon that is not hung from being ready, in words; empty when nothing does."""
        self.draining = False
        self._readers = readers
        self._stall_seconds = stall_seconds
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._asked: float | None = None
        """Since when the loop has been asked for a turn that it has not made."""
        self._told: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def stalled_readers(self) -> int:
        """Reader threads that have been in one read for too long."""
        return sum(map(self._stalled_in, self._readers))

    @property
    def loop_stalled(self) -> bool:
        asked = self._asked
        return asked is not None and time.monotonic() - asked > self._stall_seconds

    @property
    def stalled(self) -> set[str]:
        """The values of `part` for which `penstock_stalled` is 1."""
        parts = {"loop": self.loop_stalled, "readers": self.stalled_readers > 0}
        return {part for part, is_stalled in parts.items() if is_stalled}

    @property
    def hang(self) -> str:
        """Why the daemon is not live, in words; empty when it is."""
        if self.loop_stalled:
            return f"the event loop has not turned for {self._stall_seconds:g} s"
        if any(0 < len(readers.threads) <= self._stalled_in(readers) for readers in self._readers):
            return f"every reader has been in one read for {self._stall_seconds:g} s: storage does not answer"
        return ""

    @property
    def live(self) -> bool:
        return not self.hang

    @property
    def reason(self) -> str:
        """Why the daemon is not ready, in words; empty when it is."""
        return self.hang or self.waits_for

    @property
    def ready(self) -> bool:
        return not self.reason

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()

    def _watch(self) -> None:
        tick = min(MAX_TICK_SECONDS, self._stall_seconds / 4)
        before = self.reason
        last = time.monotonic()
        while not self._end.wait(tick):
            now = time.monotonic()
            if now - last > self._stall_seconds / 2:
                self._asked = None  # this thread did not run either: the machine or the process was stopped
            last = now
            try:
                if self._asked is None:
                    self._asked = now
                    self._loop.call_soon_threadsafe(self._turned)
                self._tell()
                if self.reason != before and not self.loop_stalled:
                    before = self.reason
                    self._loop.call_soon_threadsafe(self._on_change)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise
                return  # the daemon ends

    def _stalled_in(self, readers: ReaderPool) -> int:
        limit = time.monotonic() - self._stall_seconds
        return sum(since < limit for since in readers.reads_since())

    def _turned(self) -> None:
        self._asked = None

    def _tell(self) -> None:
        stalled = self.stalled
        for part in stalled - self._told:
            fields: dict[str, object] = {"part": part, "seconds": self._stall_seconds}
            if part == "loop":
                fields["at"] = self._where()
            else:
                fields["readers"] = self.stalled_readers
            event(logger, "stalled", fields, level=logging.ERROR)
        for part in self._told - stalled:
            event(logger, "recovered", {"part": part}, level=logging.WARNING)
        self._told = stalled

    def _where(self) -> str:
        """What the event loop is doing, innermost call last."""
        frame = sys._current_frames().get(self._loop_thread)
        calls = traceback.extract_stack(frame)[-5:] if frame else []
        return " > ".join(f"{call.name} ({call.filename.rpartition('/')[2]}:{call.lineno})" for call in calls)
