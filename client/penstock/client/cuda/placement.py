"""Plans where the tensors of a segment lie on a device, and in which batches they are copied (pure).

Every tensor starts at a multiple of 512 bytes, as if the device's allocator had placed it alone. A tensor of
more than a mebibyte has an allocation of its own. Smaller tensors that follow each other share one of at most
2 MiB, since allocating and copying each alone would cost more than its bytes do. The price is that one of
them, if it is kept, keeps its neighbours' memory. That is no more than torch's allocator takes from the
device for a single small tensor.

A batch is the bytes that one pinned buffer carries at once: whole groups of small tensors and parts of large
ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

ALIGN_BYTES = 512
GROUP_BYTES = 2 << 20


class Slot(NamedTuple):
    """A tensor's index among the allocations, and its offset there."""

    allocation: int
    offset: int


class Move(NamedTuple):
    """Bytes of a tensor that go into the pinned buffer."""

    tensor: int
    tensor_offset: int
    buffer_offset: int
    size_bytes: int


class Copy(NamedTuple):
    """Bytes of the pinned buffer that go to the device."""

    buffer_offset: int
    allocation: int
    allocation_offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class CopyBatch:
    moves: list[Move] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    # One for each tensor, in their order.
    slots: list[Slot]
    # Bytes of each allocation.
    allocations: list[int]
    batches: list[CopyBatch]
    # The batches that fill an allocation: a range of numbers, the second one excluded.
    filled_by: list[tuple[int, int]]


def plan(sizes: Sequence[int], *, buffer_bytes: int) -> Plan:
    """Places tensors of these sizes, for pinned buffers of `buffer_bytes`, a multiple of 512."""
    group_bytes = min(GROUP_BYTES, buffer_bytes)
    slots: list[Slot] = []
    allocations: list[int] = []
    groups: list[list[int]] = []
    open_group = False
    for tensor, size_bytes in enumerate(sizes):
        if 2 * size_bytes > group_bytes:
            open_group = False
        elif open_group and (start := _aligned(allocations[-1])) + size_bytes <= group_bytes:
            slots.append(Slot(len(allocations) - 1, start))
            allocations[-1] = start + size_bytes
            groups[-1].append(tensor)
            continue
        else:
            open_group = True
        slots.append(Slot(len(allocations), 0))
        allocations.append(size_bytes)
        groups.append([tensor])
    batches: list[CopyBatch] = []
    filled_by = []
    used_bytes = buffer_bytes
    for allocation, tensors in enumerate(groups):
        first = last = len(batches)
        for start in range(0, allocations[allocation], buffer_bytes):
            part_bytes = min(buffer_bytes, allocations[allocation] - start)
            if used_bytes + part_bytes > buffer_bytes:
                batches.append(CopyBatch())
                used_bytes = 0
            first, last = min(first, len(batches) - 1), len(batches)
            batch = batches[-1]
            batch.copies.append(Copy(used_bytes, allocation, start, part_bytes))
            if len(tensors) == 1:
                batch.moves.append(Move(tensors[0], start, used_bytes, part_bytes))
            else:  # a group is never split
                batch.moves.extend(
                    Move(tensor, 0, used_bytes + slots[tensor].offset, sizes[tensor])
                    for tensor in tensors
                    if sizes[tensor]
                )
            used_bytes = _aligned(used_bytes + part_bytes)
        filled_by.append((first, last))
    return Plan(slots, allocations, batches, filled_by)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES
