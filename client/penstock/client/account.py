"""Counts the tensors and bytes that one load has delivered, and times them. The stats, the progress bar and a
load that goes on at another daemon need this."""

from __future__ import annotations

import os
import time

from .ring.progress import Bar
from .summary import LoadStats


class Account:
    """Starts with the request. The iterating thread writes it, any thread may read it."""

    def __init__(self, *, progress: bool) -> None:
        """Raises ImportError for `progress` if tqdm is missing; the error says what to install."""
        self.tensors = 0
        self.bytes = 0
        self.total_bytes = 0
        self._waited_seconds = 0.0
        self._read_bytes = self._tier_bytes = 0
        self._verified_bytes = 0
        self._started = time.monotonic()
        self._first_tensor: float | None = None
        self._ended: float | None = None
        self._pid = os.getpid()
        self._bar = Bar("load") if progress else None

    @property
    def seconds(self) -> float:
        """From the request to the end, or to now."""
        return (self._ended or time.monotonic()) - self._started

    def begin(self) -> None:
        """The bytes of the next tensors have arrived. Not needed if `add` follows at once."""
        if self._first_tensor is None:
            self._first_tensor = time.monotonic()

    def add(self, tensors: int, size_bytes: int) -> None:
        """So many tensors were delivered."""
        if self._first_tensor is None:
            self._first_tensor = time.monotonic()
        self.tensors += tensors
        self.bytes += size_bytes
        if self._bar is not None:
            self.show()

    def finish(self, waited_seconds: float, read_bytes: int, *, tier_bytes: int, verified_bytes: int) -> None:
        """Adds the times and bytes that a daemon reported for the load, or for its part of it."""
        self._waited_seconds += waited_seconds
        self._read_bytes += read_bytes
        self._verified_bytes += verified_bytes
        self._tier_bytes += tier_bytes

    def show(self) -> None:
        if self._bar is not None and self._pid == os.getpid():
            self._bar.show(self.bytes, self.total_bytes)

    def close(self) -> None:
        """The load has ended. May be called again."""
        if self._ended is None:
            self._ended = time.monotonic()
        if (
            self._bar is not None and self._pid == os.getpid()
        ):  # in a forked child its lock may be held for ever
            self._bar.close()

    def stats(self, *, cache_hit: bool) -> LoadStats:
        first = self._first_tensor
        return LoadStats(
            bytes=self.bytes,
            tensors=self.tensors,
            seconds=self.seconds,
            waited_seconds=self._waited_seconds,
            first_tensor_seconds=None if first is None else first - self._started,
            cache_hit=cache_hit,
            read_bytes=self._read_bytes,
            verified_bytes=self._verified_bytes,
            tier_bytes=self._tier_bytes,
        )
