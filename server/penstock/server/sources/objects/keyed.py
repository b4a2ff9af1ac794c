"""The source of a store whose `--allow` prefixes are prefixes of keys."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from typing import Generic, TypeVar

from .. import Access
from .keys import Kept, check_access
from .service import ObjectSettings
from .source import ObjectSource

K = TypeVar("K", bound=Kept)
S = TypeVar("S")


class KeyedSource(ObjectSource[K], Generic[K, S]):
    """A subclass parses URIs, and connects by its own settings `S`."""

    def __init__(
        self,
        settings: ObjectSettings,
        own: S,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> None:
        """Arguments as for `ObjectSource`. `own` has the settings of the store alone."""
        super().__init__(settings, workers, on_retry)
        self._own = own

    def admitted(self, location: str, access: Access) -> K:
        named = self.parse(location)
        check_access(named, access)
        return named
