"""`s3://` URIs as a source."""

from __future__ import annotations

from types import MappingProxyType

from ..objects.keyed import KeyedSource
from ..objects.service import ObjectService
from .location import Location, parse
from .settings import S3Settings


class S3Source(KeyedSource[Location, S3Settings]):
    """`s3://` URIs."""

    kind = "s3"
    schemes = ("s3",)
    descriptors_per_file = 0  # connections are kept by `S3Settings.connections`
    checksum_headers = MappingProxyType({"x-amz-checksum-mode": "ENABLED"})

    def parse(self, uri: str) -> Location:
        return parse(uri)

    def is_version(self, location: Location) -> bool:
        return location.version_id is not None

    def as_directory(self, location: Location) -> Location:
        return Location(location.bucket, location.key + "/")

    def connect(self) -> ObjectService[Location]:
        from .account import Account

        return Account(self._own)
