"""Text of callers as people see it, in errors, the log, the history and status: cut, and without secrets."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

SHOWN_BYTES = 1024
SHOWN_SOURCES = 16
"""The most sources that are shown of a load or an entry of the buffer: a request may name very many."""

_WEB = re.compile(r"https?://", re.IGNORECASE)
_SECRETS = re.compile(r"(?<=://)[^/?#]*@|[?#].*", re.DOTALL)
"""User and password of a URL, and its query, which may be a signature."""


def utf8_bytes(text: str) -> int:
    return len(text.encode(errors="replace"))


def encodable(text: str) -> str:
    """Replaces surrogates, which stand for bytes of a path that are not UTF-8. Neither messages of the wire
    nor JSON may hold them."""
    return text.encode(errors="replace").decode()


def cut(text: str, most_bytes: int = SHOWN_BYTES, *, size: Callable[[str], int] = utf8_bytes) -> str:
    """The text, or its beginning with a mark that says how much is left out, in `most_bytes` together."""
    if len(text) * 12 <= most_bytes or size(text) <= most_bytes:  # 12: 4 bytes, each as %XX
        return text
    low, high = 0, min(len(text), most_bytes)
    while low < high:
        middle = (low + high + 1) // 2
        if size(text[:middle]) + len(_mark(len(text) - middle)) <= most_bytes:
            low = middle
        else:
            high = middle - 1
    return text[:low] + _mark(len(text) - low)


def without_secrets(source: str) -> str:
    """A URL of a web server without user, password and query. URLs with these are refused, but shown."""
    return _SECRETS.sub("", source) if _WEB.match(source) else source


def shown_sources(sources: Sequence[str], most: int = SHOWN_SOURCES) -> list[str]:
    """The first `most` sources, each cut so that together they have about `SHOWN_BYTES` at most."""
    first = [encodable(without_secrets(source)) for source in sources[:most]]
    share = max(64, SHOWN_BYTES // max(1, len(first)))
    if sum(map(utf8_bytes, first)) <= SHOWN_BYTES:
        return first
    return [cut(source, share) for source in first]


def shown_source(sources: Sequence[str]) -> str:
    """The first few sources in one text, for a line of the log."""
    return ",".join(shown_sources(sources, 3))


def _mark(count: int) -> str:
    return f"...[{count} more characters]"
