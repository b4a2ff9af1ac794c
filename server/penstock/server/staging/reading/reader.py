"""A bounded set of threads that read blocks, in the order that `schedule.py` decides.

The threads are started when the first block is to be read, as a daemon has a pool for each store and reads
from few. They hold no locks while they read, and never touch the event loop's state: results are reported by
callbacks on the reading thread. A thread that hangs in the kernel cannot be ended. Another takes its place,
as long as there are spare ones.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable

from ...sources import RetryLater
from ...system.failure import NoThreadError
from ...system.progress import Heartbeat, beat, watch
from .accounts import STALL_SECONDS, QueueState, Read
from .job import Job
from .schedule import Schedule

logger = logging.getLogger(__name__)

SPARE_THREADS = 64


class ReadQueue:
    """The queue of one entry. Made by `ReaderPool.queue`."""

    def __init__(self, pool: ReaderPool, uid: int | None) -> None:
        self._pool = pool
        self.state = QueueState(uid)

    @property
    def served_bytes(self) -> int:
        return self.state.served_bytes

    def submit(self, job: Job) -> None:
        """Raises NoThreadError if the pool has no thread and can start none."""
        self._pool._submit(self.state, job)

    def give_to(self, uid: int | None) -> None:
        """From now on the queue counts as that user's."""
        self._pool._give_to(self.state, uid)

    def cancel(self) -> list[Job]:
        """Drops every block not begun. Returns the jobs of which no block is being read. The others end with
        `done(Cancelled())` when their last read does."""
        return self._pool._cancel(self.state)


