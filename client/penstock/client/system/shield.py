"""Work that an exception of a signal handler, such as KeyboardInterrupt, cannot break off in the middle.

Python runs signal handlers on the main thread, between any two of its steps, so that Ctrl-C may come where a
descriptor that has arrived is in no variable yet, or where gRPC has begun a call that it has not noted. What
must not stop there runs on another thread. The main thread waits for it, and that wait may be broken off.
"""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from .latch import Latch

_T = TypeVar("_T")

END_SECONDS = 5.0
"""The longest wait for an end that should be near. An exception that hit gRPC could keep it away for ever."""


def shielded(work: Callable[[], _T], *, abort: Callable[[], bool] | None = None) -> _T:
    """Returns what `work` returns, and raises what it raises. It runs on another thread if this is the main
    one.

    If a signal handler raises meanwhile, this raises that at once, and `work` goes on: it has to give back
    what nobody waits for any more. With `abort`, calls it first. If that returns true, waits for the end of
    `work`, for at most `END_SECONDS`.
    """
    run = _Run(work)
    try:
        started = run.start()
        if started:
            run.ended.wait()
    except BaseException:
        if abort is not None and abort():
            run.ended.wait(END_SECONDS)
        raise
    return run.result() if started else work()


def end(work: Callable[[], None]) -> bool:
    """As `shielded`, for work that closes something. Waits for at most `END_SECONDS`. Returns whether it has
    ended."""
    run = _Run(work)
    if not run.start():
        work()
        return True
    if not run.ended.wait(END_SECONDS):
        return False
    run.result()
    return True


def start_thread(run: Callable[..., object], *arguments: object) -> None:
    """Starts a thread that does not keep the interpreter from ending. Raises RuntimeError if it cannot.

    Raises what a signal handler raises meanwhile; then the thread may have begun."""
    handled = sys.exc_info()[1]
    try:
        threading.Thread(target=run, args=arguments, daemon=True).start()
    except RuntimeError as error:
        interruption = error.__context__
        if interruption is None or interruption is handled:
            raise
        raise interruption from None  # it broke the lock with which `start` waits for the thread to begin


class _Run(Generic[_T]):
    """One piece of work, on its thread."""

    def __init__(self, work: Callable[[], _T]) -> None:
        self.ended = Latch()
        self._work: Callable[[], _T] | None = work
        self._results: list[_T] = []
        self._error: BaseException | None = None

    def start(self) -> bool:
        """False if this thread should do it itself."""
        if threading.current_thread() is not threading.main_thread() or sys.is_finalizing():
            return False
        try:
            start_thread(contextvars.copy_context().run, self._run)
        except RuntimeError:  # no thread is left, or the interpreter ends
            return False
        return True

    def _run(self) -> None:
        work, self._work = self._work, None
        assert work is not None
        try:
            self._results.append(work())
        except BaseException as error:
            self._error = error
        finally:
            del work
            self.ended.set()

    def result(self) -> _T:
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                del error  # or it and this frame would keep each other
        return self._results.pop()
