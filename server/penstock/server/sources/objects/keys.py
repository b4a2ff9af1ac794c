"""Which keys are valid, and who may read below them. The rules are the same for all stores of objects.
Pure."""

from __future__ import annotations

import re
from typing import Protocol

from ...errors import AccessDeniedError, InvalidRequestError
from .. import Access
from .service import Location

MAX_KEY_BYTES = 1024
"""The limit of S3 and GCS. Azure's limit is as many characters, which such a key never exceeds."""
_SEPARATORS = re.compile(r"[/\\]")
"""Some stores, and some proxies, treat a backslash as a slash."""


class Kept(Location, Protocol):
    """A location in a bucket or container."""

    @property
    def root(self) -> str:
        """The URI of the bucket or container, with a slash at its end."""


def check_key(uri: str, key: str, store: str) -> None:
    """Raises InvalidRequestError for an invalid key. A key is text, and neither a path nor a part of a URL:
    nothing in it is decoded or normalised, as in the stores' own tools."""
    try:
        key_bytes = len(key.encode())
    except UnicodeEncodeError:
        raise InvalidRequestError(f"sources: {uri[:200]!r} is no text; write it in UTF-8") from None
    if "\0" in key:
        raise InvalidRequestError(f"sources: {uri[:200]!r} holds a NUL character; remove it")
    if key_bytes > MAX_KEY_BYTES:
        raise InvalidRequestError(
            f"sources: {uri[:200]!r}… has a key of {key_bytes} bytes; {store} has none above "
            f"{MAX_KEY_BYTES}; name a shorter one"
        )


def check_access(location: Kept, access: Access) -> None:
    """Raises AccessDeniedError unless the caller may read there.

    A prefix allows the key that equals it, and keys below it: those that continue with a `/`. Both are
    compared as text. Keys with a segment `.` or `..` are for privileged callers. Most stores take these
    segments literally, but some proxies and some compatible stores do not.
    """
    if access.privileged:
        return
    if {".", ".."} & set(_SEPARATORS.split(location.key)):
        raise AccessDeniedError(
            f"uid {access.uid} may not load {location.uri}: its key has a '.' or '..' between slashes; "
            "rename the object",
            file=location.uri,
        )
    if not any(_holds(prefix, location) for prefix in access.prefixes):
        raise AccessDeniedError(
            f"uid {access.uid} may not load {location.uri}: penstockd has no --allow prefix that holds it; "
            "start it with one",
            file=location.uri,
        )


def _holds(prefix: str, location: Kept) -> bool:
    if prefix == location.root.rstrip("/"):
        return True
    if not prefix.startswith(location.root):
        return False
    top = prefix.removeprefix(location.root).rstrip("/")
    return not top or location.key == top or location.key.startswith(top + "/")
