"""The meaning of answers that stores have in common. Pure.

Of errors: which are repeated, and which are final.

transient  throttled, timeout, server_error
final      401, 403, 404, 412, and every other answer that would be the same again
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from ...errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from .. import ListingDeniedError
from .faults import Transient
from .service import Location

SETTLED_SECONDS = 5.0
"""As for files (`file/source.py`): HTTP tells times in seconds, and servers may round them."""
_PLAIN_ID = re.compile(r"[A-Za-z0-9+/=_.:-]{1,200}")


@dataclass(frozen=True, slots=True)
class Said:
    """The contents of an error answer that are kept. Bodies are not, as they quote signatures."""

    status: int
    code: str
    """The store's code, or empty."""
    request_id: str
    retry_after_seconds: float

    def __str__(self) -> str:
        code = f" {self.code}" if self.code else ""
        return f"HTTP {self.status}{code} (request id {self.request_id or 'not given'})"


@dataclass(frozen=True, slots=True)
class Words:
    """The words of one store: its codes, and the names of its rights."""

    store: str
    throttled: frozenset[str]
    remedies: Mapping[str, str]
    """By code that means that access is denied: the remedy."""
    may_not_read: str
    may_not_list: str
    missing: Mapping[str, str]
    """By code: the thing that does not exist, if it is not the object itself."""
    container: str
    """The word for a container of objects: bucket, or container."""


def failure(
    said: Said, location: Location, words: Words, *, container: str, listing: bool
) -> PenstockError | Transient:
    """The meaning of an error answer to a GET or HEAD, or to a request for a list. `container` is the name of
    the bucket."""
    status, code, uri = said.status, said.code, location.uri
    if status == 429 or code in words.throttled:
        return Transient("throttled", str(said), retry_after_seconds=said.retry_after_seconds)
    if status == 408 or code == "RequestTimeout":
        return Transient("timeout", str(said), retry_after_seconds=said.retry_after_seconds)
    if status >= 500 and status not in (501, 505):
        return Transient("server_error", str(said), retry_after_seconds=said.retry_after_seconds)
    if status in (412, 416) and not listing:
        return CheckpointChangedError(
            f"{uri} was changed while it was read: {words.store} says {said}; load it again", file=uri
        )
    if status in (401, 403) or code in words.remedies:
        if listing and code not in words.remedies:
            return ListingDeniedError(f"{uri}: {words.store} says {said}; {words.may_not_list}", file=uri)
        remedy = words.remedies.get(code, words.may_not_read)
        return AccessDeniedError(f"{uri}: {words.store} says {said}; {remedy}", file=uri)
    if status == 404 or code in words.missing:
        what, details = words.missing.get(code, "it"), {"file": uri}
        if what == f"the {words.container}":
            details[words.container] = container
        return CheckpointNotFoundError(
            f"{uri}: {words.store} says {said}: {what} does not exist; check the URI and the endpoint",
            **details,
        )
    return SourceUnavailableError(
        f"{uri}: {words.store} says {said}; it refuses the request, and would again; check the endpoint",
        file=uri,
    )


def first(pattern: re.Pattern[str], text: str) -> str:
    """The group of the first match, or an empty text."""
    match = pattern.search(text)
    return match[1] if match else ""


def plain_id(text: str) -> str:
    """A store's id of a request, if the text looks like one; else an empty text."""
    return text if _PLAIN_ID.fullmatch(text) else ""


def settled(headers: Mapping[str, str]) -> bool:
    """Whether another write of the object would give it another Last-Modified: the present one is some
    seconds old by the clock of the server, or there is none."""
    modified = headers.get("last-modified", "")
    if not modified:
        return True
    changed_at, now = _seconds(modified), _seconds(headers.get("date", ""))
    return changed_at is not None and (time.time() if now is None else now) - changed_at >= SETTLED_SECONDS


def _seconds(date: str) -> float | None:
    """Since 1970. None for what is no date."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None