class ReaderPool:
    """`size` reader threads, and how much they have read since the start."""

    def __init__(
        self,
        size: int,
        *,
        block_bytes: int,
        name: str = "reader",
        spare_threads: int = SPARE_THREADS,
        copies_at_once: int | None = None,
    ) -> None:
        """Starts no thread yet. Each thread reads `block_bytes` at once. At most `spare_threads` more replace
        threads whose reads stall. At most `copies_at_once` reads are under way that have not begun to wait
        for storage; None: any number."""
        self.block_bytes = block_bytes
        self.at_once_bytes = size * block_bytes
        """How much all threads together read at once, without the spare ones."""
        self._name = name
        self._lock = threading.Lock()
        self._wake = threading.Condition(self._lock)
        self._watched = threading.Condition(self._lock)
        self._schedule = Schedule(size, spare_threads)
        self._copies_at_once = size + spare_threads if copies_at_once is None else copies_at_once
        self._copying: set[Heartbeat] = set()
        """Of the reads under way, those that have not begun to wait for storage."""
        self._idle = 0
        """Threads that wait for a block."""
        self._called = 0
        """How many of these have been woken since."""
        self._stopping = False
        self._told_of_threads = False
        self._numbers = itertools.count()
        self.read_bytes = 0
        self.read_seconds = 0.0
        self.threads: list[threading.Thread] = []
        """Those that run; empty until the first block is to be read."""
        self._watcher: threading.Thread | None = None

    @property
    def busy(self) -> int:
        return len(self._schedule.reading)

    def queue(self, uid: int | None = None) -> ReadQueue:
        """A queue for an entry that is read for that user; None is the daemon itself."""
        return ReadQueue(self, uid)

    def reads_since(self) -> tuple[float, ...]:
        """For each read under way, when it last made progress, by the monotonic clock. From any thread."""
        with self._lock:
            return tuple(read.heartbeat.at for read in self._schedule.reading)

    def idle_since(self) -> float | None:
        """Since when no thread has begun or ended a read although a block waits that may be begun. None while
        all is well. From any thread."""
        with self._lock:
            return self._schedule.able_since()

    def stop(self) -> None:
        """Ends every thread after the read that it is in. Does not wait, as a read may hang in the kernel."""
        with self._lock:
            self._stopping = True
            self._wake.notify_all()
            self._watched.notify_all()

    # ---- queues and jobs -------------------------------------------------------------------------

    def _submit(self, queue: QueueState, job: Job) -> None:
        with self._lock:
            if not self.threads:
                self._add_threads()
            self._schedule.submit(queue, job, time.monotonic())
            self._call_up()
            self._watched.notify()

    def _give_to(self, queue: QueueState, uid: int | None) -> None:
        with self._lock:
            self._schedule.give_to(queue, uid)
            self._call_up()

    def _cancel(self, queue: QueueState) -> list[Job]:
        with self._lock:
            return self._schedule.cancel(queue)

    # ---- reading threads ------------------------------------------------------------------------

    def _start(self, run: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=run, name=f"{self._name}-{name}", daemon=True)
        thread.start()  # it waits for the lock that is held here
        return thread

    def _add_threads(self) -> None:
        """Starts the threads that are missing: all of them at first, later spare ones. If it cannot, the pool
        goes on with those that it has: a container with few processes left may not start a thread. Raises
        NoThreadError if it has none."""
        try:
            self._watcher = self._watcher or self._start(self._watch, "watch")
            while len(self.threads) < self._schedule.wanted_threads:
                self.threads.append(self._start(self._run, str(next(self._numbers))))
        except (RuntimeError, MemoryError) as error:
            if not self.threads:
                raise NoThreadError(str(error)) from error
            if not self._told_of_threads:
                self._told_of_threads = True
                logger.warning("a reader thread could not be started: %s; raise the pids limit", error)

    def _call_up(self) -> None:
        """Wakes one thread, if a block waits and one more read may copy. When that thread has begun its read,
        it calls up the next one. A thread that ends a read takes the next block itself."""
        if (
            self._called < self._idle
            and len(self._copying) + self._called < self._copies_at_once
            and self._schedule.waiting
        ):
            self._called += 1
            self._wake.notify()

    def _waits(self, heartbeat: Heartbeat) -> None:
        """That read begins to wait for storage. On its thread."""
        with self._lock:
            self._copying.discard(heartbeat)
            self._call_up()

    def _next(self) -> Read | None:
        """Waits for a block. None: the thread must end."""
        with self._lock:
            while not self._stopping:
                if len(self.threads) > self._schedule.wanted_threads:
                    self.threads.remove(threading.current_thread())
                    self._call_up()
                    return None
                may_copy = len(self._copying) < self._copies_at_once
                read = self._schedule.begin(time.monotonic()) if may_copy else None
                if read is not None:
                    self._add_threads()  # a read from a domain in trouble counts as stalled at once
                    if not read.suspect:
                        self._copying.add(read.heartbeat)
                    self._call_up()
                    return read
                self._idle += 1
                self._wake.wait()
                self._idle -= 1
                self._called = max(0, self._called - 1)
            return None

    def _run(self) -> None:
        while (read := self._next()) is not None:
            watch(read.heartbeat, self._waits)
            error: BaseException | None = None
            try:
                read.job.read(read.start, read.end)
            except BaseException as caught:  # reported to the owner, who fails the load
                error = caught
            self._finish(read, error)

    def _finish(self, read: Read, error: BaseException | None) -> None:
        job, reached = read.job, read.end
        with self._lock:
            now = time.monotonic()
            if isinstance(error, RetryLater):
                reached = error.reached
                last = self._schedule.put_off(read, reached, error.delay_seconds, now)
                self._watched.notify()
            else:
                reached = read.start if error else read.end
                last = self._schedule.read_over(read, error, now)
            self.read_bytes += reached - read.start
            self.read_seconds += now - read.began
            checks = last and job.error is None
            if not checks:
                self._leave(read)
        if checks:
            # The check asks the storage too and may hang as a read may, so it counts as one.
            beat()
            try:
                job.check()
            except BaseException as caught:
                job.error = caught
            with self._lock:
                self._leave(read)
        if not last:
            return
        try:
            job.done(job.error)
        except RuntimeError:  # the event loop closed while this read was under way
            logger.debug("a read ended after the daemon stopped")

    def _leave(self, read: Read) -> None:
        self._copying.discard(read.heartbeat)
        self._schedule.leave(read, time.monotonic())
        if len(self.threads) > self._schedule.wanted_threads:
            self._wake.notify()  # a waiting thread may end

    # ---- what waits and what stalls -------------------------------------------------------------

    def _watch(self) -> None:
        with self._lock:
            while not self._stopping:
                now = time.monotonic()
                self._schedule.look(now)
                if self.threads:
                    self._add_threads()
                # A read that neither ends nor says that it waits holds up the others for a moment only.
                self._copying = {one for one in self._copying if now - one.at < STALL_SECONDS / 4}
                self._call_up()
                self._watched.wait(self._until_next_look(now))

    def _until_next_look(self, now: float) -> float | None:
        looks = []
        due = self._schedule.next_due()
        if due is not None:
            looks.append(max(0.0, due - now))
        if self._schedule.waiting and self._schedule.reading:
            looks.append(STALL_SECONDS / 4)
        return min(looks, default=None)
