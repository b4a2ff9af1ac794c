"""What lies below a key, page by page. A page that fails is asked for again as objects are, and errors mean
what they mean for those."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from ...errors import CheckpointInvalidError, CheckpointNotFoundError
from .. import MAX_TREE_NAMES, Listed, Wanted, too_many_names
from .faults import Transient
from .object import listed_version
from .requests import Requests
from .service import Ask, Entry, L, Page

MAX_PAGES = 100
"""Of up to 1000 names each."""
MAX_TREE_PAGES = 10_000
"""Some stores give far fewer names a page, or none."""
MAX_PAGE_BYTES = 16 << 20
"""Some 4 MiB are 1000 of the longest keys, each byte of them written as three."""


def list_names(requests: Requests[L], directory: L) -> list[str]:
    """Of what lies directly below a key that ends in `/` or is empty, sorted. Raises PenstockError."""
    names: list[str] = []
    token = ""
    for _ in range(MAX_PAGES):
        page = _page(requests, directory, token, deep=False)
        names += [_name(directory, entry) for entry in page.entries]
        token = page.next
        if not token:
            return sorted(names)
    raise CheckpointInvalidError(
        f"{directory.uri} holds more than {MAX_PAGES}000 names; name the files or their index",
        file=directory.uri,
    )


def list_tree(requests: Requests[L], directory: L, wanted: Wanted) -> Iterator[Listed]:
    """Of all that lies below a key that ends in `/` or is empty. A page is held at a time. Raises
    PenstockError; CheckpointNotFoundError where nothing is there."""
    token, seen, pages = "", 0, 0
    while True:
        page = _page(requests, directory, token, deep=True)
        pages += 1
        seen += len(page.entries)
        if seen > MAX_TREE_NAMES:
            raise too_many_names(directory.uri)
        for entry in page.entries:
            name = _name(directory, entry)
            # What ends so stands for a directory, as consoles and file systems on top of stores make them.
            if name and not name.endswith("/") and wanted(name):
                yield Listed(
                    name, entry.size_bytes or 0, listed_version(entry.version, entry.size_bytes or 0)
                )
        token = page.next
        if not token:
            break
        if pages >= MAX_TREE_PAGES:  # of a store that gives empty ones for ever
            raise too_many_names(directory.uri)
    if not seen:
        raise CheckpointNotFoundError(
            f"{directory.uri}: no object lies below it; check the URI, and that it names a directory",
            file=directory.uri,
        )


def _name(directory: L, entry: Entry) -> str:
    return entry.key[len(directory.key) :]


def _page(requests: Requests[L], directory: L, token: str, *, deep: bool) -> Page:
    ask = functools.partial(_ask_page, requests, directory, token, deep=deep)
    return requests.patiently(directory, ask, doing="listing it")


def _ask_page(requests: Requests[L], directory: L, token: str, *, deep: bool) -> Page:
    """One whose keys begin with the directory's. Raises Transient and PenstockError."""
    ask = Ask("GET", directory, {}, page=token, deep=deep)
    with requests.send(ask, ok=(200,)) as exchange:
        body = exchange.whole(MAX_PAGE_BYTES)
    page = requests.service.page(ask, exchange.headers, body)
    if page.next and page.next == token:
        raise Transient("bad_response", "the list does not say where it goes on")
    if not all(entry.key.startswith(directory.key) for entry in page.entries):
        raise Transient("bad_response", "the list names what was not asked for")
    if deep and any(entry.size_bytes is None or entry.size_bytes < 0 for entry in page.entries):
        raise Transient("bad_response", "the list does not say how long the objects are")
    return page
