"""Plans carried out byte by byte, on buffers and allocations that are bytearrays."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.client.cuda.placement import ALIGN_BYTES, BATCH_BYTES, plan

MIB = 1 << 20


def carried_out(sizes: list[int], buffer_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """(what the tensors hold, what lies at their places in the end)."""
    source = random.Random(len(sizes))
    tensors = [source.randbytes(size) for size in sizes]
    planned = plan(sizes, buffer_bytes=buffer_bytes)
    allocations = [bytearray(size) for size in planned.allocations]
    filled: dict[int, set[int]] = {}
    for number, piece in enumerate(planned.pieces):
        buffer = bytearray(buffer_bytes)
        for move in piece.moves:
            assert move.size_bytes > 0
            assert move.buffer_offset + move.size_bytes <= buffer_bytes
            data = tensors[move.tensor][move.tensor_offset : move.tensor_offset + move.size_bytes]
            buffer[move.buffer_offset : move.buffer_offset + move.size_bytes] = data
        for copy in piece.copies:
            assert copy.buffer_offset + copy.size_bytes <= buffer_bytes
            data = bytes(buffer[copy.buffer_offset : copy.buffer_offset + copy.size_bytes])
            start = copy.allocation_offset
            allocations[copy.allocation][start : start + copy.size_bytes] = data
            filled.setdefault(copy.allocation, set()).add(number)
    for allocation, (first, last) in enumerate(planned.filled_by):
        assert filled.get(allocation, set()) == set(range(first, last))
    found = [
        bytes(allocations[place.allocation][place.offset : place.offset + size])
        for place, size in zip(planned.places, sizes, strict=True)
    ]
    return tensors, found


@settings(deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 3000), st.sampled_from([0, 4096, 8192, 20_000])), max_size=30),
    st.sampled_from([4096, 8192, 65_536]),
)
def test_every_byte_arrives_at_its_place(sizes: list[int], buffer_bytes: int) -> None:
    tensors, found = carried_out(sizes, buffer_bytes)
    assert found == tensors
    planned = plan(sizes, buffer_bytes=buffer_bytes)
    assert all(place.offset % ALIGN_BYTES == 0 for place in planned.places)


def test_a_large_tensor_has_an_allocation_of_its_own_and_goes_in_parts() -> None:
    planned = plan([5 * MIB, 40 * MIB, MIB + 1], buffer_bytes=16 * MIB)
    assert planned.allocations == [5 * MIB, 40 * MIB, MIB + 1]
    assert [place.offset for place in planned.places] == [0, 0, 0]
    assert [sum(copy.size_bytes for copy in piece.copies) // MIB for piece in planned.pieces] == [
        5,
        16,
        16,
        9,
    ]
    assert planned.filled_by == [(0, 1), (1, 4), (3, 4)]


def test_small_tensors_share_bounded_allocations_and_copies() -> None:
    planned = plan([6144] * 4096, buffer_bytes=16 * MIB)
    assert max(planned.allocations) <= BATCH_BYTES
    assert len(planned.allocations) == 13
    assert sum(len(piece.copies) for piece in planned.pieces) == 13
    assert len(planned.pieces) == 2


def test_a_large_tensor_ends_a_batch() -> None:
    planned = plan([100, 100, 2 * MIB, 100], buffer_bytes=16 * MIB)
    assert planned.places == [(0, 0), (0, 512), (1, 0), (2, 0)]


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_needs_no_pieces(sizes: list[int]) -> None:
    planned = plan(sizes, buffer_bytes=4096)
    assert planned.pieces == []
    assert sum(planned.allocations) == 0
    assert len(planned.places) == len(sizes)
