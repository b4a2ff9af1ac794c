"""Lists the objects below a key, page by page. A page that fails is requested again, and errors have the same
meaning as for objects."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...errors import CheckpointInvalidError, CheckpointNotFoundError
from .. import Listed, Wanted
from ..looking import MAX_TREE_NAMES, ListingCost, too_many_names
from .faults import Transient
from .object import MAX_OBJECT_BYTES, listed_version
from .requests import Requests
from .service import Ask, Entry, L, Page

MAX_PAGES = 100
"""Most pages of a directory, each of up to 1000 names."""
MAX_TREE_PAGES = 10_000
"""Most pages of a tree. Some stores give far fewer names a page, or none."""
MAX_PAGE_BYTES = 16 << 20
"""Most bytes of a page. A thousand of the longest keys, with three characters for each byte, have some 4
MiB."""
MAX_TOKEN_CHARACTERS = 16 << 10
"""Most characters of the token of the next page. Stores send a few thousand at most."""
PARSED_TIMES = 2
"""The memory for a page while it is parsed, in multiples of its bytes, besides `ENTRY_BYTES`."""
ENTRY_BYTES = 300
"""The memory for a name of a page, besides its characters."""


def list_names(requests: Requests[L], directory: L, cost: ListingCost) -> list[str]:
    """The names directly below a key that ends in `/` or is empty, sorted and held. Raises PenstockError."""

    def pages() -> Iterator[str]:
        token = ""
        for _ in range(MAX_PAGES):
            page = _page(requests, directory, token, cost, deep=False)
            yield from (_name(directory, entry) for entry in page.entries)
            cost.release(page.held_bytes)
            token = page.next
            if not token:
                return
        raise CheckpointInvalidError(
            f"{directory.uri} holds more than {MAX_PAGES}000 names; name the files or their index",
            file=directory.uri,
        )

    return sorted(cost.taken(directory.uri, pages()))


def list_tree(requests: Requests[L], directory: L, wanted: Wanted, cost: ListingCost) -> Iterator[Listed]:
    """All objects below a key that ends in `/` or is empty. One page is in memory at a time. Raises
    PenstockError; CheckpointNotFoundError if there are none."""
    token, seen, pages = "", 0, 0
    while True:
        page = _page(requests, directory, token, cost, deep=True)
        cost.look(directory.uri, len(page.entries))
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
        cost.release(page.held_bytes)
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


@dataclass(frozen=True, slots=True)
class _HeldPage(Page):
    """A page, and what is held for it."""

    held_bytes: int = 0


def _page(requests: Requests[L], directory: L, token: str, cost: ListingCost, *, deep: bool) -> _HeldPage:
    ask = functools.partial(_ask_page, requests, directory, token, cost, deep=deep)
    return requests.patiently(directory, ask, doing="listing it")


def _ask_page(requests: Requests[L], directory: L, token: str, cost: ListingCost, *, deep: bool) -> _HeldPage:
    """Requests a page once, and checks that its keys begin with the directory's. Raises Transient and
    PenstockError."""
    held_bytes = 0

    def hold(size_bytes: int) -> None:
        nonlocal held_bytes
        cost.look(directory.uri, 0)
        cost.hold(PARSED_TIMES * size_bytes)
        held_bytes += PARSED_TIMES * size_bytes

    try:
        page = _parsed_page(requests, Ask("GET", directory, {}, page=token, deep=deep), directory, hold)
        more_bytes = sum(ENTRY_BYTES + len(entry.key) + len(entry.version) for entry in page.entries)
        cost.hold(more_bytes)
        return _HeldPage(page.entries, page.next, held_bytes + more_bytes)
    except BaseException:
        cost.release(held_bytes)
        raise


def _parsed_page(requests: Requests[L], ask: Ask[L], directory: L, hold: Callable[[int], None]) -> Page:
    with requests.send(ask, ok=(200,)) as exchange:
        body = exchange.whole(MAX_PAGE_BYTES, hold)
    with requests.parsing:
        page = requests.service.page(ask, exchange.headers, body)
    token, deep = ask.page, ask.deep
    if (page.next and page.next == token) or len(page.next) > MAX_TOKEN_CHARACTERS:
        raise Transient("bad_response", "the list does not say where it goes on")
    if not all(entry.key.startswith(directory.key) for entry in page.entries):
        raise Transient("bad_response", "the list names what was not asked for")
    sizes = (entry.size_bytes for entry in page.entries)
    if deep and any(size is None or not 0 <= size <= MAX_OBJECT_BYTES for size in sizes):
        raise Transient("bad_response", "the list does not say how long the objects are")
    return page
