"""What storage has of an entry of the warm set, what memory that needs, and what is on the local disk."""

from __future__ import annotations

from dataclasses import dataclass

from ...checkpoint import plan
from ...checkpoint.files import Checkpoint
from ...checkpoint.headers.table import TensorTable
from ...checkpoint.selection import Selection, selected_bytes
from ...errors import MemoryLimitTooSmallError
from ...sources.kept import KeptFile
from ..request import LoadContext, Request
from ..selecting import requested

WINDOW_BYTES = 256 << 20
"""Of a checkpoint that passes to the disk, unless its largest tensors need more."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What storage has, and what it needs."""

    version: str
    needed_bytes: int
    fits: bool
    """The buffer could hold it if it were empty."""
    on_disk: bool
    """All of its tensors are on the local disk."""
    window_bytes: int
    """What it takes to get there."""


def measure(context: LoadContext, request: Request, checkpoint: Checkpoint, uid: int) -> Survey:
    """Takes a while for very many tensors. Raises TensorNotFoundError."""
    selection = requested(request, checkpoint.tables, None, checkpoint.delivered)
    total_bytes = selected_bytes(checkpoint.tables, selection)
    try:
        slabs = context.staging.demand(checkpoint, selection, None, uid).whole
    except MemoryLimitTooSmallError:  # for one tensor
        slabs = 0
    return Survey(
        checkpoint.version,
        needed_bytes=slabs * context.staging.pool.slab_bytes or total_bytes,
        fits=slabs > 0,
        on_disk=is_on_disk(checkpoint, selection),
        window_bytes=window_bytes(checkpoint.tables, selection),
    )


def is_on_disk(checkpoint: Checkpoint, selection: Selection) -> bool:
    """All bytes of the selected tensors are on the local disk."""
    for file, table, indices in zip(checkpoint.files, checkpoint.tables, selection.files, strict=True):
        if isinstance(indices, range) and len(indices):
            extents = iter([(table.start(indices[0]), table.end(indices[-1]))])
        else:
            extents = table.extents(indices)
        if not all(isinstance(file, KeptFile) and file.has(start, end) for start, end in extents):
            return False
    return True


def window_bytes(tables: tuple[TensorTable, ...], selection: Selection) -> int:
    """How much memory a pass to the disk takes: less than the checkpoint, if its tensors allow for that."""
    largest = plan.largest_tensor(tables, selection)
    if largest is None:
        return 0
    half_bytes = selected_bytes(tables, selection) // 2
    return max(largest.ring_bytes, min(half_bytes, max(WINDOW_BYTES, 2 * largest.ring_bytes)))
