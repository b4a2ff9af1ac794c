"""Remembers the targets of redirects for a while. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

REMEMBERED_SECONDS = 300.0
REMEMBERED_REDIRECTS = 10_000

K = TypeVar("K", bound=Hashable)


class Redirects(Generic[K]):
    """Targets by what was requested. Old ones do not count. If there are too many, the oldest are dropped."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._led: OrderedDict[K, tuple[str, float]] = OrderedDict()

    def get(self, asked: K) -> str | None:
        with self._lock:
            url, until = self._led.get(asked, ("", 0.0))
        return url if time.monotonic() < until else None

    def lead(self, asked: K, url: str) -> None:
        with self._lock:
            self._led[asked] = url, time.monotonic() + REMEMBERED_SECONDS
            self._led.move_to_end(asked)
            if len(self._led) > REMEMBERED_REDIRECTS:
                self._led.popitem(last=False)

    def forget(self, asked: K) -> None:
        with self._lock:
            self._led.pop(asked, None)
