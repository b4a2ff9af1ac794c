"""Where long headers and indexes are gathered until all their bytes are there, so that no child process waits
for storage.

A spool is a memfd: a child gets it as it is, and no file is left behind. Spools share a budget of bytes. Who
finds no room waits, and is served when the longest-waiting user's turn comes, not in the order of files: a
user whose storage hangs or trickles delays another by one header, however many it has waiting.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ..config.units import show_size
from ..errors import TooManyLoadsError
from ..system.headroom import levels
from ..system.quota import Quota

SPOOL_BYTES = 128 << 20
"""Of all spools together: room for one header of 100 MB, the longest there are, for any user."""

SPARE_BYTES = 16 << 20
"""What the machine and the control group must have left beside a spool. Without it the kernel might end the
daemon, where a child would not yet be there to be ended first."""


class Spools:
    """Every thread may use it."""

    def __init__(self, total_bytes: int = SPOOL_BYTES) -> None:
        # Nothing is set aside for newcomers: they wait in turn, and the largest header has to fit.
        self._quota = Quota(total_bytes, newcomers=0)
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        """Of each that waits: a number, and its uid."""
        self._numbers = itertools.count()
        self._turns: Counter[int] = Counter()
        """When each user was served last, as a count of all that were served."""

    @property
    def used_bytes(self) -> int:
        return self._quota.used

    @contextmanager
    def open(self, uid: int, size_bytes: int, *, give_up_at: float) -> Iterator[int]:
        """The descriptor of an empty spool for so many bytes. Waits until `give_up_at` (of the monotonic
        clock). Raises TooManyLoadsError where there is no room by then, or no memory."""
        self._take(uid, size_bytes, give_up_at)
        try:
            left = min(level.left_bytes for level in levels())
            if left < size_bytes + SPARE_BYTES:
                raise TooManyLoadsError(
                    f"a header or index of {show_size(size_bytes)} cannot be read: the machine or the "
                    f"control group has {show_size(max(0, left))} of memory left for penstockd; raise the "
                    "limit, lower --memory-limit, or try again later"
                )
            fd = os.memfd_create("penstock-header", os.MFD_CLOEXEC)
            try:
                yield fd
            finally:
                os.close(fd)
        finally:
            with self._changed:
                self._quota.release(uid, size_bytes)
                self._remove_idle(uid)
                self._changed.notify_all()

    def _take(self, uid: int, size_bytes: int, give_up_at: float) -> None:
        with self._changed:
            me = next(self._numbers), uid
            self._waiting.append(me)
            try:
                while self._first() != me or not self._quota.take(uid, size_bytes):
                    patience_seconds = min(give_up_at - time.monotonic(), threading.TIMEOUT_MAX)
                    if not self._changed.wait(patience_seconds):
                        raise TooManyLoadsError(
                            f"a header or index of {show_size(size_bytes)} found no room: others take "
                            f"{show_size(self._quota.used)} of {show_size(self._quota.total)}; try again "
                            "later"
                        )
                self._turns[uid] = max(self._turns.values(), default=0) + 1
            finally:
                self._waiting.remove(me)
                self._remove_idle(uid)
                self._changed.notify_all()

    def _remove_idle(self, uid: int) -> None:
        """A user that has nothing and waits for nothing."""
        if not self._quota.used_by(uid) and all(waiting != uid for _, waiting in self._waiting):
            self._turns.pop(uid, None)

    def _first(self) -> tuple[int, int]:
        """The next to be served."""
        return min(self._waiting, key=lambda waiting: (self._turns[waiting[1]], waiting[0]))
