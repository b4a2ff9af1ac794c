"""`s3://` URIs as a source."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

from .. import Access
from ..objects import ObjectSettings, ObjectSource
from ..objects.keys import check_access
from ..objects.service import ObjectService
from .location import Location, parse
from .settings import S3Settings


class S3Source(ObjectSource[Location]):
    """`s3://` URIs."""

    kind = "s3"
    schemes = ("s3",)
    descriptors_per_file = 0  # connections are kept by `S3Settings.connections`

    def __init__(
        self,
        settings: ObjectSettings,
        own: S3Settings,
        workers: Callable[[int], Executor],
        on_retry: Callable[[str], None],
    ) -> None:
        """Arguments as for `ObjectSource`; `own` are the settings of S3 alone."""
        super().__init__(settings, workers, on_retry)
        self._own = own

    def parse(self, uri: str) -> Location:
        return parse(uri)

    def admitted(self, location: str, access: Access) -> Location:
        named = self.parse(location)
        check_access(named, access)
        return named

    def is_version(self, location: Location) -> bool:
        return location.version_id is not None

    def as_directory(self, location: Location) -> Location:
        return Location(location.bucket, location.key + "/")

    def connect(self) -> ObjectService[Location]:
        from .account import Account

        return Account(self._own)
