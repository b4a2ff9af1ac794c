"""What is believed of a `.records` file: whole records of that version, up to the first that is not."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.server.tier.records import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    CRC_BYTES,
    MIN_BLOCKS,
    PAGE_BYTES,
    Block,
    Identity,
    chunk_crcs,
    crc64nvme,
    decode,
    encode_head,
    encode_record,
    head_crc,
    padded,
    whole_crc,
)

IDENTITY = Identity("s3://bucket/key", "etag:1", 1 << 40)
SIZES = [1, 5000, CHUNK_BYTES, CHUNK_BYTES + 1, BLOCK_BYTES]


def blocks_of(sizes: list[int]) -> tuple[Block, ...]:
    blocks, at = [], 0
    for number, size in enumerate(sizes):
        crcs = bytes([number]) * (CRC_BYTES * -(-size // CHUNK_BYTES))
        blocks.append(Block(number * BLOCK_BYTES, size, at, crcs))
        at += padded(size)
    return tuple(blocks)


BLOCKS = blocks_of(SIZES)
END = BLOCKS[-1].position + BLOCKS[-1].span_bytes


def encoded(blocks: tuple[Block, ...], identity: Identity = IDENTITY) -> bytes:
    records = (encode_record(head_crc(identity), number, block) for number, block in enumerate(blocks))
    return encode_head(identity) + b"".join(records)


def test_all_that_was_written_is_read() -> None:
    log = decode(encoded(BLOCKS), IDENTITY, END)
    assert log is not None
    assert log.blocks == BLOCKS
    assert log.size_bytes == len(encoded(BLOCKS))
    assert log.blocks_bytes == END


def test_of_a_part_only_whole_records_count() -> None:
    data = encoded(BLOCKS)
    ends = [len(encoded(BLOCKS[:count])) for count in range(len(BLOCKS) + 1)]
    for length in range(len(data) + 1):
        log = decode(data[:length], IDENTITY, END)
        if length < ends[0]:
            assert log is None
            continue
        assert log is not None
        whole = sum(end <= length for end in ends) - 1
        assert (log.blocks, log.size_bytes) == (BLOCKS[:whole], ends[whole])


@settings(derandomize=True, database=None, deadline=None, max_examples=300)
@given(st.data())
def test_with_a_rotten_bit_only_what_stands_before_it_counts(data: st.DataObject) -> None:
    good = encoded(BLOCKS)
    bit = data.draw(st.integers(0, 8 * len(good) - 1))
    rotten = bytearray(good)
    rotten[bit // 8] ^= 1 << bit % 8
    log = decode(bytes(rotten), IDENTITY, END)
    if log is not None:
        assert log.size_bytes <= bit // 8
        assert log.blocks == BLOCKS[: len(log.blocks)]


def test_records_of_another_version_are_none() -> None:
    other = Identity("s3://bucket/key", "etag:2", IDENTITY.size_bytes)
    assert decode(encoded(BLOCKS, other), IDENTITY, END) is None
    mixed = encode_head(IDENTITY) + encoded(BLOCKS, other)[len(encode_head(other)) :]
    log = decode(mixed, IDENTITY, END)
    assert log is not None
    assert log.blocks == ()


def test_a_record_in_the_place_of_another_is_none() -> None:
    swapped = encode_head(IDENTITY) + encode_record(head_crc(IDENTITY), 1, BLOCKS[1])
    log = decode(swapped, IDENTITY, END)
    assert log is not None
    assert log.blocks == ()


def test_a_record_of_bytes_that_the_file_lacks_is_none() -> None:
    log = decode(encoded(BLOCKS), IDENTITY, END - PAGE_BYTES)
    assert log is not None
    assert log.blocks == BLOCKS[:-1]


def test_a_record_beyond_the_object_is_none() -> None:
    small = Identity(IDENTITY.uri, IDENTITY.version, BLOCKS[1].end)
    log = decode(encoded(BLOCKS, small), small, END)
    assert log is not None
    assert log.blocks == BLOCKS[:2]


def test_each_chunk_has_a_crc_of_its_own() -> None:
    data = bytearray(2 * CHUNK_BYTES + 1)
    before = chunk_crcs(memoryview(data))
    data[CHUNK_BYTES] = 1
    after = chunk_crcs(memoryview(data))
    ends = range(0, 3 * CRC_BYTES, CRC_BYTES)
    assert [before[at : at + CRC_BYTES] == after[at : at + CRC_BYTES] for at in ends] == [True, False, True]
    assert len(before) == len(after) == 3 * CRC_BYTES


@pytest.mark.parametrize("size_bytes", [1, CHUNK_BYTES, CHUNK_BYTES + 1, 3 * CHUNK_BYTES])
def test_the_crcs_of_chunks_make_that_of_the_whole(size_bytes: int) -> None:
    data = memoryview(random.Random(size_bytes).randbytes(size_bytes))
    assert whole_crc(chunk_crcs(data), size_bytes) == crc64nvme(data)


@pytest.mark.parametrize("start", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 7])
@pytest.mark.parametrize("length", [1, CHUNK_BYTES, 2 * CHUNK_BYTES, 5 * CHUNK_BYTES + 9])
def test_the_parts_of_a_range_follow_each_other_and_fit_into_a_buffer(start: int, length: int) -> None:
    block = Block(1000, BLOCK_BYTES, 0, b"")
    begin, end, part_bytes = 1000 + start, 1000 + start + length, 2 * CHUNK_BYTES
    parts = block.parts(begin, end, part_bytes)
    assert [begin, *(last for _, last in parts)] == [*(first for first, _ in parts), end]
    for first, last in parts:
        whole = range((first - 1000) // CHUNK_BYTES * CHUNK_BYTES, last - 1000)
        assert 0 < last - first <= len(whole) <= part_bytes
    assert len(parts) <= -(-(length + CHUNK_BYTES) // part_bytes)


def test_of_more_records_than_an_object_needs_the_first_are_believed() -> None:
    """As they were written by a version of this program that had no bound."""
    blocks = tuple(Block(at, 1, at * PAGE_BYTES, bytes(CRC_BYTES)) for at in range(2 * MIN_BLOCKS))
    small = Identity(IDENTITY.uri, IDENTITY.version, 1 << 20)
    log = decode(encoded(blocks, small), small, 2 * MIN_BLOCKS * PAGE_BYTES)
    assert log is not None
    assert log.blocks == blocks[:MIN_BLOCKS]
