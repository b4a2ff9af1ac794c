"""A bounded set of threads that read blocks, earliest first within a lane, fairly between lanes.

Each stage has a lane. The next block comes from the lane that has been served the fewest bytes; a lane
that joins, or comes back after having had nothing to read, starts level with the lane served last, also
where that has nothing to read just then: so it neither starves the others nor is owed anything.

The threads hold no locks while they read and never touch the event loop's state: what they have to tell
is called back, on the reading thread.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

logger = logging.getLogger(__name__)


class Job:
    """Something to be read whole: its blocks, and whom to tell.

    `read(start, end)` reads one block, `check()` runs after the last one; both block, are called on
    reader threads and raise what fails the job. `done` is called once, on a reader thread, with None or
    the error, after the last of its reads ended.
    """

    __slots__ = ("blocks", "check", "done", "error", "in_flight", "read")

    def __init__(
        self,
        blocks: Iterable[tuple[int, int]],
        *,
        read: Callable[[int, int], None],
        check: Callable[[], None],
        done: Callable[[BaseException | None], None],
    ) -> None:
        self.blocks = deque(blocks)
        self.read = read
        self.check = check
        self.done = done
        self.in_flight = 0
        self.error: BaseException | None = None


class Lane:
    """The queue of one stage. Made by `ReaderPool.lane`; closed by its owner."""

    def __init__(self, pool: ReaderPool) -> None:
        self._pool = pool
        self.jobs: deque[Job] = deque()
        self.served_bytes = 0

    def submit(self, job: Job) -> None:
        self._pool._submit(self, job)

    def drop(self) -> list[Job]:
        """Forgets every block not begun; returns the jobs of which none is in flight. The others end
        with `done(Dropped())` when their last read does."""
        return self._pool._drop(self)


class Dropped(Exception):
    """A job whose remaining blocks were dropped."""


class ReaderPool:
    """`threads` reader threads, and what they have read since the start."""

    def __init__(self, threads: int) -> None:
        self._wake = threading.Condition()
        self._lanes: list[Lane] = []
        self._level_bytes = 0
        """What the lane that was served last had been served before."""
        self._stopping = False
        self.busy = 0
        self.read_bytes = 0
        self.read_seconds = 0.0
        self._since: dict[int, float] = {}
        """Of each thread that is reading: since when."""
        self.threads = [
            threading.Thread(target=self._run, name=f"reader-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self.threads:
            thread.start()

    def lane(self) -> Lane:
        return Lane(self)

    def reads_since(self) -> tuple[float, ...]:
        """When each read began that is under way, by the monotonic clock. From any thread."""
        return tuple(self._since.values())

    def stop(self) -> None:
        """Lets every thread end after the read it is in. Does not wait: a read may hang in the kernel."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    def _submit(self, lane: Lane, job: Job) -> None:
        if not job.blocks:
            raise ValueError("a job needs a block")
        with self._wake:
            if lane not in self._lanes:
                lane.served_bytes = max(lane.served_bytes, self._level_bytes)
                self._lanes.append(lane)
            lane.jobs.append(job)
            self._wake.notify(len(job.blocks))

    def _drop(self, lane: Lane) -> list[Job]:
        with self._wake:
            idle = [job for job in lane.jobs if not job.in_flight]
            for job in lane.jobs:
                job.blocks.clear()
                job.error = job.error or Dropped()
            lane.jobs.clear()
            if lane in self._lanes:
                self._lanes.remove(lane)
            return idle

    def _next(self) -> tuple[Lane, Job, int, int] | None:
        """Waits for a block. None: stop."""
        with self._wake:
            while not self._stopping:
                if self._lanes:
                    lane = min(self._lanes, key=lambda lane: lane.served_bytes)
                    job = lane.jobs[0]
                    start, end = job.blocks.popleft()
                    if not job.blocks:
                        lane.jobs.popleft()
                        if not lane.jobs:
                            self._lanes.remove(lane)
                    self._level_bytes = lane.served_bytes
                    lane.served_bytes += end - start
                    job.in_flight += 1
                    self.busy += 1
                    return lane, job, start, end
                self._wake.wait()
            return None

    def _run(self) -> None:
        while (block := self._next()) is not None:
            lane, job, start, end = block
            began = self._since[threading.get_ident()] = time.monotonic()
            error: BaseException | None = None
            try:
                job.read(start, end)
            except BaseException as caught:  # told to the owner, who fails the load
                error = caught
            self._finish(lane, job, end - start, time.monotonic() - began, error)
            del self._since[threading.get_ident()]

    def _finish(
        self, lane: Lane, job: Job, size_bytes: int, seconds: float, error: BaseException | None
    ) -> None:
        with self._wake:
            self.busy -= 1
            self.read_seconds += seconds
            if error is None:
                self.read_bytes += size_bytes
            else:
                job.error = job.error or error
                job.blocks.clear()
                if job in lane.jobs:
                    lane.jobs.remove(job)
                    if not lane.jobs:
                        self._lanes.remove(lane)
            job.in_flight -= 1
            last = not job.in_flight and not job.blocks
        if not last:
            return
        try:
            if job.error is None:
                job.check()
        except BaseException as caught:
            job.error = caught
        try:
            job.done(job.error)
        except RuntimeError:  # the event loop closed while this read was under way
            logger.debug("a read ended after the daemon stopped")
