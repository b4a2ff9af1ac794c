"""Which local files are copied into the tier: those below a prefix of `--tier-files`, and those of entries of
the warm set that ask for it."""

from __future__ import annotations

from collections.abc import Iterable


class TierFiles:
    """Every thread may ask it."""

    def __init__(self, prefixes: Iterable[str]) -> None:
        self._prefixes = _tops(prefixes)
        self._named: tuple[str, ...] = ()

    def name(self, paths: Iterable[str]) -> None:
        """From now on these files and directories, too, instead of those that were named before."""
        self._named = _tops(paths)

    def cover(self, path: str) -> bool:
        return any(path == top or path.startswith(f"{top}/") for top in (*self._prefixes, *self._named))


def _tops(paths: Iterable[str]) -> tuple[str, ...]:
    return tuple(path.rstrip("/") for path in paths)
