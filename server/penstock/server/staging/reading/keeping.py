"""Segments that are copied to the files that keep them, such as those of the tier.

    a segment is there --> what its file does not keep yet is copied, block by block, as writers are free

It holds nobody up. A segment is held only while some of it is copied from memory to memory, and what is gone
before its turn comes is written when it is read another time. On the event loop.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from ...sources import SourceFile
from ...sources.kept import Keep, KeptFile, Writers
from ..ring import SegmentRing, SegmentState
from ..slab import Slab
from .filling import Filling

logger = logging.getLogger(__name__)


class Keeper:
    """Gives free writers something to write, of one entry after the other."""

    def __init__(self, writers: Writers | None) -> None:
        """None: nothing is kept."""
        self.writers = writers
        self._keepings: deque[Keeping] = deque()
        if writers is not None:
            writers.call_when_free(partial(call_back, asyncio.get_running_loop(), self.pump))

    def keep(
        self,
        ring: SegmentRing,
        filling: Filling,
        files: Sequence[SourceFile],
        *,
        may_copy: Callable[[], bool],
        on_copied: Callable[[], None],
    ) -> Keeping | None:
        """For an entry whose reads begin. None: none of its files keeps anything. `may_copy` says whether a
        copy may begin now; `on_copied` is told whenever fewer slabs are in use."""
        if self.writers is None:
            return None
        keeps = [file.keep() if isinstance(file, KeptFile) else None for file in files]
        if not any(keeps):
            return None
        keeping = Keeping(self, ring, filling, keeps, may_copy, on_copied)
        self._keepings.append(keeping)
        return keeping

    def pump(self) -> None:
        """Gives all free writers something to do."""
        idle = 0
        while self.writers is not None and self.writers.free and idle < len(self._keepings):
            keeping = self._keepings[0]
            self._keepings.rotate(-1)
            idle = 0 if keeping.begin() else idle + 1

    def remove(self, keeping: Keeping) -> None:
        self._keepings.remove(keeping)


class Keeping:
    """What one entry has for the files that keep it. Made by `Keeper.keep`."""

    def __init__(
        self,
        keeper: Keeper,
        ring: SegmentRing,
        filling: Filling,
        keeps: Sequence[Keep | None],
        may_copy: Callable[[], bool],
        on_copied: Callable[[], None],
    ) -> None:
        """Owns the `keeps`, by number of file."""
        self._keeper = keeper
        self._ring = ring
        self._filling = filling
        self._keeps = keeps
        self._may_copy = may_copy
        self._on_copied = on_copied
        self._loop = asyncio.get_running_loop()
        self._left: deque[tuple[int, int]] = deque()
        """Segments that may have something to be kept, and from which byte of the file on."""
        self._copying: dict[object, list[Slab]] = {}
        self._rests = False
        """Everything was offered to its files, and nothing more will come."""

    @property
    def slabs_in_use(self) -> list[Slab]:
        """Those that are being copied from."""
        return [slab for slabs in self._copying.values() for slab in slabs]

    def read(self, index: int) -> None:
        """The segment is there."""
        if self._keeps[self._ring.segments[index].file] is not None:
            self._left.append((index, self._filling.range_of(index)[0]))

    def pin(self, pinned: bool) -> None:
        for keep in self._keeps:
            if keep is not None:
                keep.pin(pinned)

    def close(self) -> None:
        """Begins nothing more. Nothing may be under way."""
        self._left.clear()
        for keep in self._keeps:
            if keep is not None:
                keep.release()
        self._keeper.remove(self)

    def begin(self) -> bool:
        """Whether a write of some block began."""
        while self._left and self._may_copy():
            index, start = self._left[0]
            segment = self._ring.segments[index]
            keep = self._keeps[segment.file]
            assert keep is not None
            missing = None
            if self._ring.state(index) is SegmentState.READY:
                missing = keep.missing(start, self._filling.range_of(index)[1])
            if missing is None:
                self._left.popleft()
                continue
            start, end = missing
            self._left[0] = (index, end)
            self._copy(keep, index, start, end)
            return True
        if not self._left and self._ring.complete and not self._rests:
            self._rests = True
            for keep in self._keeps:
                if keep is not None:
                    keep.rest()
        return False

    def _copy(self, keep: Keep, index: int, start: int, end: int) -> None:
        copy = object()
        self._ring.join(copy, index)
        self._copying[copy] = self._filling.slabs_of(index, start, end)
        keep.write(
            start,
            end,
            self._filling.views(index, start, end),
            partial(call_back, self._loop, self._copied, copy),
            partial(call_back, self._loop, self._keeper.pump),
        )

    def _copied(self, copy: object) -> None:
        del self._copying[copy]
        self._ring.leave(copy)
        self._on_copied()


def call_back(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *arguments: object) -> None:
    """On a writer's thread."""
    try:
        loop.call_soon_threadsafe(call, *arguments)
    except RuntimeError:  # the event loop closed while this write was under way
        logger.debug("a write ended after the daemon stopped")
