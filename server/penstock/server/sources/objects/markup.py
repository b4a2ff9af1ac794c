"""What is checked of XML before a parser sees it: a few bytes of it can cost a parser very many. Pure."""

from __future__ import annotations

import re

MAX_ELEMENTS = 100_000
"""Most elements. A page of 1000 names has about 30,000, and as many for their metadata."""
_LONG_TAG = re.compile(rb"<[^<]{100000}")
"""Longest tag, with its attributes and the text after it. The parser would make objects of all of them at
once."""


def is_costly(body: bytes) -> bool:
    """Whether it declares types or entities, has more or longer tags than a list, or another encoding, in
    which they would look different."""
    return (
        b"\0" in body
        or b"<!DOCTYPE" in body
        or body.count(b"<") > 2 * MAX_ELEMENTS
        or _LONG_TAG.search(body) is not None
    )
