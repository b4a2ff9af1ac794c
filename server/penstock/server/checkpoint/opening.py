"""Opening many files at once, within a user's share of descriptors and within the time that storage may take.

A thread that hangs in storage cannot be interrupted. So the load that waits for it gives up. If the file is
opened in the end, it is closed at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from typing import Generic, TypeVar

from ..errors import CheckpointInvalidError, ShuttingDownError, SourceUnavailableError, TooManyLoadsError
from ..system.quota import Quota

_T = TypeVar("_T")

_LOOK_SECONDS = 0.5
"""How often it checks whether storage has taken too long."""


class Descriptors:
    """The descriptors of open files that one load holds. Thread-safe."""

    def __init__(self, quota: Quota, uid: int) -> None:
        """Holds none at first."""
        self._quota = quota
        self._uid = uid
        self._lock = threading.Lock()
        self._count = 0

    def take(self, count: int, files: int) -> None:
        """Takes `count` for so many files. Raises TooManyLoadsError while others hold them, and
        CheckpointInvalidError if the user can never have so many."""
        quota, uid = self._quota, self._uid
        if quota.take(uid, count):
            with self._lock:
                self._count += count
            return
        most = quota.most(uid)
        what = f"{files} files need {count} descriptors"
        remedy = "raise the limit of open files where penstockd is started (ulimit -n, LimitNOFILE)"
        if count > most:
            raise CheckpointInvalidError(
                f"{what}, more than the {most} that one user may have; {remedy}, or load fewer files at a "
                "time"
            )
        raise TooManyLoadsError(
            f"{what}, and {quota.left(uid)} are left for uid {uid}: its loads hold {quota.used_by(uid)}, all "
            f"loads {quota.used} of {quota.total}; try again when other loads have ended, or {remedy}"
        )

    def release(self, count: int | None = None) -> None:
        """Gives back `count`, or all that are left. Descriptors given back before are not given back
        again."""
        with self._lock:
            count = self._count if count is None else min(count, self._count)
            self._count -= count
        if count:
            self._quota.release(self._uid, count)

    def lend(self, count: int) -> Descriptors:
        """A part that is given back separately."""
        part = Descriptors(self._quota, self._uid)
        with self._lock:
            part._count = min(count, self._count)
            self._count -= part._count
        return part


class Opening(Generic[_T]):
    """One file that is being opened and read on a worker thread."""

    def __init__(
        self,
        workers: Executor,
        call: Callable[[Opening[_T]], _T],
        close: Callable[[_T], None],
        location: str,
        *,
        patience_seconds: float,
        descriptors: int,
    ) -> None:
        """`call` opens and reads the file, and calls `read` when all bytes are there. `close` undoes it."""
        self.location = location
        self.descriptors = descriptors
        self._workers = workers
        self._call = call
        self._close = close
        self._patience_seconds = patience_seconds
        self.give_up_at = float("inf")
        """The time by the monotonic clock when all bytes must be there. Known once a thread has begun."""
        self._waits = False
        self.future: Future[_T] | None = None

    def start(self) -> None:
        """Raises TooManyLoadsError if no thread can be had for it."""
        try:
            self.future = self._workers.submit(self._run)
        except RuntimeError as error:
            raise TooManyLoadsError(
                f"{self.location}: penstockd has no thread to read it ({error}); raise the limit of "
                "processes where penstockd is started (ulimit -u, TasksMax, pids.max), or try again later"
            ) from error

    def read(self) -> None:
        """All bytes are there. Time from now on does not count as storage's."""
        self._waits = False

    @property
    def overdue(self) -> bool:
        """Whether storage has not given all bytes in time."""
        return self._waits and time.monotonic() > self.give_up_at

    def cancel(self, descriptors: Descriptors) -> None:
        """Closes the file: at once, or when the thread that hangs in it returns. `descriptors` are those of
        the open file."""
        if self.future is None:
            descriptors.release()
        else:
            self.future.cancel()
            self.future.add_done_callback(lambda future: self._undo(future, descriptors))

    def too_late(self) -> SourceUnavailableError:
        return SourceUnavailableError(
            f"{self.location}: storage did not give its header or index within {self._patience_seconds:.0f} "
            "s; check whether it answers, and load it again",
            file=self.location,
        )

    def _run(self) -> _T:
        self.give_up_at = time.monotonic() + self._patience_seconds
        self._waits = True
        try:
            return self._call(self)
        finally:
            self._waits = False

    def _undo(self, future: Future[_T], descriptors: Descriptors) -> None:
        try:
            if not future.cancelled() and future.exception() is None:
                self._close(future.result())
        finally:
            descriptors.release()


def open_together(openings: Sequence[Opening[_T]], descriptors: Descriptors) -> list[_T]:
    """The results of all of them. When this raises, each file is closed, or will be when its thread returns,
    and its part of `descriptors` is given back then."""
    try:
        for opening in openings:
            opening.start()
        return [_result(opening, openings) for opening in openings]
    except BaseException:
        running = [opening for opening in openings if opening.future and not opening.future.cancel()]
        while any(not _done(opening) and not opening.overdue for opening in running):
            wait([opening.future for opening in running if opening.future], timeout=_LOOK_SECONDS)
        for opening in openings:
            opening.cancel(descriptors.lend(opening.descriptors))
        raise
    finally:
        # An error, its future and this frame would keep each other, and a header, alive until a garbage
        # collection.
        for opening in openings:
            opening.future = None


def _done(opening: Opening[_T]) -> bool:
    return opening.future is None or opening.future.done()


def _result(opening: Opening[_T], openings: Sequence[Opening[_T]]) -> _T:
    future = opening.future
    assert future is not None
    try:
        while True:
            wait([future], timeout=_LOOK_SECONDS)
            if future.cancelled():
                raise ShuttingDownError("penstockd stops, and this load was cut off; try again in a moment")
            if future.done():
                return future.result()
            for one in openings:
                if one.overdue and not _done(one):
                    raise one.too_late()
    finally:
        del future
