"""The Hub with its threads."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection
from concurrent.futures import Executor
from typing import TYPE_CHECKING

from ...config.options import StoreFlags
from ...config.settings import Config
from ...config.values import Locators
from ...system.quota import Quota
from ..file.local_file import FileContext
from ..file.store import FileStore
from ..objects import ObjectSettings
from ..objects.store import ObjectStore
from .location import SCHEME, allowed

if TYPE_CHECKING:
    from .source import HubSource


class HubStore(ObjectStore):
    kind = "hub"
    schemes = ("hf",)
    flags = StoreFlags(Locators((SCHEME,), "an hf:// URI", allowed))

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._files: FileStore | None = None
        """The machine's part of files in the local cache. Made when the first file is looked for there."""
        self._descriptors: Quota | None = None
        super().__init__(config)

    def make_source(
        self,
        config: Config,
        settings: ObjectSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> HubSource:
        from .source import HubSource  # which needs msgspec: `penstockd --help` works without

        return HubSource(settings, self._context, workers, on_retry)

    def charge_to(self, descriptors: Quota) -> None:
        self._descriptors = descriptors

    def asked_since(self) -> Collection[tuple[str, float]]:
        return () if self._files is None else self._files.asked_since()

    def shutdown(self) -> None:
        super().shutdown()
        if self._files is not None:
            self._files.shutdown()

    def _context(self) -> FileContext:
        with self._lock:
            if self._files is None:
                self._files = FileStore(self._config)
                if self._descriptors is not None:
                    self._files.charge_to(self._descriptors)
            return self._files.context
