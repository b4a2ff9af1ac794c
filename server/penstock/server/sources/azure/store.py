"""Azure Blob Storage with its threads and flags."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from ...config.options import StoreFlags
from ...config.settings import Config
from ...config.values import Locators
from ..objects import ObjectSettings
from ..objects.store import ObjectStore
from .settings import OPTIONS, AzureSettings
from .source import AzureSource


class AzureStore(ObjectStore):
    kind = AzureSource.kind
    schemes = AzureSource.schemes
    flags = StoreFlags(Locators(("az://", "abfss://"), "an az:// or abfss:// URI"), OPTIONS)

    def make_source(
        self,
        config: Config,
        settings: ObjectSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> AzureSource:
        return AzureSource(settings, AzureSettings.of(config), workers, on_retry)
