"""`gs://` URIs as a source."""

from __future__ import annotations

from ..objects.keyed import KeyedSource
from ..objects.service import ObjectService
from .location import Location, parse
from .settings import GcsSettings


class GcsSource(KeyedSource[Location, GcsSettings]):
    """`gs://` URIs."""

    kind = "gcs"
    schemes = ("gs",)

    def parse(self, uri: str) -> Location:
        return parse(uri)

    def is_version(self, location: Location) -> bool:
        return location.generation is not None

    def as_directory(self, location: Location) -> Location:
        return Location(location.bucket, location.key + "/")

    def connect(self) -> ObjectService[Location]:
        from .account import Account

        return Account(self._own, self._settings.timeout_seconds)
