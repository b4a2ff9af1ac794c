"""The reads that fill a stage's ring.

    a segment has room (stage.py) --> its blocks go to the readers --> all are there, or it is parked again

Lives on the event loop; reads run on the reader threads and come back by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence

from . import plan
from .errors import PenstockError, SourceUnavailableError
from .reader import Dropped, Job, ReaderPool
from .slab import Slab
from .sources import SourceFile
from .stage import Stage

logger = logging.getLogger(__name__)


class Filling:
    """Reads what `stage` has room for, out of `files` into `slabs`: both must stay while it is `active`."""

    def __init__(
        self,
        stage: Stage,
        slabs: Sequence[Slab],
        files: Sequence[SourceFile],
        *,
        readers: Mapping[str, ReaderPool],
        block_bytes: Mapping[str, int],
        on_end: Callable[[int, PenstockError | Dropped | None], None],
        on_block: Callable[[str, float], None],
    ) -> None:
        """`readers` and `block_bytes` by kind of source. `on_end` is told of each segment that became
        ready, or was parked because of the error; `on_block` of each block's source and seconds, on a reader
        thread."""
        self._stage = stage
        self._slabs = slabs
        self._files = files
        self._lanes = {kind: pool.lane() for kind, pool in readers.items()}
        self._block_bytes = block_bytes
        self._on_end = on_end
        self._on_block = on_block
        self._loop = asyncio.get_running_loop()
        self._reading: dict[int, Job | None] = {}
        """Segments that are being read; None for those without a byte."""

    @property
    def active(self) -> bool:
        return bool(self._reading)

    def submit(self) -> None:
        """Gives every segment that has room to the readers."""
        for index in self._stage.place():
            segment = self._stage.segments[index]
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
            )
            self._reading[index] = job
            self._lanes[file.kind].submit(job)

    def give_up(self) -> None:
        """Blocks that are being read are read to their end; `_ended` parks their segments then."""
        idle = [job for lane in self._lanes.values() for job in lane.drop()]
        for index, job in list(self._reading.items()):
            if job in idle:
                del self._reading[index]
                self._stage.park(index)

    def _read_block(self, index: int, start: int, end: int) -> None:
        """On a reader thread. Reads whole pages where the source wants them: the segment owns them."""
        segment = self._stage.segments[index]
        file = self._files[segment.file]
        begin = start // file.alignment * file.alignment
        finish = -(-end // file.alignment) * file.alignment
        offset = self._stage.ring_offset(index) + begin - segment.start
        began = time.monotonic()
        file.read_into(begin, self._views(offset, finish - begin))
        self._on_block(file.kind, time.monotonic() - began)

    def _views(self, offset: int, size_bytes: int) -> Sequence[memoryview]:
        """The ring's bytes from `offset` on, across slab borders and the end of the ring."""
        views = []
        slab_bytes = self._slabs[0].size_bytes
        while size_bytes > 0:
            number, inside = divmod(offset, slab_bytes)
            count = min(size_bytes, slab_bytes - inside)
            views.append(self._slabs[number % len(self._slabs)].view[inside : inside + count])
            offset += count
            size_bytes -= count
        return views

    def _call_back(self, index: int, error: BaseException | None) -> None:
        """On a reader thread."""
        self._loop.call_soon_threadsafe(self._ended, index, error)

    def _ended(self, index: int, error: BaseException | None) -> None:
        del self._reading[index]
        if error is None:
            self._stage.read(index)
        else:
            self._stage.park(index)
        self._on_end(index, None if error is None else _told(error))


def _told(error: BaseException) -> PenstockError | Dropped:
    if isinstance(error, (PenstockError, Dropped)):
        return error
    logger.error("reading failed unexpectedly", exc_info=error)
    return SourceUnavailableError(f"reading failed: {error!r}; see penstockd's log")
