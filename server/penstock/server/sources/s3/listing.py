"""What lies directly below a key, page by page. A page that fails is asked for again as objects are, and
errors mean what they mean for those."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from urllib.parse import unquote_plus

from ...errors import CheckpointInvalidError
from .connection import MAX_ERROR_BODY_BYTES
from .faults import Answer, Transient, failure
from .location import Location
from .requests import Requests

MAX_PAGES = 100
"""Of up to 1000 names each."""
MAX_PAGE_BYTES = 16 << 20
"""Some 4 MiB are 1000 of the longest keys, each byte of them written as three."""


@dataclass(frozen=True, slots=True)
class _Page:
    """A part of a list."""

    names: list[str]
    next: str
    """What asks for the page after it; empty after the last."""


def list_names(requests: Requests, directory: Location) -> list[str]:
    """Sorted, below a key that ends in `/` or is empty. Raises PenstockError."""
    names: list[str] = []
    token = ""
    for _ in range(MAX_PAGES):
        ask = functools.partial(_ask_page, requests, directory, token)
        page = requests.patiently(directory, ask, doing="listing it")
        names += page.names
        token = page.next
        if not token:
            return sorted(names)
    raise CheckpointInvalidError(
        f"{directory.uri} holds more than {MAX_PAGES}000 names; name the files or their index",
        file=directory.uri,
    )


def _ask_page(requests: Requests, directory: Location, token: str) -> _Page:
    """Raises Transient and PenstockError."""
    with requests.send(directory, "GET", {}, ok=(200,), page=token) as exchange:
        body = exchange.whole(MAX_PAGE_BYTES)
    page = requests.account.parse_list(body)
    if page.get("Name") is None or page.get("IsTruncated") is None:
        # Any XML, and an empty body, make an empty list for the parser. S3 may also fail after a 200.
        answer = Answer(500, exchange.headers, body[:MAX_ERROR_BODY_BYTES])
        if answer.code:
            raise failure(answer, directory, listing=True)
        raise Transient("bad_response", "HTTP 200 and not the list that was asked for")
    following = page.get("NextContinuationToken", "") if page["IsTruncated"] else ""
    if page["IsTruncated"] and (following in ("", token) or not isinstance(following, str)):
        raise Transient("bad_response", "the list does not say where it goes on")
    decode = unquote_plus if page.get("EncodingType") == "url" else str
    keys = [decode(str(entry.get("Key", ""))) for entry in page.get("Contents", ())]
    if not all(key.startswith(directory.key) for key in keys):
        raise Transient("bad_response", "the list names what was not asked for")
    return _Page([key[len(directory.key) :] for key in keys], following)
