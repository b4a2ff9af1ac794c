"""`s3://bucket/key`. Keys are literal, except for `?versionId=` at the end. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import InvalidRequestError
from ..objects.keys import check_key

SCHEME = "s3://"
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", re.ASCII)
_ARN = re.compile(r"arn:[^:]*:[^:]*:.*", re.DOTALL | re.IGNORECASE)
_DIRECTORY_BUCKET = re.compile(r".+--(x|xa)-s3", re.DOTALL)
_VERSION = re.compile(r"[A-Za-z0-9._~+=-]{1,1024}", re.ASCII)
_VERSION_MARK = "?versionId="


@dataclass(frozen=True, slots=True)
class Location:
    """A bucket, an object, a version of one, or all keys that begin with a prefix."""

    bucket: str
    key: str
    version_id: str | None = None

    @property
    def uri(self) -> str:
        version = "" if self.version_id is None else _VERSION_MARK + self.version_id
        return f"{SCHEME}{self.bucket}/{self.key}{version}"

    @property
    def root(self) -> str:
        return f"{SCHEME}{self.bucket}/"


def parse(uri: str) -> Location:
    """Raises InvalidRequestError."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    _refuse_other_kinds(bucket)
    if not uri.startswith(SCHEME) or not _BUCKET.fullmatch(bucket):
        raise InvalidRequestError(f"sources: {uri[:200]!r} is not of the form s3://bucket/key; write it so")
    version_id = None
    if _VERSION_MARK in key:
        key, _, version_id = key.rpartition(_VERSION_MARK)
        if not key or not _VERSION.fullmatch(version_id):
            raise InvalidRequestError(
                f"sources: {uri[:200]!r} ends in no version id of an object; correct it"
            )
    check_key(uri, key, "S3")
    return Location(bucket, key, version_id)


def _refuse_other_kinds(bucket: str) -> None:
    """Refuses other kinds of names that the AWS tools accept as buckets."""
    if _ARN.fullmatch(bucket):
        raise InvalidRequestError(
            f"sources: {bucket[:200]!r} is an ARN, which penstockd takes for no bucket; write the access "
            "point's alias, which ends in -s3alias and works wherever a bucket does, or the bucket's name"
        )
    if _DIRECTORY_BUCKET.fullmatch(bucket):
        raise InvalidRequestError(
            f"sources: {bucket[:200]!r} is a directory bucket of S3 Express, which wants sessions that "
            "penstockd does not open; copy the checkpoint to a general purpose bucket"
        )
