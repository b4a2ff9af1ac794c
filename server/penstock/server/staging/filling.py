"""The reads that fill a ring of segments.

    a segment has room (ring.py) --> its blocks go to the readers --> all are there, or it is cancelled

Lives on the event loop; reads run on the reader threads and come back by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from ..checkpoint import plan
from ..errors import PenstockError, SourceUnavailableError
from ..sources import SourceFile
from .reader import Cancelled, Job, ReaderPool
from .ring import SegmentRing
from .slab import Slab

logger = logging.getLogger(__name__)


class Filling:
    """Reads what `ring` has room for, out of `files` into `slabs`: both must stay while it is `active`."""

    def __init__(
        self,
        ring: SegmentRing,
        slabs: Sequence[Slab],
        files: Sequence[SourceFile],
        *,
        uid: int | None,
        readers: Mapping[str, ReaderPool],
        on_end: Callable[[int, PenstockError | Cancelled | None], None],
        on_block: Callable[[str, float], None],
    ) -> None:
        """`uid` is whose share of the readers it takes. `readers` by kind of source.
        `on_end` is told of each segment that became ready, or was cancelled for the error; `on_block` of
        each block's source and seconds, on a reader thread."""
        self._ring = ring
        self._slabs = slabs
        self._files = files
        self._queues = {kind: pool.queue(uid) for kind, pool in readers.items()}
        self._block_bytes = {kind: pool.block_bytes for kind, pool in readers.items()}
        self._on_end = on_end
        self._on_block = on_block
        self._loop = asyncio.get_running_loop()
        self._reading: dict[int, Job | None] = {}
        """Segments that are being read; None for those without a byte."""

    @property
    def active(self) -> bool:
        return bool(self._reading)

    def give_to(self, uid: int | None) -> None:
        """From now on it takes that user's share of the readers."""
        for queue in self._queues.values():
            queue.give_to(uid)

    def slabs_in_use(self) -> list[Slab]:
        """Those that reads under way write into. After `cancel` no read begins any more, so that nothing is
        ever written into the others."""
        used: set[int] = set()
        for index, job in self._reading.items():
            for start, end in job.under_way.copy() if job is not None else ():
                begin, finish = self._whole_pages(index, start, end)
                used.update(number for number, _, _ in self._parts(index, begin, finish))
        return [self._slabs[number] for number in sorted(used)]

    def submit(self) -> None:
        """Gives every segment that has room to the readers."""
        for index in self._ring.begin_reads():
            segment = self._ring.segments[index]
            if segment.size_bytes == 0:
                self._reading[index] = None
                self._loop.call_soon(self._ended, index, None)
                continue
            file = self._files[segment.file]
            cut = plan.blocks if file.alignment > 1 else plan.even_blocks
            job = Job(
                cut(segment, self._block_bytes[file.kind]),
                read=functools.partial(self._read_block, index),
                check=file.check_unchanged,
                done=functools.partial(self._call_back, index),
                domain=file.mount_point or None,
            )
            self._reading[index] = job
            self._queues[file.kind].submit(job)

    def cancel(self) -> None:
        """Blocks that are being read are read to their end; `_ended` cancels their segments then."""
        idle = [job for queue in self._queues.values() for job in queue.cancel()]
        for index, job in list(self._reading.items()):
            if job in idle:
                del self._reading[index]
                self._ring.cancel(index)

    def _read_block(self, index: int, start: int, end: int) -> None:
        """On a reader thread."""
        file = self._files[self._ring.segments[index].file]
        begin, finish = self._whole_pages(index, start, end)
        began = time.monotonic()
        file.read_into(begin, self.views(index, begin, finish))
        self._on_block(file.kind, time.monotonic() - began)

    def views(self, index: int, begin: int, finish: int) -> list[memoryview]:
        """The memory of a range of the segment's file."""
        return [
            self._slabs[number].view[first:last] for number, first, last in self._parts(index, begin, finish)
        ]

    def slabs_of(self, index: int, begin: int, finish: int) -> list[Slab]:
        """Those that `views` are in."""
        return [self._slabs[number] for number, _, _ in self._parts(index, begin, finish)]

    def _whole_pages(self, index: int, start: int, end: int) -> tuple[int, int]:
        """The range rounded out to what the source reads best: the segment owns its pages."""
        alignment = self._files[self._ring.segments[index].file].alignment
        return start // alignment * alignment, -(-end // alignment) * alignment

    def _parts(self, index: int, begin: int, finish: int) -> list[tuple[int, int, int]]:
        """Where a range of the segment's file lies: numbers of slabs, each with a range of its bytes, across
        slab borders and the end of the ring."""
        parts = []
        offset = self._ring.ring_offset(index) + begin - self._ring.segments[index].start
        size_bytes, slab_bytes = finish - begin, self._slabs[0].size_bytes
        while size_bytes > 0:
            number, inside = divmod(offset, slab_bytes)
            count = min(size_bytes, slab_bytes - inside)
            parts.append((number % len(self._slabs), inside, inside + count))
            offset += count
            size_bytes -= count
        return parts

    def _call_back(self, index: int, error: BaseException | None) -> None:
        """On a reader thread."""
        self._loop.call_soon_threadsafe(self._ended, index, error)

    def _ended(self, index: int, error: BaseException | None) -> None:
        del self._reading[index]
        if error is None:
            self._ring.read(index)
        else:
            self._ring.cancel(index)
        self._on_end(index, None if error is None else _told(error))


def _told(error: BaseException) -> PenstockError | Cancelled:
    if isinstance(error, (PenstockError, Cancelled)):
        return error
    logger.error("reading failed unexpectedly", exc_info=error)
    return SourceUnavailableError(f"reading failed: {error!r}; see penstockd's log")
