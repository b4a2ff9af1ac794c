"""`az://` and `abfss://` URIs as a source."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from ..objects import ObjectSettings
from ..objects.keyed import KeyedSource
from ..objects.service import ObjectService
from .location import SUFFIXES, Location, parse
from .settings import AzureSettings


class AzureSource(KeyedSource[Location, AzureSettings]):
    """`az://` and `abfss://` URIs."""

    kind = "azure"
    schemes = ("az", "abfss")

    def __init__(
        self,
        settings: ObjectSettings,
        own: AzureSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> None:
        """Arguments as for `ObjectSource`; `own` are the settings of Azure alone."""
        super().__init__(settings, own, workers, on_retry)
        self._suffixes = frozenset({*SUFFIXES, own.suffix})

    def parse(self, uri: str) -> Location:
        return parse(uri, self._suffixes)

    def is_version(self, location: Location) -> bool:
        return False

    def as_directory(self, location: Location) -> Location:
        return replace(location, key=location.key + "/")

    def connect(self) -> ObjectService[Location]:
        from .account import Account

        return Account(self._own, self._settings.timeout_seconds)
