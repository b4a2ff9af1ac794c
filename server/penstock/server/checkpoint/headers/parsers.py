"""The threads and spools with which headers and indexes are parsed, for users in turn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import TypeVar

from ...errors import ShuttingDownError, TooManyLoadsError
from ...system.fair import FairExecutor
from .spool import Spools

CHILDREN = 3
"""Children at a time: one for each of two users, and one for privileged users alone."""

_T = TypeVar("_T")


class Parsers:
    """The threads that parse headers and indexes, one set for the process: its memory and cores are
    shared."""

    def __init__(self) -> None:
        # One thread: because of Python's interpreter lock, more would not be faster, only larger.
        self._inline = FairExecutor(1, "parser")
        self._children = FairExecutor(CHILDREN, "parser-child")
        self.spools = Spools()

    def shutdown(self) -> None:
        """Begins nothing more. Does not wait."""
        self._inline.shutdown()
        self._children.shutdown()

    def here(self, uid: int, call: Callable[[], _T]) -> _T:
        """Runs `call`, which holds the interpreter lock for long, when it is that user's turn."""
        return _run(self._inline, uid, call)

    def in_child(self, uid: int, call: Callable[[], _T]) -> _T:
        """Runs `call`, which starts a child and waits for it, when it is that user's turn."""
        return _run(self._children, uid, call)


def _run(executor: FairExecutor, uid: int, call: Callable[[], _T]) -> _T:
    try:
        future = executor.submit(uid, call)
    except RuntimeError as error:
        raise TooManyLoadsError(
            f"penstockd has no thread to parse a header ({error}); raise the limit of processes where "
            "penstockd is started (ulimit -u, TasksMax, pids.max), or try again later"
        ) from error
    try:
        return future.result()
    except CancelledError:
        raise ShuttingDownError("penstockd stops, and this load was cut off; try again in a moment") from None
    finally:
        del future  # or an error and this frame would keep each other, and a header, until gc comes
