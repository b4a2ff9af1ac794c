"""`gs://bucket/key`. Keys are literal, except for `#GENERATION` at the end, as in gsutil. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ...errors import InvalidRequestError
from ..objects.keys import check_key

SCHEME = "gs://"
_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{0,221}", re.ASCII)
_GENERATION = re.compile(r"(.+)#([0-9]{1,19})", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class Location:
    """A bucket, an object, a generation of one, or all keys that begin with a prefix."""

    bucket: str
    key: str
    generation: str | None = None

    @property
    def uri(self) -> str:
        generation = "" if self.generation is None else f"#{self.generation}"
        return f"{self.root}{self.key}{generation}"

    @property
    def root(self) -> str:
        return f"{SCHEME}{self.bucket}/"


def parse(uri: str) -> Location:
    """Raises InvalidRequestError."""
    bucket, _, key = uri.removeprefix(SCHEME).partition("/")
    if not uri.startswith(SCHEME) or not _BUCKET.fullmatch(bucket):
        raise InvalidRequestError(f"sources: {uri[:200]!r} is not of the form gs://bucket/key; write it so")
    check_key(uri, key, "GCS")
    match = _GENERATION.fullmatch(key)
    return Location(bucket, match[1], match[2]) if match else Location(bucket, key)
