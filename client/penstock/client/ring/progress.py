"""Progress for people: a bar of bytes, and a line in the log while a load waits in the queue."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

from .mapping import leased_bytes

if TYPE_CHECKING:
    from tqdm.auto import tqdm

    from penstock.v1 import streamer_pb2 as pb

QUEUE_LOG = "penstock.client.queue"
_log = logging.getLogger(QUEUE_LOG)


class Bar:
    """A bar on stderr that counts bytes, from the first `show` to `close`."""

    def __init__(self, what: str) -> None:
        """Raises ImportError if tqdm is missing."""
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install tqdm") from error
        self._make = functools.partial(tqdm, desc=what, unit="B", unit_scale=True)
        self._bar: tqdm[None] | None = None

    def show(self, done_bytes: int, total_bytes: int) -> None:
        if self._bar is None:
            self._bar = self._make(total=total_bytes)
        self._bar.total = total_bytes
        self._bar.update(done_bytes - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def tell_queued(queued: pb.Queued) -> None:
    """Logs the load's place in the queue. Warns a process that waits for memory which it holds itself."""
    own = leased_bytes()
    _log.log(
        logging.WARNING if own else logging.INFO,
        "load %s: waiting for staging memory, place %d: %s%s",
        queued.load_id or "?",
        queued.place,
        queued.reason or "no reason given",
        f" (tensors that this process still holds keep {own} bytes of it)" if own else "",
    )
