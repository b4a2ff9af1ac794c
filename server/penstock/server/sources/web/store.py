"""Web servers with their threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from ...config.options import StoreFlags
from ...config.settings import Config
from ...config.values import Locators
from ..objects import ObjectSettings
from ..objects.reach import SCHEMES, prefix
from ..objects.store import ObjectStore
from .source import WebSource


class WebStore(ObjectStore):
    kind = WebSource.kind
    schemes = WebSource.schemes
    flags = StoreFlags(Locators(SCHEMES, "an https:// URL", prefix))

    def make_source(
        self,
        config: Config,
        settings: ObjectSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> WebSource:
        return WebSource(settings, workers, on_retry)
