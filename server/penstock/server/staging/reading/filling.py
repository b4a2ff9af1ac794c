"""The reads that fill a ring of segments.

    a segment has room (ring.py) --> its blocks go to the readers --> all are there, or it is cancelled
                                     --> where SHA-256 follows the file, its turn has come (verifying.py)

Lives on the event loop; reads run on the reader threads and come back by `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from ...checkpoint import plan
from ...errors import PenstockError, ShuttingDownError, SourceUnavailableError
from ...sources import RetryLater, SourceFile, TellingFile, without
from ...system.failure import NoThreadError, explain
from ..pool import Workers
from ..ring import SegmentRing
from ..slab import Slab
from .job import Cancelled, Job
from .reader import ReaderPool
from .verifying import Verifier

logger = logging.getLogger(__name__)

_STOPS = "penstockd stops, and this read was cut off; try again in a moment"


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
        verifier: Verifier,
        hashers: Workers,
    ) -> None:
        """`uid` is whose share of the readers it takes. `readers` by kind of source. `hashers` are the
        threads on which `verifier` follows files.
        `on_end` is told of each segment that became ready, or was cancelled for the error; `on_block` of
        each block's source and seconds, on a reader thread."""
        self._ring = ring
        self._slabs = slabs
        self._files = files
        self._queues = {kind: pool.queue(uid) for kind, pool in readers.items()}
        self._block_bytes = {kind: pool.block_bytes for kind, pool in readers.items()}
        self._on_end = on_end
        self._on_block = on_block
        self._verifier = verifier
        self._hashers = hashers
        self._uid = uid
        self._in_line: set[int] = set()
        """Segments that are there and whose turn to be followed has not come."""
        self._cancelled = False
        """Nothing was submitted since the last `cancel`."""
        self._followed: set[int] = set()
        """Those that are being followed."""
        self._loop = asyncio.get_running_loop()
        self._reading: dict[int, Job | None] = {}
        """Segments that are being read; None for those without a byte."""

    @property
    def active(self) -> bool:
        return bool(self._reading)

    def give_to(self, uid: int | None) -> None:
        """From now on it takes that user's share of the readers."""
        self._uid = uid
        for queue in self._queues.values():
            queue.give_to(uid)

    def slabs_in_use(self) -> list[Slab]:
        """Those that reads under way write into. After `cancel` no read begins any more, so that nothing is
        ever written into the others."""
        used: set[int] = set()
        for index, job in self._reading.items():
            segment = self._ring.segments[index]
            if index in self._followed:
                used.update(number for number, _, _ in self._parts(index, segment.start, segment.end))
            for start, end in job.under_way.copy() if job is not None else ():
                begin, finish = self._whole_pages(index, start, end)
                used.update(number for number, _, _ in self._parts(index, begin, finish))
        return [self._slabs[number] for number in sorted(used)]

    def submit(self) -> None:
        """Gives every segment that has room to the readers."""
        self._cancelled = False
        begun = self._ring.begin_reads()
        for index in self._ring.passed_over():
            self._lose(index)
        for index in begun:
            self._verifier.begin(index)
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
            try:
                self._queues[file.kind].submit(job)
            except NoThreadError as error:
                told = explain(error, f"reading {file.uri}")
                self._loop.call_soon(self._ended, index, told)

    def cancel(self) -> None:
        """Blocks that are being read are read to their end; `_ended` cancels their segments then."""
        self._cancelled = True
        idle = [job for queue in self._queues.values() for job in queue.cancel()]
        for index, job in list(self._reading.items()):
            if job in idle or index in self._in_line:
                del self._reading[index]
                self._in_line.discard(index)
                self._ring.cancel(index)

    def _read_block(self, index: int, start: int, end: int) -> None:
        """On a reader thread."""
        file = self._files[self._ring.segments[index].file]
        begin, finish = self._whole_pages(index, start, end)
        began = time.monotonic()
        views = self.views(index, begin, finish)
        block = self._verifier.block(index, start)

        def tell(reached: int) -> None:
            """The views have the bytes before `reached`."""
            reached = min(reached, end)
            if block is not None and reached > block.reached:
                block.add(reached, _cut(views, block.reached - begin, reached - begin))

        try:
            if block is not None and isinstance(file, TellingFile):
                file.read_and_tell(begin, views, tell)
            else:
                file.read_into(begin, views)
            self._on_block(file.kind, time.monotonic() - began)
            tell(end)
        except RetryLater as later:
            tell(later.reached)
            raise
        finally:
            if block is not None:
                block.finish()

    def views(self, index: int, begin: int, finish: int) -> list[memoryview]:
        """The memory of a range of the segment's file."""
        return [
            self._slabs[number].view[first:last] for number, first, last in self._parts(index, begin, finish)
        ]

    def range_of(self, index: int) -> tuple[int, int]:
        """Which bytes of the file are read for the segment: it, and what else is on its pages."""
        segment = self._ring.segments[index]
        if not segment.size_bytes:  # it has no pages
            return segment.start, segment.end
        begin, finish = self._whole_pages(index, segment.start, segment.end)
        return begin, min(finish, self._files[segment.file].size_bytes)

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
        number = self._ring.segments[index].file
        if error is not None or not self._verifier.in_order(index):
            self._settle(index, error)
        elif self._cancelled and self._verifier.next_to_follow(number) != index:
            self._settle(index, Cancelled())  # what comes before it is not read any more
        else:
            self._in_line.add(index)
            self._follow(number)

    def _follow(self, number: int) -> None:
        """Goes on with SHA-256 of that file, if the next segment is there."""
        index = self._verifier.next_to_follow(number)
        if index is None or index not in self._in_line:
            return
        segment = self._ring.segments[index]
        views = [
            self._slabs[slab].view[first:last]
            for slab, first, last in self._parts(index, segment.start, segment.end)
        ]
        self._in_line.discard(index)
        self._followed.add(index)
        uid = os.geteuid() if self._uid is None else self._uid

        def over(hashed: Future[None]) -> None:
            """On the thread that followed."""
            error = ShuttingDownError(_STOPS) if hashed.cancelled() else hashed.exception()
            with contextlib.suppress(RuntimeError):  # the event loop is closed
                self._loop.call_soon_threadsafe(self._followed_to, index, error)

        try:
            self._hashers.of(uid).submit(self._follow_bytes, index, views).add_done_callback(over)
        except RuntimeError:  # the daemon stops
            self._followed_to(index, ShuttingDownError(_STOPS))

    def _follow_bytes(self, index: int, views: list[memoryview]) -> None:
        """On a hashing thread. Empties `views`: a slab cannot be closed while there are views of it, and the
        thread keeps what it was called with for longer than this takes."""
        try:
            self._verifier.follow(index, views)
        finally:
            views.clear()

    def _followed_to(self, index: int, error: BaseException | None) -> None:
        self._followed.discard(index)
        self._settle(index, error)
        self._follow(self._ring.segments[index].file)

    def _lose(self, index: int) -> None:
        """A segment is not read, as nobody needs it: its file cannot be followed or compared."""
        number = self._ring.segments[index].file
        self._verifier.lost(index)
        for other in sorted(self._in_line):
            if self._ring.segments[other].file == number:
                self._in_line.discard(other)
                self._loop.call_soon(self._settle, other, None)

    def _settle(self, index: int, error: BaseException | None) -> None:
        """The segment is ready, or is cancelled for the error."""
        if error is None:
            error = self._verifier.finish(index)
        del self._reading[index]
        if error is None:
            self._ring.read(index)
        else:
            self._ring.cancel(index)
        self._on_end(index, None if error is None else _told(error))


def _cut(views: Sequence[memoryview], first: int, last: int) -> list[memoryview]:
    """The bytes `first` to `last` of the views."""
    rest, left = [], last - first
    for view in without(views, first):
        if left > 0:
            rest.append(view[:left])
            left -= len(rest[-1])
    return rest


def _told(error: BaseException) -> PenstockError | Cancelled:
    if isinstance(error, (PenstockError, Cancelled)):
        return error
    logger.error("reading failed unexpectedly", exc_info=error)
    return SourceUnavailableError(f"reading failed: {error!r}; see penstockd's log")
