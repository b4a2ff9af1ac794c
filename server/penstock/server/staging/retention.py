"""Why an entry stays in the staging buffer when nobody holds it, and under which names. Pure.

An operator pins it. A warm set names it, and may pin it too. Anything else that is full stays only until
others need its memory.
"""

from __future__ import annotations

MAX_NAMES = 16
"""How many names for the same files are remembered of one checkpoint."""


class Retention:
    """Of one entry."""

    def __init__(self, sources: tuple[str, ...]) -> None:
        """`sources` are those that the entry is staged as."""
        self.names = [sources]
        """Names under which it was staged or pinned. Several may mean the same files."""
        self.ends_when_left = False
        """An operator evicted it: nothing keeps it once its last holder has left."""
        self._pinned = False
        self._wishes: dict[str, bool] = {}
        """Names of the warm set that it is kept for, and whether each pins it."""

    @property
    def pinned(self) -> bool:
        """It is evicted for nobody's memory."""
        return self._pinned or any(self._wishes.values())

    @property
    def wanted(self) -> bool:
        """A warm set names it: it is evicted after what is warm by chance."""
        return bool(self._wishes)

    def wanted_as(self, name: str) -> bool:
        """The warm set names it so."""
        return name in self._wishes

    def pin(self, sources: tuple[str, ...]) -> None:
        """Keeps the entry until it is evicted, and adds `sources` to its names."""
        self._pinned, self.ends_when_left = True, False
        self._call(sources)

    def want(self, name: str, sources: tuple[str, ...], *, pin: bool) -> None:
        """A warm set names it, until `unwant` or `unpin`. `sources` are what it is staged as there."""
        self._wishes[name], self.ends_when_left = pin, False
        self._call(sources)

    def unwant(self, name: str) -> bool:
        """The warm set does not name it so any more. Returns whether it did."""
        return self._wishes.pop(name, None) is not None

    def unpin(self) -> None:
        """From now on it may be evicted for others. Nothing keeps it once its last holder has left."""
        self._pinned, self.ends_when_left = False, True
        self._wishes.clear()

    def _call(self, sources: tuple[str, ...]) -> None:
        if sources not in self.names:
            self.names = [*self.names[: MAX_NAMES - 1], sources]
