"""What lies directly below a key, page by page. A page that fails is asked for again as objects are, and
errors mean what they mean for those."""

from __future__ import annotations

import functools

from ...errors import CheckpointInvalidError
from .faults import Transient
from .requests import Requests
from .service import Ask, L, Page

MAX_PAGES = 100
"""Of up to 1000 names each."""
MAX_PAGE_BYTES = 16 << 20
"""Some 4 MiB are 1000 of the longest keys, each byte of them written as three."""


def list_names(requests: Requests[L], directory: L) -> list[str]:
    """Sorted, below a key that ends in `/` or is empty. Raises PenstockError."""
    names: list[str] = []
    token = ""
    for _ in range(MAX_PAGES):
        ask = functools.partial(_ask_page, requests, directory, token)
        page = requests.patiently(directory, ask, doing="listing it")
        names += page.keys
        token = page.next
        if not token:
            return sorted(names)
    raise CheckpointInvalidError(
        f"{directory.uri} holds more than {MAX_PAGES}000 names; name the files or their index",
        file=directory.uri,
    )


def _ask_page(requests: Requests[L], directory: L, token: str) -> Page:
    """One whose keys begin below the directory. Raises Transient and PenstockError."""
    ask = Ask("GET", directory, {}, page=token)
    with requests.send(ask, ok=(200,)) as exchange:
        body = exchange.whole(MAX_PAGE_BYTES)
    page = requests.service.page(ask, exchange.headers, body)
    if page.next and page.next == token:
        raise Transient("bad_response", "the list does not say where it goes on")
    if not all(key.startswith(directory.key) for key in page.keys):
        raise Transient("bad_response", "the list names what was not asked for")
    return Page([key[len(directory.key) :] for key in page.keys], page.next)
