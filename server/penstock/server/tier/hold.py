"""A hold on one version that is kept, for an open file and for who has its bytes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol

from .version import Version
from .writing import WriterThreads


class Holding(Protocol):
    """The tier, as its holds need it."""

    off_because: str

    @property
    def writers(self) -> WriterThreads: ...

    def take(self, version: Version) -> None:
        """One more use of it."""

    def give_back(self, version: Version) -> None:
        """One use less."""

    def pin(self, version: Version, step: int) -> None: ...


class Hold:
    """See `sources.kept.Keep`."""

    def __init__(self, tier: Holding, version: Version) -> None:
        """Takes over one use of the version."""
        self.version = version
        self._tier = tier
        self._lock = threading.Lock()
        self._released = self._pinned = False

    def again(self) -> Hold:
        """Another hold on the same."""
        self._tier.take(self.version)
        return Hold(self._tier, self.version)

    @property
    def keeps_more(self) -> bool:
        return not self._tier.off_because and self.version.has_room

    def missing(self, start: int, end: int) -> tuple[int, int] | None:
        return None if self._tier.off_because else self.version.missing(start, end)

    def write(
        self,
        start: int,
        end: int,
        views: Sequence[memoryview],
        copied: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        self._tier.writers.write(self.version, start, end, views, copied, done)

    def write_copy(self, start: int, views: Sequence[memoryview]) -> None:
        """Keeps bytes that the caller needs back at once, unless too many wait already."""
        self._tier.writers.write_copy(self.version, start, views)

    def pin(self, pinned: bool) -> None:
        with self._lock:
            if pinned != self._pinned:
                self._pinned = pinned
                self._tier.pin(self.version, 1 if pinned else -1)

    def release(self) -> None:
        self.pin(False)
        self.rest()

    def rest(self) -> None:
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self._tier.give_back(self.version)
