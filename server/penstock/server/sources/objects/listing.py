"""Lists the objects below a key, page by page. A page that fails is requested again, and errors have the same
meaning as for objects."""

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
"""Most pages of a directory, each of up to 1000 names."""
MAX_TREE_PAGES = 10_000
"""Most pages of a tree. Some stores give far fewer names a page, or none."""
MAX_PAGE_BYTES = 16 << 20
"""Most bytes of a page. A thousand of the longest keys, with three characters for each byte, have some 4
MiB."""


def list_names(requests: Requests[L], directory: L) -> list[str]:
    """The names directly below a key that ends in `/` or is empty, sorted. Raises PenstockError."""
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
    """All objects below a key that ends in `/` or is empty. One page is in memory at a time. Raises
    PenstockError; CheckpointNotFoundError if there are none."""
    token, seen, pages = "", 0, 0
    while True:
        page = _page(requests, directory, token, deep=True)
        pages += 1
        seen += len(page.entries)
        if seen > MAX_TREE_NAMES:
            raise too_many_names(directory.uri)
        for entry in page.entries:
            name = _name(directory, entry)
            # A name that ends in a slash stands for a directory. Consoles and file systems on top of stores
            # make such objects.
            if name and not name.endswith("/") and wanted(name):
                yield Listed(
                    name, entry.size_bytes or 0, listed_version(entry.version, entry.size_bytes or 0)
                )
        token = page.next
        if not token:
            break
        if pages >= MAX_TREE_PAGES:  # a store may send empty pages for ever
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
    """Requests a page once, and checks that its keys begin with the directory's. Raises Transient and
    PenstockError."""
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
