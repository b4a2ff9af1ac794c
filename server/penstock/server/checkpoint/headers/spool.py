"""Spools: long headers and indexes are gathered in them until all their bytes are there, so that no child
process waits for storage.

A spool is a memfd: a child inherits it, and no file is left behind. Spools share a budget of bytes. A load
for which no bytes are left waits. Users are served in turn, longest wait first, and not in the order of
files: a user whose storage hangs or trickles delays another by one header, however many it has waiting.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from ...config.units import show_size
from ...errors import TooManyLoadsError
from ...system.headroom import levels
from ...system.quota import Quota

SPOOL_BYTES = 128 << 20
"""Most bytes of all spools together: enough for one header of 100 MB, the longest possible, for any user."""

SPARE_BYTES = 16 << 20
"""Memory that the machine and the control group must have left beside a spool. Without it the kernel might
end the daemon while no child exists that it would end first."""


class Spools:
    """Thread-safe."""

    def __init__(self, total_bytes: int = SPOOL_BYTES) -> None:
        # No share is reserved for new users: they wait in turn, and the largest header must fit.
        self._quota = Quota(total_bytes, newcomers=0)
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int]] = []
        """For each waiting load a number, and its uid."""
        self._numbers = itertools.count()
        self._turns: Counter[int] = Counter()
        """For each user the number of grants, over all users, when it was served last."""

    @property
    def used_bytes(self) -> int:
        return self._quota.used

    @contextmanager
    def open(self, uid: int, size_bytes: int, *, give_up_at: float) -> Iterator[int]:
        """The descriptor of an empty spool for so many bytes. Waits until `give_up_at` (of the monotonic
        clock). Raises TooManyLoadsError if no bytes are free by then, or no memory is left."""
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
                            f"no memory is free for a header or index of {show_size(size_bytes)}: others use "
                            f"{show_size(self._quota.used)} of {show_size(self._quota.total)}; try again "
                            "later"
                        )
                self._turns[uid] = max(self._turns.values(), default=0) + 1
            finally:
                self._waiting.remove(me)
                self._remove_idle(uid)
                self._changed.notify_all()

    def _remove_idle(self, uid: int) -> None:
        """Forgets a user that has no spool and waits for none."""
        if not self._quota.used_by(uid) and all(waiting != uid for _, waiting in self._waiting):
            self._turns.pop(uid, None)

    def _first(self) -> tuple[int, int]:
        """The load that is served next."""
        return min(self._waiting, key=lambda waiting: (self._turns[waiting[1]], waiting[0]))
