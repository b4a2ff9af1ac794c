"""How much of the staging buffer a checkpoint asks for. Pure, but takes a while for very many tensors.

A checkpoint asks for room for all of it, if that fits what the load may take. Otherwise it asks for a window
that keeps the readers busy: four blocks for each reader, or twice its largest tensor, but at most
`--window-size`. With a minimal limit the window has just the size that the largest tensor needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from ...checkpoint import plan
from ...checkpoint.files import Checkpoint
from ...checkpoint.selection import Selection
from ...config.settings import Config
from ...config.values import MINIMAL
from ...errors import MemoryLimitTooSmallError
from ...system.limits import is_privileged, user_share

WINDOW_BLOCKS_PER_READER = 4


@dataclass(frozen=True, slots=True)
class Demand:
    """How many slabs a checkpoint asks for: for all of it, or for a window."""

    whole: int
    """Slabs for the whole checkpoint; 0 if it does not fit."""
    window: int
    start: int
    """Slabs with which a window starts while more are sure to be given back."""
    minimum: int = 0
    """Slabs with which a window starts when none will be given back by themselves."""
    whole_only: bool = False

    def only_whole(self, capacity_bytes: int) -> Demand:
        """The same demand without a window. Raises MemoryLimitTooSmallError if the whole does not fit."""
        if not self.whole:
            raise MemoryLimitTooSmallError(
                f"the checkpoint does not fit as a whole into the staging buffer of {capacity_bytes} bytes, "
                "and only whole checkpoints can be kept; raise --memory-limit, or load it through a window",
                limit_bytes=capacity_bytes,
            )
        return Demand(self.whole, self.whole, self.whole, self.whole, whole_only=True)


def measure(
    checkpoint: Checkpoint,
    selection: Selection,
    *,
    memory_limit: int | None,
    uid: int,
    config: Config,
    at_once_bytes: int,
) -> Demand:
    """`memory_limit` is the load's own, in bytes: 0 is minimal, None is the daemon's limit. It is rounded up
    to slabs; the daemon's limit is never rounded up. `at_once_bytes` is how much all readers together read at
    once. Raises MemoryLimitTooSmallError if the largest tensor does not fit."""
    slab = config.slab_bytes
    largest = plan.largest_tensor(checkpoint.tables, selection)
    if largest is None:
        return Demand(whole=1, window=1, start=1, minimum=1)
    needed = max(1, -(-largest.ring_bytes // slab))
    allowed = config.max_slabs if is_privileged(uid) else user_share(config.max_slabs)
    if MINIMAL in (memory_limit, config.memory_limit):
        allowed = min(needed, allowed)
    if memory_limit:
        allowed = min(allowed, -(-memory_limit // slab))
    if needed > allowed or (memory_limit and largest.size_bytes > memory_limit):
        _refuse(checkpoint, largest, allowed * slab, memory_limit or 0, config)
    segments = plan.segments(
        checkpoint.tables,
        selection,
        target_bytes=plan.SEGMENT_BYTES,
        target_tensors=plan.SEGMENT_TENSORS,
    )
    whole = max(1, -(-plan.ring_bytes(segments) // slab))
    busy = -(-WINDOW_BLOCKS_PER_READER * at_once_bytes // slab)
    window = min(max(busy, 2 * needed), max(config.window_bytes // slab, needed), allowed)
    return Demand(
        whole=whole if whole <= allowed else 0,
        window=window,
        start=min(window, max(needed, window // 4)),
        minimum=needed,
    )


def _refuse(
    checkpoint: Checkpoint, largest: plan.LargestTensor, allowed_bytes: int, asked_bytes: int, config: Config
) -> NoReturn:
    file = checkpoint.files[largest.file]
    name = checkpoint.headers[largest.file].tensors.name(largest.index)
    capacity = config.max_slabs * config.slab_bytes
    own = 0 < asked_bytes < capacity
    limit = min(allowed_bytes, asked_bytes) if own else allowed_bytes
    whose = "this load's memory_limit" if own else "--memory-limit"
    raise MemoryLimitTooSmallError(
        f"tensor {name[:200]!r} of {file.uri} has {largest.size_bytes} bytes, more than the {limit} bytes "
        f"that the load may take of the staging buffer ({capacity} bytes in slabs of {config.slab_bytes}); "
        f"raise {whose}",
        tensor=name,
        tensor_bytes=largest.size_bytes,
        limit_bytes=limit,
    )
