"""What tests of tokens share: one object whose bytes are known, and a source that reads it."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import pytest

from penstock.server.sources import RetryingReader
from penstock.server.sources.objects import ObjectSettings, ObjectSource, faults, tokens

from ..objects import Asked
from ..support import ROOT

CONTENT = os.urandom(500_000)
SETTINGS = ObjectSettings(retries=2, timeout_seconds=20.0, connections=2)


def without_identity(monkeypatch: pytest.MonkeyPatch, *prefixes: str) -> None:
    """No variable that begins with these names an identity, and none a proxy. Neither retries nor
    renewals are waited for."""
    for name in list(os.environ):
        if name.startswith(prefixes) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(faults, "FIRST_DELAY_SECONDS", 0.0)
    monkeypatch.setattr(tokens, "LEAST_SECONDS", 0.0)


def read(source: ObjectSource[Any], location: str) -> None:
    """By several requests."""
    with contextlib.closing(source.open(location, ROOT)) as file:
        for start in (0, 300_000, 400_000):
            buffer = bytearray(1000)
            RetryingReader(file).read_into(start, [memoryview(buffer)])
            assert buffer == CONTENT[start : start + 1000]


def answer_range(asked: Asked, **headers: str) -> None:
    """With the bytes that are asked for."""
    start, last = asked.range
    part = CONTENT[start : last + 1]
    asked.answer(206, part, Content_Range=f"bytes {start}-{start + len(part) - 1}/{len(CONTENT)}", **headers)
