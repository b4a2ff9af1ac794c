"""An object store with its threads. Each store has its own, so it holds up no other."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from typing import Any

from ...config.settings import Config
from ...system.counts import RETRY_REASONS
from ...system.fair import FIRST_CALLS, FairExecutor
from ..store import Reading, Store
from .service import ObjectSettings
from .source import ObjectSource

HEADER_READERS = 36
RESOLVERS = 64
"""More than for files, because each may have to wait for a store that does not answer."""
SPARE_READERS = 64
"""Few are enough: a request that stalls has a timeout, so it leaves its thread sooner or later."""


class ObjectStore(Store):
    """A subclass has the store's name, and makes its source."""

    source: ObjectSource[Any]

    def __init__(self, config: Config) -> None:
        self.reading = Reading(
            threads=config.object_concurrency,
            spare_threads=SPARE_READERS,
            block_bytes=config.object_block_bytes,
            may_hang=False,
            thread_name=f"{self.kind}-reader",
        )
        self._openers = FairExecutor(HEADER_READERS, f"{self.kind}-header", first_calls=FIRST_CALLS)
        self._resolvers = FairExecutor(RESOLVERS, f"{self.kind}-resolver", first_calls=FIRST_CALLS)
        self._retries = Counter(dict.fromkeys(RETRY_REASONS, 0))
        self.source = self.make_source(
            config,
            ObjectSettings.of(config),
            self._openers.of,
            lambda reason: self._retries.update([reason]),
        )

    @abstractmethod
    def make_source(
        self,
        config: Config,
        settings: ObjectSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> ObjectSource[Any]:
        """The last three arguments are for `ObjectSource`."""

    def resolvers(self, location: str, uid: int) -> Executor:
        return self._resolvers.of(uid)

    def retries(self) -> Mapping[str, int]:
        return self._retries.copy()

    def stop(self) -> None:
        self.source.stop()

    def shutdown(self) -> None:
        self._resolvers.shutdown()
        self._openers.shutdown()
