"""Plans carried out byte by byte, on buffers and allocations that are bytearrays."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.client.cuda.placement import ALIGN_BYTES, GROUP_BYTES, plan

MIB = 1 << 20


def carried_out(sizes: list[int], buffer_bytes: int) -> tuple[list[bytes], list[bytes]]:
    """(what the tensors hold, what lies at their places in the end)."""
    source = random.Random(len(sizes))
    tensors = [source.randbytes(size) for size in sizes]
    planned = plan(sizes, buffer_bytes=buffer_bytes)
    allocations = [bytearray(size) for size in planned.allocations]
    filled: dict[int, set[int]] = {}
    for number, batch in enumerate(planned.batches):
        buffer = bytearray(buffer_bytes)
        for move in batch.moves:
            assert move.size_bytes > 0
            assert move.buffer_offset + move.size_bytes <= buffer_bytes
            data = tensors[move.tensor][move.tensor_offset : move.tensor_offset + move.size_bytes]
            buffer[move.buffer_offset : move.buffer_offset + move.size_bytes] = data
        for copy in batch.copies:
            assert copy.buffer_offset + copy.size_bytes <= buffer_bytes
            data = bytes(buffer[copy.buffer_offset : copy.buffer_offset + copy.size_bytes])
            start = copy.allocation_offset
            allocations[copy.allocation][start : start + copy.size_bytes] = data
            filled.setdefault(copy.allocation, set()).add(number)
    for allocation, (first, last) in enumerate(planned.filled_by):
        assert filled.get(allocation, set()) == set(range(first, last))
    found = [
        bytes(allocations[slot.allocation][slot.offset : slot.offset + size])
        for slot, size in zip(planned.slots, sizes, strict=True)
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
    assert all(slot.offset % ALIGN_BYTES == 0 for slot in planned.slots)


def test_a_large_tensor_has_an_allocation_of_its_own_and_goes_in_parts() -> None:
    planned = plan([5 * MIB, 40 * MIB, MIB + 1], buffer_bytes=16 * MIB)
    assert planned.allocations == [5 * MIB, 40 * MIB, MIB + 1]
    assert [slot.offset for slot in planned.slots] == [0, 0, 0]
    assert [sum(copy.size_bytes for copy in batch.copies) // MIB for batch in planned.batches] == [
        5,
        16,
        16,
        9,
    ]
    assert planned.filled_by == [(0, 1), (1, 4), (3, 4)]


def test_small_tensors_share_bounded_allocations_and_copies() -> None:
    planned = plan([6144] * 4096, buffer_bytes=16 * MIB)
    assert max(planned.allocations) <= GROUP_BYTES
    assert len(planned.allocations) == 13
    assert sum(len(batch.copies) for batch in planned.batches) == 13
    assert len(planned.batches) == 2


def test_a_large_tensor_ends_a_group() -> None:
    planned = plan([100, 100, 2 * MIB, 100], buffer_bytes=16 * MIB)
    assert planned.slots == [(0, 0), (0, 512), (1, 0), (2, 0)]


@pytest.mark.parametrize("sizes", [[], [0], [0, 0]])
def test_nothing_needs_no_pieces(sizes: list[int]) -> None:
    planned = plan(sizes, buffer_bytes=4096)
    assert planned.batches == []
    assert sum(planned.allocations) == 0
    assert len(planned.slots) == len(sizes)
