"""`az://` and `abfss://` URIs as a source."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import replace

from .. import Access
from ..objects import ObjectSettings, ObjectSource
from ..objects.keys import check_access
from ..objects.service import ObjectService
from .location import SUFFIXES, Location, parse
from .settings import AzureSettings


class AzureSource(ObjectSource[Location]):
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
        super().__init__(settings, workers, on_retry)
        self._own = own
        self._suffixes = frozenset({*SUFFIXES, own.suffix})

    def parse(self, uri: str) -> Location:
        return parse(uri, self._suffixes)

    def admitted(self, location: str, access: Access) -> Location:
        named = self.parse(location)
        check_access(named, access)
        return named

    def is_version(self, location: Location) -> bool:
        return False

    def as_directory(self, location: Location) -> Location:
        return replace(location, key=location.key + "/")

    def connect(self) -> ObjectService[Location]:
        from .account import Account

        return Account(self._own, self._settings.timeout_seconds)
