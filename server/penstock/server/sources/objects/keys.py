"""Which keys make sense, and who may read what lies under them: the same for every store of objects. Pure."""

from __future__ import annotations

import re
from typing import Protocol

from ...errors import AccessDeniedError, InvalidRequestError
from .. import Access
from .service import Location

MAX_KEY_BYTES = 1024
"""Of S3 and GCS. Azure counts characters, of which a key with so many bytes has no more."""
_SEPARATORS = re.compile(r"[/\\]")
"""Some stores, and some proxies before them, take a backslash for a slash."""


class Kept(Location, Protocol):
    """In a bucket or container."""

    @property
    def root(self) -> str:
        """The URI of that, ending in `/`."""


def check_key(uri: str, key: str, store: str) -> None:
    """Raises InvalidRequestError for what is no key. A key is text, not a path and not part of a URL: nothing
    in it is decoded or normalised, as in the stores' own tools."""
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

    A prefix allows the key that it is and what lies below it, at a `/`, compared as text. Keys with a `.` or
    `..` segment mean themselves to most stores, but not to every proxy or store that calls itself
    compatible: they are for privileged callers.
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
