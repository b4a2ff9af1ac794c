"""Checksums of files from those of their parts."""

from __future__ import annotations

import base64
import hashlib
import itertools
import random

import pytest
from awscrt import checksums as reference
from hypothesis import given
from hypothesis import strategies as st

from penstock.server.sources.checksums import (
    CRC32C,
    CRC64NVME,
    Prefix,
    Runs,
    crc,
    crc_checksum,
    crc_in_base64,
    sha256_checksum,
)

ALGORITHMS = (CRC64NVME, CRC32C)


def test_the_algorithms_are_those_of_their_names() -> None:
    """By the check values of their definitions."""
    assert crc(CRC32C, [b"123456789"]) == 0xE3069283
    assert crc(CRC64NVME, [b"123456789"]) == 0xAE8B14860A799888


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(content=st.binary(max_size=300), cuts=st.lists(st.integers(0, 300)), seed=st.integers())
def test_parts_in_any_order_make_the_whole(
    algorithm: str, content: bytes, cuts: list[int], seed: int
) -> None:
    borders = sorted({0, len(content), *(cut for cut in cuts if cut < len(content))})
    parts = list(itertools.pairwise(borders))
    random.Random(seed).shuffle(parts)
    runs = Runs(algorithm)
    for number, (start, end) in enumerate(parts):
        assert runs.of(0, len(content)) is None, number
        runs.add(start, end, crc(algorithm, [memoryview(content)[start:end]]))
    whole = reference.crc64nvme(content) if algorithm == CRC64NVME else reference.crc32c(content)
    assert runs.of(0, len(content)) == whole


def test_a_range_that_was_not_added_alone_has_no_value() -> None:
    runs = Runs(CRC32C)
    runs.add(0, 4, 1)
    runs.add(4, 8, 2)
    runs.add(10, 12, 3)
    assert runs.of(0, 4) is None
    assert runs.of(4, 8) is None
    assert runs.of(0, 12) is None
    assert runs.of(10, 12) == 3


@pytest.mark.parametrize("text", ["", "AAAA", "AAAAAAAAAAA=-2", "!!!!", "AAAAAAAA", "é"])
def test_what_is_no_crc_in_base64_is_none(text: str) -> None:
    assert crc_in_base64(CRC64NVME, text) is None


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_number_and_its_base64_are_the_same_checksum(algorithm: str) -> None:
    value = 0x0102
    text = base64.b64encode(value.to_bytes(8 if algorithm == CRC64NVME else 4, "big")).decode()
    assert crc_in_base64(algorithm, text) == crc_checksum(algorithm, value)


def test_a_sha256_is_64_digits() -> None:
    assert sha256_checksum("AB" * 32) == sha256_checksum("ab" * 32)
    assert sha256_checksum("ab" * 31) is None
    assert sha256_checksum("zz" * 32) is None


def test_a_prefix_is_gone_on_with_without_being_changed() -> None:
    prefix = Prefix((CRC32C,))
    prefix.add(b"head")
    prefix.add(memoryview(b"er"))
    following = prefix.sha256()
    following.update(b"data")
    assert following.hexdigest() == hashlib.sha256(b"headerdata").hexdigest()
    assert prefix.sha256().hexdigest() == hashlib.sha256(b"header").hexdigest()
    assert (prefix.size_bytes, prefix.crcs) == (6, {CRC32C: reference.crc32c(b"header")})


def test_prefixes_of_other_bytes_differ() -> None:
    one, same, other = Prefix(), Prefix((CRC32C,)), Prefix()
    for prefix, content in ((one, b"header"), (same, b"header"), (other, b"headed")):
        prefix.add(content)
    assert not one.differs(same)
    assert one.differs(other)
