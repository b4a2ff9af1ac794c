"""What lies directly below a key, page by page. A page that fails is asked for again as objects are, and
errors mean what they mean for those."""

from __future__ import annotations

import functools

from ...errors import CheckpointInvalidError
from .account import Page
from .faults import EXPIRED, failure
from .location import Location
from .requests import Requests

MAX_PAGES = 100
"""Of up to 1000 names each."""


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


def _ask_page(requests: Requests, directory: Location, token: str) -> Page:
    """What expired with credentials that were renewed meanwhile is asked again with these."""
    while True:
        identity = requests.account.identity(directory)
        answer = requests.account.list_page(directory, token)
        if isinstance(answer, Page):
            return answer
        if answer.code not in EXPIRED or not requests.account.renewed(directory, identity):
            raise failure(answer, directory, listing=True)
