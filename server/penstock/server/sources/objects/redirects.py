"""Remembers the targets of redirects for a while. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

REMEMBERED_SECONDS = 300.0
REMEMBERED_BYTES = 4 << 20
"""Of all URLs together, and what was asked for them: some 10,000 of the usual length."""
_ENTRY_BYTES = 300
"""What an entry takes besides its texts."""


class Redirects:
    """Targets by what was requested. Old ones do not count. If there are too many, the oldest are dropped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._led: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._bytes = 0

    @property
    def remembered_bytes(self) -> int:
        return self._bytes

    def get(self, asked: str) -> str | None:
        with self._lock:
            url, until = self._led.get(asked, ("", 0.0))
        return url if time.monotonic() < until else None

    def lead(self, asked: str, url: str) -> None:
        with self._lock:
            self._drop(asked)
            self._led[asked] = url, time.monotonic() + REMEMBERED_SECONDS
            self._bytes += _ENTRY_BYTES + len(asked) + len(url)
            while self._bytes > REMEMBERED_BYTES:
                self._drop(next(iter(self._led)))

    def forget(self, asked: str) -> None:
        with self._lock:
            self._drop(asked)

    def _drop(self, asked: str) -> None:
        url, _ = self._led.pop(asked, (None, 0.0))
        if url is not None:
            self._bytes -= _ENTRY_BYTES + len(asked) + len(url)
