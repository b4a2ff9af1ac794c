"""`s3://bucket/key` and who may read it. Pure.

A key is text, not a path and not part of a URL: nothing in it is decoded or normalised, as in the AWS tools.
Only `?versionId=` at its end is special.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import AccessDeniedError, InvalidRequestError
from .. import Access

SCHEME = "s3://"
MAX_KEY_BYTES = 1024
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}", re.ASCII)
_ARN = re.compile(r"arn:[^:]*:[^:]*:.*", re.DOTALL | re.IGNORECASE)
_DIRECTORY_BUCKET = re.compile(r".+--(x|xa)-s3", re.DOTALL)
_VERSION = re.compile(r"[A-Za-z0-9._~+=-]{1,1024}", re.ASCII)
_VERSION_MARK = "?versionId="


@dataclass(frozen=True, slots=True)
class Location:
    """A bucket, an object, a version of one, or what begins with the same key."""

    bucket: str
    key: str
    version_id: str | None = None

    @property
    def uri(self) -> str:
        version = "" if self.version_id is None else _VERSION_MARK + self.version_id
        return f"{SCHEME}{self.bucket}/{self.key}{version}"

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]


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
    try:
        key_bytes = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"sources: {uri[:200]!r} is no text; write it in UTF-8") from None
    if "\0" in key:
        raise InvalidRequestError(f"sources: {uri[:200]!r} holds a NUL character; remove it")
    if key_bytes > MAX_KEY_BYTES:
        raise InvalidRequestError(
            f"sources: {uri[:200]!r}… has a key of {key_bytes} bytes; S3 has none above "
            f"{MAX_KEY_BYTES}; name a shorter one"
        )
    return Location(bucket, key, version_id)


def _refuse_other_kinds(bucket: str) -> None:
    """Of what the AWS tools take in the place of a bucket."""
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


def check_access(location: Location, access: Access) -> None:
    """Raises AccessDeniedError unless the caller may read there.

    A prefix allows the key that it is and what lies below it, at a `/`. Keys with a `.` or `..` segment mean
    themselves to S3, but not to every proxy or store that calls itself compatible: they are for privileged
    callers.
    """
    if access.privileged:
        return
    if {".", ".."} & set(location.key.split("/")):
        raise AccessDeniedError(
            f"uid {access.uid} may not load {location.uri}: its key has a '.' or '..' between slashes; "
            "rename the object",
            file=location.uri,
        )
    for prefix in access.prefixes:
        if prefix.startswith(SCHEME) and _holds(prefix, location):
            return
    raise AccessDeniedError(
        f"uid {access.uid} may not load {location.uri}: penstockd has no --allow prefix that holds it; start "
        "it with one",
        file=location.uri,
    )


def _holds(prefix: str, location: Location) -> bool:
    bucket, _, top = prefix.removeprefix(SCHEME).partition("/")
    top = top.rstrip("/")
    if bucket != location.bucket:
        return False
    return not top or location.key == top or location.key.startswith(top + "/")
