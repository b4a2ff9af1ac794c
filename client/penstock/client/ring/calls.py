"""The calls of one client. Each has a connection of its own, and is repeated if the daemon goes away."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import errors
from ..system.latch import Latch
from ..system.shield import shielded

if TYPE_CHECKING:
    from .progress import Bar
    from .rpc import Session

_T = TypeVar("_T")


class Calls:
    """Opens connections in `socket_dir` until `close()`. Every thread may use it. Keeps no connection."""

    def __init__(self, socket_dir: Path, *, reconnect_timeout: float) -> None:
        self.socket_dir = socket_dir
        self.reconnect_timeout = reconnect_timeout
        self._closed = Latch()

    @property
    def closed(self) -> bool:
        return self._closed.is_set()

    def close(self) -> None:
        """Refuses later calls, and ends the wait for a daemon. May be called again."""
        self._closed.set()

    def check_open(self) -> None:
        """Raises LoadClosedError after `close()`."""
        if self.closed:
            raise errors.LoadClosedError(
                "this client is closed; make another one, with "
                f"StreamerClient({os.fspath(self.socket_dir)!r})"
            )

    @contextmanager
    def _session(self) -> Iterator[Session]:
        """A connection for one call. Raises errors of gRPC as errors of `penstock.client.errors`."""
        import grpc

        from .rpc import Session

        self.check_open()
        with Session(self.socket_dir) as session:
            try:
                yield session
            except grpc.RpcError as error:
                raise session.error(error) from error

    def persist(self, attempt: Callable[[Session, Bar | None], _T], bar_name: str | None = None) -> _T:
        """Returns the result of `attempt`. If the daemon goes away during it, repeats it at the next one. If
        it takes no connection at first, tries again.

        `bar_name` is the label of a progress bar; None shows no bar.
        """
        from .progress import Bar
        from .reconnect import persist

        bar = Bar(bar_name) if bar_name else None

        def once() -> _T:
            sessions: list[Session] = []
            aborted = Latch()

            def work() -> _T:
                with self._session() as session:
                    sessions.append(session)
                    if aborted.is_set():
                        raise errors.closed("")
                    return attempt(session, bar)

            def abort() -> bool:
                aborted.set()
                for session in sessions:
                    session.close()
                return bool(sessions)  # otherwise it may wait for a connection for long

            return shielded(work, abort=abort)

        def sleep(seconds: float) -> None:
            if self._closed.wait(seconds):
                self.check_open()

        try:
            return persist(once, timeout_seconds=self.reconnect_timeout, sleep=sleep)
        finally:
            if bar is not None:
                bar.close()
