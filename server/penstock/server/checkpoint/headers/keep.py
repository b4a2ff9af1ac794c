"""Parsed headers and indexes: one object for each version of a file, for as long as it is used or cached.

Each user of such an object is charged for it once, however many loads of that user share it. Objects that
nobody uses stay cached as long as there is memory left beside those in use.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from weakref import WeakValueDictionary

from .budget import Budget, Charge
from .index import Index
from .table import Header

Parsed = Header | Index

PARSED_BYTES = 80 << 20
"""Most bytes of all headers and indexes in use or cached: some 1,300,000 tensors."""
CACHED_BYTES = 32 << 20
"""Most bytes of the cached ones: some 400,000 tensors."""


class Kept:
    """One user's use of a parsed object. Ends when nothing refers to it."""

    __slots__ = ("__weakref__", "charge", "parsed")

    def __init__(self, parsed: Parsed, charge: Charge) -> None:
        self.parsed = parsed
        self.charge = charge

    @property
    def header(self) -> Header:
        assert isinstance(self.parsed, Header)
        return self.parsed

    @property
    def index(self) -> Index:
        assert isinstance(self.parsed, Index)
        return self.parsed


class Keep:
    """Thread-safe."""

    def __init__(self, total_bytes: int = PARSED_BYTES, cached_bytes: int = CACHED_BYTES) -> None:
        self.budget = Budget(total_bytes, make_room=self._make_room)
        self._most_cached_bytes = cached_bytes
        self._lock = threading.Lock()
        self._cache: OrderedDict[str, Parsed] = OrderedDict()
        self._cached_bytes = 0
        self._used: WeakValueDictionary[tuple[int, str], Kept] = WeakValueDictionary()
        self._latest: WeakValueDictionary[str, Kept] = WeakValueDictionary()
        """One user's use of each version, for other loads to share."""

    @property
    def cached_bytes(self) -> int:
        return self._cached_bytes

    def find(self, uid: int, version: str) -> Kept | None:
        """The object for that version of a file, if there is one. Raises as `Charge.resize` does."""
        with self._lock:
            kept = self._used.get((uid, version))
            if kept is not None:
                return kept
            parsed = self._cached(version)
        return None if parsed is None else self.add(uid, version, parsed, self.budget.charge(uid))

    def add(self, uid: int, version: str, parsed: Parsed, charge: Charge) -> Kept:
        """Keeps it for the user of `charge`. Raises as `Charge.resize` does."""
        charge.resize(parsed.size_bytes)
        with self._lock:
            kept = self._used.get((uid, version))
            if kept is None:
                parsed = self._cached(version) or parsed  # another thread may have been faster
                kept = self._used[uid, version] = self._latest[version] = Kept(parsed, charge)
                self._put(version, parsed)
        return kept

    def forget(self, version: str) -> None:
        """Later loads read that version anew: what was read of it was damaged on its way."""
        with self._lock:
            old = self._cache.pop(version, None)
            if old is not None:
                self._cached_bytes -= old.size_bytes
            self._latest.pop(version, None)
            for key in [key for key in self._used if key[1] == version]:
                self._used.pop(key, None)

    def _cached(self, version: str) -> Parsed | None:
        if version in self._cache:
            self._cache.move_to_end(version)
            return self._cache[version]
        latest = self._latest.get(version)
        return None if latest is None else latest.parsed

    def _put(self, version: str, parsed: Parsed) -> None:
        if version not in self._cache and parsed.size_bytes <= self._most_cached_bytes:
            self._cache[version] = parsed
            self._cached_bytes += parsed.size_bytes
            self._shrink(self._most_cached_bytes)

    def _make_room(self, used_bytes: int) -> None:
        # An object that is both in use and cached counts twice, so it leaves the cache sooner than necessary.
        with self._lock:
            self._shrink(self.budget.total_bytes - used_bytes)

    def _shrink(self, most_bytes: int) -> None:
        while self._cached_bytes > most_bytes:
            _, old = self._cache.popitem(last=False)
            self._cached_bytes -= old.size_bytes
