"""Answers that stay valid for a while or for ever."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Slot(Generic[V]):
    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.value: V | None = None
        self.until = 0.0
        self.weight = 0


class Memo(Generic[K, V]):
    """Values by key. One thread finds out a value while others that want it wait. When there are too many,
    the least recently used are dropped. Thread-safe."""

    def __init__(self, most: int, weigh: Callable[[V], int] = lambda value: 1) -> None:
        """Keeps at most `most` together, as `weigh` counts; but the last one is kept, whatever its weight."""
        self._most = most
        self._weigh = weigh
        self._lock = threading.Lock()
        self._slots: OrderedDict[K, _Slot[V]] = OrderedDict()
        self._weight = 0

    def get(self, key: K, find_out: Callable[[], tuple[V, float]]) -> V:
        """`find_out` returns a value, and until when it is valid, by the monotonic clock."""
        with self._lock:
            slot = self._slots.setdefault(key, _Slot())
            self._slots.move_to_end(key)
        with slot.lock:
            if slot.value is None or time.monotonic() >= slot.until:
                try:
                    slot.value, slot.until = find_out()
                except BaseException:
                    self._remove(key, slot)
                    raise
                self._count(key, slot, self._weigh(slot.value))
            return slot.value

    def replace(self, key: K, value: V, new: V | None, until: float = 0.0) -> None:
        """Replaces a value, unless another was found out meanwhile. A `new` of None drops it."""
        with self._lock:
            slot = self._slots.get(key)
        if slot is not None:
            with slot.lock:
                if slot.value == value:
                    slot.value, slot.until = new, until
                    self._count(key, slot, 0 if new is None else self._weigh(new))

    def forget(self, key: K) -> None:
        with self._lock:
            slot = self._slots.get(key)
        if slot is not None:
            self._remove(key, slot)

    def _remove(self, key: K, slot: _Slot[V]) -> None:
        with self._lock:
            if self._slots.get(key) is slot:
                del self._slots[key]
                self._weight -= slot.weight

    def _count(self, key: K, slot: _Slot[V], weight: int) -> None:
        with self._lock:
            if self._slots.get(key) is not slot:  # it was dropped meanwhile, as the least recently used
                return
            self._weight += weight - slot.weight
            slot.weight = weight
            while len(self._slots) > 1 and self._weight > self._most:
                _, oldest = self._slots.popitem(last=False)
                self._weight -= oldest.weight
