"""What a request costs its user."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from penstock.server.edge import requests


@pytest.mark.parametrize("text", ["x" * 5000, "\U0001f600" + "x" * 5000, "é" * 5000])
def test_texts_that_a_load_keeps_are_charged_as_the_strings_that_they_are(text: str) -> None:
    kept: list[int] = []
    call: Any = SimpleNamespace(stream=SimpleNamespace(keep=kept.append))
    sources = requests._kept_sources(call, [text] * 10)
    assert kept == [sum(map(sys.getsizeof, sources)) + 10 * requests.SOURCE_COST_BYTES]
    digests = requests._kept_digests(call, {text: "0" * 64})
    assert kept[1] > sum(map(sys.getsizeof, (*digests, *digests.values())))
