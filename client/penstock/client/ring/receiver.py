"""The messages of one call, received on a thread of their own.

gRPC does not stand an exception in the middle of its own Python code: its locks stay held, and the process
hangs or is aborted. Signal handlers raise on the main thread, as Ctrl-C does, so that thread only takes
messages from a queue. Some are received ahead, which costs no time between two of them.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

from penstock.v1 import streamer_pb2 as pb

from ..system.shield import start_thread

AHEAD = 4
"""Messages that wait to be taken. A message has half a megabyte at most."""


class Receiver:
    """Every thread may use it, one at a time. The thread ends with the call."""

    def __init__(self) -> None:
        self._came: queue.SimpleQueue[pb.LoadResponse | BaseException | None] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(AHEAD):
            self._room.put(None)

    def start(self, begin: Callable[[], Iterator[pb.LoadResponse]]) -> None:
        """`begin` begins the call, on that thread. Raises RuntimeError if no thread can be started."""
        start_thread(_receive, begin, self._came, self._room)

    def next(self) -> pb.LoadResponse | None:
        """Waits for a message, None after the last. Raises what `begin` or the call raised. At the end of the
        call it does the same again."""
        came = self._came.get()
        if isinstance(came, pb.LoadResponse):
            self._room.put(None)
            return came
        self._came.put(came)
        if came is None:
            return None
        try:
            raise came
        finally:
            del came  # or it and this frame would keep each other

    def stop(self) -> None:
        """Lets it receive what is left, which is soon over: the call is being cancelled."""
        for _ in range(AHEAD):
            self._room.put(None)


def _receive(
    begin: Callable[[], Iterator[pb.LoadResponse]],
    came: queue.SimpleQueue[pb.LoadResponse | BaseException | None],
    room: queue.SimpleQueue[None],
) -> None:
    try:
        for message in begin():
            room.get()
            came.put(message)
        came.put(None)
    except BaseException as error:
        came.put(error.with_traceback(None))  # or it and this frame would keep each other
