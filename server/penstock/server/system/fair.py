"""Threads that serve users in turn.

Each user has a queue of its own. The next call is taken from the user with the fewest calls under way; among
those, from the one that has had the least thread time. A user that joins, or comes back, starts level with
the user served last: it is owed nothing and owes nothing. So with n users at work, each gets an n-th of the
threads' time, however many calls the others queue.

A call cannot be interrupted. So that calls which hang or take very long leave threads to others, their number
is a quota (`quota.py`): one user never has all threads, and one is kept for privileged users.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

from .failure import NoThreadError
from .quota import NEWCOMERS, Quota

_P = ParamSpec("_P")
_T = TypeVar("_T")

FIRST_CALLS = NEWCOMERS
"""For threads that may wait for storage, or for others' costly headers: each of eight users finds one,
whatever the others do."""


class FairExecutor:
    """At most `count` threads, started as they are needed. Every thread may submit."""

    def __init__(self, count: int, name: str, *, first_calls: int = 0) -> None:
        """At least so many of the threads are set aside for users' first calls: where calls may take long, a
        new user would wait for one of others to end."""
        self._count = count
        self._name = name
        self._wake = threading.Condition()
        self._quota = Quota(count, first_units=first_calls)
        self._queues: dict[int, deque[_Call]] = {}
        """By user with calls that wait."""
        self._served_seconds: dict[int, float] = {}
        """By user with calls that wait or are under way."""
        self._level_seconds = 0.0
        """The seconds for which the user served last had been served before that call."""
        self._began: dict[int, float] = {}
        """By thread with a call under way: when that began, by the monotonic clock."""
        self._threads = 0
        self._idle = 0
        self._numbers = itertools.count()
        self._stopped = False

    def submit(self, uid: int, call: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> Future[_T]:
        """Queues a call for a user. The future can be cancelled until the call begins. Raises RuntimeError
        after `shutdown`, and NoThreadError if not even one thread can be started."""
        future: Future[_T] = Future()
        with self._wake:
            if self._stopped:
                raise RuntimeError("the threads have been stopped")
            waiting = sum(map(len, self._queues.values()))
            if self._idle <= waiting and self._threads < self._count:
                self._add_thread()
            self._queues.setdefault(uid, deque()).append(_Call(future, call, arguments, named))
            self._served_seconds[uid] = max(self._served_seconds.get(uid, 0.0), self._level_seconds)
            self._wake.notify()
        return future

    def of(self, uid: int) -> UserExecutor:
        """The same threads as an executor whose calls are that user's."""
        return UserExecutor(self, uid)

    @property
    def idle(self) -> bool:
        """No call waits or is under way."""
        with self._wake:
            return not self._queues and not self._began

    def shutdown(self) -> None:
        """Cancels waiting calls and begins no others. Does not wait: a call may hang in the kernel."""
        with self._wake:
            self._stopped = True
            waiting = [call for queue in self._queues.values() for call in queue]
            self._queues.clear()
            self._wake.notify_all()
        for call in waiting:
            call.future.cancel()

    def _add_thread(self) -> None:
        thread = threading.Thread(target=self._run, name=f"{self._name}-{next(self._numbers)}", daemon=True)
        try:
            thread.start()  # it waits for the lock that is held here
        except (RuntimeError, MemoryError) as error:  # no more threads: the others serve its calls
            if not self._threads:
                raise NoThreadError(str(error)) from error
        else:
            self._threads += 1

    def _choose(self) -> int | None:
        """The user who is served next."""
        able = [uid for uid in self._queues if self._quota.left(uid)]
        return min(able, key=lambda uid: (self._quota.used_by(uid), self._served_seconds[uid]), default=None)

    def _next(self) -> tuple[int, _Call] | None:
        """Waits for a call, and takes the user's share for it. None: the thread is to end."""
        while not self._stopped:
            uid = self._choose()
            if uid is not None:
                queue = self._queues[uid]
                call = queue.popleft()
                if not queue:
                    del self._queues[uid]
                self._quota.take(uid)
                self._level_seconds = self._served_seconds[uid]
                self._began[threading.get_ident()] = time.monotonic()
                return uid, call
            self._idle += 1
            self._wake.wait()
            self._idle -= 1
        return None

    def _run(self) -> None:
        while True:
            with self._wake:
                taken = self._next()
            if taken is None:
                return
            uid, call = taken
            try:
                call.run()
            finally:
                del taken, call  # or an idle thread would keep the arguments of its last call
                with self._wake:
                    self._quota.release(uid)
                    began = self._began.pop(threading.get_ident())
                    self._served_seconds[uid] += time.monotonic() - began
                    if uid not in self._queues and not self._quota.used_by(uid):
                        del self._served_seconds[uid]
                    self._wake.notify()  # one that waited because of the quota


class UserExecutor(Executor):
    """A fair executor for the calls of one user."""

    def __init__(self, executor: FairExecutor, uid: int) -> None:
        self._executor = executor
        self._uid = uid

    def submit(self, call: Callable[_P, _T], /, *arguments: _P.args, **named: _P.kwargs) -> Future[_T]:
        return self._executor.submit(self._uid, call, *arguments, **named)


class _Call:
    __slots__ = ("_arguments", "_call", "_named", "future")

    def __init__(
        self,
        future: Future[Any],
        call: Callable[..., Any],
        arguments: tuple[Any, ...],
        named: dict[str, Any],
    ) -> None:
        self.future = future
        self._call = call
        self._arguments = arguments
        self._named = named

    def run(self) -> None:
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self._call(*self._arguments, **self._named)
        except BaseException as error:
            self.future.set_exception(error)
            del self  # or the error, its traceback and the future would keep each other until gc comes
        else:
            self.future.set_result(result)
