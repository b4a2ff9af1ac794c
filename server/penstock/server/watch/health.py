"""Whether the daemon is alive and ready, and a watchdog that notices when a part of it hangs.

    starting -> serving -> draining      what the daemon does; `ready` only while serving
    live                                 the event loop turns, and what can be read is read

A mount that hangs is reported (`penstock_hung_mounts`, status, the log). The daemon stays live, however many
threads wait for the mount: only loads that read from it wait, storage may come back, and a restart would lose
everything that is warm. The daemon is not live, and has to be restarted, in two cases. The event loop hangs,
so nobody is answered. Or a block could be read and waits, while no thread begins or ends a read.

Every thread may ask, also while the event loop hangs.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from ..staging.reading.accounts import STALL_SECONDS
from ..staging.reading.reader import ReaderPool
from ..system.log import event

logger = logging.getLogger(__name__)

MAX_TICK_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class HungMount:
    """A mount that does not answer."""

    mount_point: str
    threads: int
    """Threads, readers and others, that have waited for it for too long."""
    seconds: float
    """The longest of these waits."""


class Health:
    """Made on the event loop that it watches. `start` begins to watch, `stop` ends that."""

    def __init__(
        self,
        readers: Collection[ReaderPool],
        asked_since: Callable[[], Iterable[tuple[str, float]]],
        *,
        stall_seconds: float,
        on_change: Callable[[], None],
    ) -> None:
        """`readers` are the pools whose reads may hang. `asked_since` has a mount for each thread that waits
        for one, and since when it waits, by the monotonic clock. `on_change` is called on the event loop when
        `ready` or `live` may have changed."""
        self.waits_for = "penstockd is starting"
        """Why a daemon that does not hang is not ready, in words. Empty if it is ready."""
        self.draining = False
        self._readers = readers
        self._asked_since = asked_since
        self._stall_seconds = stall_seconds
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._asked: float | None = None
        """When the event loop was asked to call back. None: it has called back."""
        self._told: set[str] = set()
        self._told_mounts: set[str] = set()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    @property
    def stalled_readers(self) -> int:
        """Reader threads that have been in one read for too long."""
        limit = time.monotonic() - self._stall_seconds
        return sum(since < limit for readers in self._readers for since in readers.reads_since())

    def hung_mounts(self) -> list[HungMount]:
        """The mounts that threads have waited for too long, the longest wait first."""
        now = time.monotonic()
        late = [(mount, now - since) for mount, since in self._asked_since()]
        late = [(mount, seconds) for mount, seconds in late if seconds > self._stall_seconds]
        threads = Counter(mount for mount, _ in late)
        longest = dict(sorted(late, key=lambda entry: entry[1]))
        hung = [HungMount(mount, threads[mount], seconds) for mount, seconds in longest.items()]
        return sorted(hung, key=lambda mount: -mount.seconds)

    @property
    def readers_stalled(self) -> bool:
        """A block that could be read has waited for too long, and no thread has begun or ended a read."""
        # Not before a spare thread can have taken the place of one that hangs.
        limit = time.monotonic() - max(self._stall_seconds, 4 * STALL_SECONDS)
        waits = [readers.idle_since() for readers in self._readers]
        return any(since is not None and since < limit for since in waits)

    @property
    def loop_stalled(self) -> bool:
        asked = self._asked
        return asked is not None and time.monotonic() - asked > self._stall_seconds

    @property
    def stalled(self) -> set[str]:
        """The values of `part` for which `penstock_stalled` is 1."""
        parts = {"loop": self.loop_stalled, "readers": self.readers_stalled}
        return {part for part, is_stalled in parts.items() if is_stalled}

    @property
    def hang(self) -> str:
        """Why the daemon is not live, in words. Empty if it is live."""
        if self.loop_stalled:
            return f"the event loop has made no progress for {self._stall_seconds:g} s"
        if self.readers_stalled:
            return (
                f"no reader thread is left for the blocks that wait; {self.stalled_readers} hang in one read"
            )
        return ""

    @property
    def live(self) -> bool:
        return not self.hang

    @property
    def reason(self) -> str:
        """Why the daemon is not ready, in words. Empty if it is ready."""
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
        hung = {mount.mount_point: mount for mount in self.hung_mounts()}
        for point, mount in hung.items():
            if point not in self._told_mounts:
                fields = {"mount": point, "threads": mount.threads, "seconds": round(mount.seconds, 1)}
                event(logger, "mount hangs", fields, level=logging.ERROR)
        for point in self._told_mounts - hung.keys():
            event(logger, "mount answers again", {"mount": point}, level=logging.WARNING)
        self._told_mounts = set(hung)

    def _where(self) -> str:
        """The calls that the event loop is executing, innermost last."""
        frame = sys._current_frames().get(self._loop_thread)
        calls = traceback.extract_stack(frame)[-5:] if frame else []
        return " > ".join(f"{call.name} ({call.filename.rpartition('/')[2]}:{call.lineno})" for call in calls)
