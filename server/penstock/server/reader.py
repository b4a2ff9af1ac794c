"""A bounded set of threads that read blocks, earliest first within a lane, fairly between lanes.

Each stage has a lane. The next block comes from the lane that has been served the fewest bytes; a lane
that joins, or comes back after having had nothing to read, starts level with the lane served last, also
where that has nothing to read just then: so it neither starves the others nor is owed anything.

No lane holds the others back when its storage fails or hangs:

- A read that may succeed later raises RetryLater. The rest of its block waits without a thread.
- A read that has not moved for `STALL_SECONDS` does not count as one of the threads; another takes its
  place, and surplus threads end when it moves again. At most `spare_threads` are replaced so.
- A lane in trouble, which stalls or waits, gets no more than its share of threads and of waiting blocks,
  and what it begins counts as stalled until it moves.

The threads hold no locks while they read and never touch the event loop's state: what they have to tell
is called back, on the reading thread.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

from .progress import Pulse, watch
from .sources import RetryLater

logger = logging.getLogger(__name__)

STALL_SECONDS = 1.0
SPARE_THREADS = 64


class Job:
    """Something to be read whole: its blocks, and whom to tell.

    `read(start, end)` reads one block, `check()` runs after the last one; both block, are called on
    reader threads and raise what fails the job, or RetryLater. `done` is called once, on a reader thread,
    with None or the error, after the last of its reads ended.
    """

    __slots__ = ("blocks", "check", "delayed", "done", "error", "in_flight", "read")

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
        self.delayed = 0
        self.error: BaseException | None = None


class Lane:
    """The queue of one stage. Made by `ReaderPool.lane`; closed by its owner."""

    def __init__(self, pool: ReaderPool) -> None:
        self._pool = pool
        self.jobs: deque[Job] = deque()
        """Those with blocks to be begun."""
        self.served_bytes = 0
        self.in_flight = 0
        self.delayed = 0
        self.drops = 0
        self.troubled = False
        """Its last read to end failed for now, or one is stalled."""

    def submit(self, job: Job) -> None:
        self._pool._submit(self, job)

    def drop(self) -> list[Job]:
        """Forgets every block not begun; returns the jobs of which none is in flight. The others end
        with `done(Dropped())` when their last read does."""
        return self._pool._drop(self)


class Dropped(Exception):
    """A job whose remaining blocks were dropped."""


class _Read:
    """A block that a thread is reading."""

    __slots__ = ("began", "drops", "end", "job", "lane", "pulse", "stalled", "start", "suspect")

    def __init__(self, lane: Lane, job: Job, start: int, end: int) -> None:
        self.lane = lane
        self.job = job
        self.start = start
        self.end = end
        self.drops = lane.drops
        self.pulse = Pulse()
        self.began = self.pulse.at
        self.stalled = False
        self.suspect = lane.troubled

    def is_stalled(self, now: float) -> bool:
        if self.suspect and self.pulse.at == self.began:
            return True
        return now - self.pulse.at >= STALL_SECONDS


class ReaderPool:
    """`size` reader threads, and what they have read since the start."""

    def __init__(self, size: int, *, name: str = "reader", spare_threads: int = SPARE_THREADS) -> None:
        """Stalled reads are replaced by at most `spare_threads` others."""
        self._size = size
        self._name = name
        self._spare_threads = spare_threads
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._watched = threading.Condition(self._lock)
        self._lanes: list[Lane] = []
        """Those with jobs."""
        self._level_bytes = 0
        """What the lane that was served last had been served before."""
        self._delayed: list[tuple[float, int, Lane, Job, int, int]] = []
        """A heap of blocks to be read no sooner than a time, with a number to tell equal times apart."""
        self._reading: set[_Read] = set()
        self._stalled = 0
        self._stopping = False
        self._told_of_threads = False
        self._numbers = itertools.count()
        self.read_bytes = 0
        self.read_seconds = 0.0
        self.threads: list[threading.Thread] = []
        with self._lock:
            for _ in range(size):
                self._add_thread()
        threading.Thread(target=self._watch, name=f"{name}-watch", daemon=True).start()

    @property
    def busy(self) -> int:
        return len(self._reading)

    def lane(self) -> Lane:
        return Lane(self)

    def reads_since(self) -> tuple[float, ...]:
        """When each read that is under way last moved, by the monotonic clock. From any thread."""
        with self._lock:
            return tuple(read.pulse.at for read in self._reading)

    def stop(self) -> None:
        """Lets every thread end after the read it is in. Does not wait: a read may hang in the kernel."""
        with self._lock:
            self._stopping = True
            self._wake.notify_all()
            self._watched.notify_all()

    # ---- lanes and jobs -------------------------------------------------------------------------

    def _submit(self, lane: Lane, job: Job) -> None:
        if not job.blocks:
            raise ValueError("a job needs a block")
        with self._lock:
            self._enlist(lane)
            lane.jobs.append(job)
            self._wake.notify(len(job.blocks))
            self._watched.notify()

    def _enlist(self, lane: Lane) -> None:
        if lane not in self._lanes:
            lane.served_bytes = max(lane.served_bytes, self._level_bytes)
            self._lanes.append(lane)

    def _delist(self, lane: Lane, job: Job) -> None:
        """The job has no more blocks to begin."""
        job.blocks.clear()
        if job in lane.jobs:
            lane.jobs.remove(job)
            if not lane.jobs:
                self._lanes.remove(lane)

    def _drop(self, lane: Lane) -> list[Job]:
        with self._lock:
            lane.drops += 1
            dropped = dict.fromkeys((*lane.jobs, *(entry[3] for entry in self._delayed if entry[2] is lane)))
            for job in dropped:
                job.error = job.error or Dropped()
                self._forget_delayed(lane, job)
                self._delist(lane, job)
            return [job for job in dropped if not job.in_flight]

    def _forget_delayed(self, lane: Lane, job: Job) -> None:
        if job.delayed:
            self._delayed = [entry for entry in self._delayed if entry[3] is not job]
            heapq.heapify(self._delayed)
            lane.delayed -= job.delayed
            job.delayed = 0

    def _choose(self) -> Lane | None:
        """The lane that is served next."""
        lanes = [
            lane
            for lane in self._lanes
            if lane.in_flight + lane.delayed < (self._size if lane.troubled else 2 * self._size)
        ]
        return min(lanes, key=lambda lane: lane.served_bytes, default=None)

    # ---- reading threads ------------------------------------------------------------------------

    def _add_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}-{next(self._numbers)}", daemon=True)
        thread.start()  # it waits for the lock that is held here
        self.threads.append(thread)

    def _add_spare(self) -> None:
        """Or goes on without: in a container with few processes left no thread can be started."""
        try:
            self._add_thread()
        except RuntimeError as error:
            if not self._told_of_threads:
                self._told_of_threads = True
                logger.warning("no thread for one that stalls: %s; raise the pids limit", error)

    def _surplus(self) -> int:
        """How many threads there are beyond those that may read at once."""
        return len(self.threads) - min(self._stalled, self._spare_threads) - self._size

    def _next(self) -> _Read | None:
        """Waits for a block. None: the thread is to end."""
        with self._lock:
            while not self._stopping:
                if self._surplus() > 0:
                    self.threads.remove(threading.current_thread())
                    return None
                lane = self._choose()
                if lane is not None:
                    return self._begin(lane)
                self._wake.wait()
            return None

    def _begin(self, lane: Lane) -> _Read:
        job = lane.jobs[0]
        start, end = job.blocks.popleft()
        if not job.blocks:
            self._delist(lane, job)
        self._level_bytes = lane.served_bytes
        lane.served_bytes += end - start
        lane.in_flight += 1
        job.in_flight += 1
        read = _Read(lane, job, start, end)
        self._reading.add(read)
        self._set_stalled(read, read.suspect)
        return read

    def _run(self) -> None:
        while (read := self._next()) is not None:
            watch(read.pulse)
            error: BaseException | None = None
            try:
                read.job.read(read.start, read.end)
            except BaseException as caught:  # told to the owner, who fails the load
                error = caught
            self._finish(read, error)

    def _finish(self, read: _Read, error: BaseException | None) -> None:
        lane, job = read.lane, read.job
        reached = read.end
        with self._lock:
            self._reading.remove(read)
            self._set_stalled(read, False)
            lane.in_flight -= 1
            job.in_flight -= 1
            lane.troubled = isinstance(error, RetryLater)
            if isinstance(error, RetryLater):
                reached = error.reached
                lane.served_bytes -= read.end - reached
                if read.drops != lane.drops:
                    job.error = job.error or Dropped()
                elif job.error is None:
                    self._delay(lane, job, reached, read.end, error.delay_seconds)
            elif error is not None:
                reached = read.start
                job.error = job.error or error
                self._forget_delayed(lane, job)
                self._delist(lane, job)
            self.read_bytes += reached - read.start
            self.read_seconds += time.monotonic() - read.began
            last = not job.in_flight and not job.blocks and not job.delayed
            if self._lanes:  # a lane in trouble may have waited for this
                self._wake.notify()
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

    # ---- what waits and what stalls -------------------------------------------------------------

    def _delay(self, lane: Lane, job: Job, start: int, end: int, seconds: float) -> None:
        due = time.monotonic() + seconds
        heapq.heappush(self._delayed, (due, next(self._numbers), lane, job, start, end))
        lane.delayed += 1
        job.delayed += 1
        self._watched.notify()

    def _watch(self) -> None:
        """Lets blocks go on that waited long enough, and finds the reads that stall while more is to be
        begun."""
        with self._lock:
            while not self._stopping:
                now = time.monotonic()
                self._resume_delayed(now)
                if self._lanes:
                    for read in self._reading:
                        self._set_stalled(read, read.is_stalled(now))
                self._watched.wait(self._until_next_look(now))

    def _until_next_look(self, now: float) -> float | None:
        looks = []
        if self._delayed:
            looks.append(max(0.0, self._delayed[0][0] - now))
        if self._lanes and self._reading:
            looks.append(STALL_SECONDS / 4)
        return min(looks, default=None)

    def _resume_delayed(self, now: float) -> None:
        while self._delayed and self._delayed[0][0] <= now:
            _, _, lane, job, start, end = heapq.heappop(self._delayed)
            lane.delayed -= 1
            job.delayed -= 1
            self._enlist(lane)
            job.blocks.appendleft((start, end))
            if job not in lane.jobs:
                lane.jobs.appendleft(job)
            self._wake.notify()

    def _set_stalled(self, read: _Read, stalled: bool) -> None:
        if read.stalled == stalled:
            return
        read.stalled = stalled
        self._stalled += 1 if stalled else -1
        if stalled:
            read.lane.troubled = True
            if self._surplus() < 0:
                self._add_spare()
        elif self._surplus() > 0:
            self._wake.notify()  # one that waits may end
