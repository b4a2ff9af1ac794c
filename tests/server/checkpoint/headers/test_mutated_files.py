"""Headers and indexes as transformers writes them, with a few changes. The verdict on headers is that of the
safetensors library, the one on indexes that of JSON and the rules of `index.py`.

In `make test` with few examples that are always the same, in `make stress` with many new ones.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from penstock.server.checkpoint.headers.index import InvalidIndexError, parse_index

from ....attacks.mutation import mutated
from ....attacks.recorded import seeds
from .reading import Read, read_by_us

COMMON = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))
EFFORTS = pytest.mark.parametrize(
    "effort",
    [
        pytest.param(settings(COMMON, max_examples=500, derandomize=True), id="short"),
        pytest.param(
            settings(COMMON, max_examples=20_000, print_blob=True),
            id="long",
            marks=[pytest.mark.stress, pytest.mark.timeout(1800)],
        ),
    ],
)
# fmt: off
JSON = [
    b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e9", b"null", b"true", b" ", b"\n",
    b"\xff", b"\xc3\xa9", b"\\ud800", b"\\u0000", b"18446744073709551616", b'"__metadata__"', b'"dtype"',
    b'"F8_E4M3"', b"1,1,1,", b'{"a":"b"}', b"..", b"/",
]
# fmt: on
DATA = random.Random(3).randbytes(1 << 17)
"""No two ranges are alike, so that equal bytes mean equal offsets."""
MAX_DIMS = 64
"""Of a tensor: PyTorch and NumPy make none with more."""


@EFFORTS
def test_a_mutated_header_gets_the_librarys_verdict(effort: settings, read_by_library: Read) -> None:
    headers = list(seeds("header").values())
    sizes_bytes = {name: data_bytes(header) for name, header in enumerate(headers)}
    accepted, refused = 0, 0

    @effort
    @given(st.integers(0, len(headers) - 1), st.data(), st.sampled_from((0, 0, 0, 0, -4, 4)))
    def check(number: int, data: st.DataObject, more_bytes: int) -> None:
        nonlocal accepted, refused
        header = data.draw(mutated([headers[number]], JSON))
        size_bytes = len(header).to_bytes(8, "little")
        file = size_bytes + header + DATA[: sizes_bytes[number] + more_bytes]
        expected = read_by_library(file)
        assume(expected is None or all(len(shape) <= MAX_DIMS for _, shape, _ in expected[0].values()))
        assert read_by_us(file) == expected
        accepted += expected is not None
        refused += expected is None

    check()
    assert accepted > 10
    assert refused > 10


def data_bytes(header: bytes) -> int:
    """Of a file with this header."""
    entries: dict[str, Any] = json.loads(header)
    return max(int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__")


@EFFORTS
def test_a_mutated_index_gets_the_verdict_of_json_and_our_rules(effort: settings) -> None:
    accepted, refused = 0, 0

    @effort
    @given(mutated(list(seeds("index").values()), JSON))
    def check(raw: bytes) -> None:
        nonlocal accepted, refused
        expected = by_the_rules(raw)
        try:
            index = parse_index(raw)
            found = {file: tuple(index.names(number)) for number, file in enumerate(index.files)}
        except InvalidIndexError:
            found = None
        assert found == expected
        accepted += expected is not None
        refused += expected is None

    check()
    assert accepted > 10
    assert refused > 10


def by_the_rules(raw: bytes) -> dict[str, tuple[str, ...]] | None:
    """Files and their tensors in order of appearance; None: no index. Of a key that occurs twice the last
    counts, but each has to be right."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        # Objects become tuples of pairs: arrays are lists, so that types still tell them apart.
        parsed = json.loads(raw.decode(), parse_constant=refuse, object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if not isinstance(parsed, tuple) or any("\ud800" <= one <= "\udfff" for one in "".join(texts(parsed))):
        return None
    weight_map: dict[str, str] = {}
    for key, value in parsed:
        if key == "weight_map":
            if not isinstance(value, tuple) or not all(isinstance(file, str) for _, file in value):
                return None
            weight_map = dict(value)
    files: dict[str, list[str]] = {}
    for tensor, file in weight_map.items():
        if not file or file.startswith("/") or "\0" in file or ".." in file.split("/"):
            return None
        files.setdefault(file, []).append(tensor)
    if not files:
        return None
    return {file: tuple(tensors) for file, tensors in files.items()}


def texts(value: object) -> Iterator[str]:
    """All strings in it."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from texts(part)
