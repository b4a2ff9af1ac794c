"""GCS with its threads and flags."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from ...config.options import StoreFlags
from ...config.settings import Config
from ...config.values import Locators
from ..objects import ObjectSettings
from ..objects.store import ObjectStore
from .settings import OPTIONS, GcsSettings, check
from .source import GcsSource


class GcsStore(ObjectStore):
    kind = GcsSource.kind
    schemes = GcsSource.schemes
    flags = StoreFlags(Locators(("gs://",), "a gs:// URI"), OPTIONS, check)

    def make_source(
        self,
        config: Config,
        settings: ObjectSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> GcsSource:
        return GcsSource(settings, GcsSettings.of(config), workers, on_retry)
