"""`gs://` URIs as a source."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from .. import Access
from ..objects import ObjectSettings, ObjectSource
from ..objects.keys import check_access
from ..objects.service import ObjectService
from .location import Location, parse
from .settings import GcsSettings


class GcsSource(ObjectSource[Location]):
    """`gs://` URIs."""

    kind = "gcs"
    schemes = ("gs",)

    def __init__(
        self,
        settings: ObjectSettings,
        own: GcsSettings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> None:
        """Arguments as for `ObjectSource`; `own` are the settings of GCS alone."""
        super().__init__(settings, workers, on_retry)
        self._own = own

    def parse(self, uri: str) -> Location:
        return parse(uri)

    def admitted(self, location: str, access: Access) -> Location:
        named = self.parse(location)
        check_access(named, access)
        return named

    def is_version(self, location: Location) -> bool:
        return location.generation is not None

    def as_directory(self, location: Location) -> Location:
        return Location(location.bucket, location.key + "/")

    def connect(self) -> ObjectService[Location]:
        from .account import Account

        return Account(self._own, self._settings.timeout_seconds)
