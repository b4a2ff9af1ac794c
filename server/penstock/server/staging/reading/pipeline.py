"""How the bytes of one entry come into its slabs, what becomes of them there, and where they came from.

    store or tier --filling.py--> slabs --verifying.py--> segment ready --keeping.py--> copied for the tier

The entry says when to read and when to stop. All of it runs on the event loop; what blocks runs on threads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ...checkpoint.files import Checkpoint
from ...errors import PenstockError
from ...sources.kept import KeptFile
from ...system.counts import Totals
from ..pool import Workers
from ..ring import SegmentRing
from ..slab import Slab
from .filling import Filling
from .job import Cancelled
from .keeping import Keeper
from .reader import ReaderPool
from .verifying import Verifier


@dataclass(frozen=True, slots=True)
class PipelineContext:
    """What the pipelines of all entries share."""

    readers: Mapping[str, ReaderPool]
    """Reader threads by kind of source."""
    hashers: Workers
    """Threads on which SHA-256 follows what is read."""
    keeper: Keeper
    totals: Totals


class Pipeline:
    """Fills `ring`, which lies in `slabs`. Both must stay while it is `reading` or `copying`."""

    def __init__(
        self,
        ring: SegmentRing,
        slabs: list[Slab],
        checkpoint: Checkpoint,
        context: PipelineContext,
        *,
        uid: int | None,
        on_end: Callable[[int, PenstockError | Cancelled | None], None],
        may_copy: Callable[[], bool],
        on_copied: Callable[[], None],
    ) -> None:
        """`checkpoint` has its headers, and its files stay open while this is `reading`. `uid` is the user
        whose share of the readers it takes. `on_end` is told of each segment that became ready, or was
        cancelled for the error; `may_copy` says whether ready segments may be copied now; `on_copied` is told
        whenever fewer slabs are in use."""
        self.verifier = Verifier(checkpoint, ring.segments)
        self.read_bytes = 0
        self._ring = ring
        self._files = checkpoint.files
        self._context = context
        self._counted_bytes = 0
        """Of the verified bytes, those that are in the totals."""
        self.tier_bytes = 0
        """Of `read_bytes`, those that came from the tier; `tier_bytes_of` has them by segment."""
        self._tier_bytes_of: dict[int, int] = {}
        for file in set(checkpoint.files):
            if isinstance(file, KeptFile):
                file.take_disk_bytes(0, file.size_bytes)  # what was read before, such as headers
        self._filling: Filling | None = Filling(
            ring,
            slabs,
            checkpoint.files,
            uid=uid,
            readers=context.readers,
            on_end=on_end,
            on_block=context.totals.observe_read,
            verifier=self.verifier,
            hashers=context.hashers,
        )
        self._keeping = context.keeper.keep(
            ring, self._filling, checkpoint.files, may_copy=may_copy, on_copied=on_copied
        )

    @property
    def reading(self) -> bool:
        """Whether reads are under way."""
        return self._filling is not None and self._filling.active

    @property
    def copying(self) -> bool:
        """Some bytes are being copied to where they are kept. That takes milliseconds."""
        return self._keeping is not None and bool(self._keeping.slabs_in_use)

    def tier_bytes_of(self, index: int) -> int:
        """How many bytes of that segment came from the tier when it was read last."""
        return self._tier_bytes_of.get(index, 0)

    def slabs_in_use(self) -> list[Slab]:
        """Those that reads under way write into, or that are being copied from."""
        used = self._filling.slabs_in_use() if self._filling is not None else []
        return used + self._keeping.slabs_in_use if self._keeping is not None else used

    def submit(self) -> None:
        """Reads every segment for which there is room."""
        if self._filling is not None:
            self._filling.submit()

    def cancel(self) -> None:
        """Begins no more reads until `submit`. Reads under way end by themselves."""
        if self._filling is not None:
            self._filling.cancel()

    def give_to(self, uid: int | None) -> None:
        """From now on it takes that user's share of the readers."""
        if self._filling is not None:
            self._filling.give_to(uid)

    def pin(self, pinned: bool) -> None:
        """The copies that files keep are pinned as the entry is."""
        if self._keeping is not None:
            self._keeping.pin(pinned)

    def arrived(self, index: int) -> None:
        """Counts a segment that became ready, and has it copied to where it is kept."""
        segment, totals = self._ring.segments[index], self._context.totals
        self.read_bytes += segment.size_bytes
        file = self._files[segment.file]
        totals.source_bytes[file.kind] += segment.size_bytes
        if isinstance(file, KeptFile):
            from_disk = file.take_disk_bytes(segment.start, segment.end)
            self._tier_bytes_of[index] = min(segment.size_bytes, from_disk)
            self.tier_bytes += self._tier_bytes_of[index]
        verified_bytes = self.verifier.verified_bytes
        totals.verified_bytes += verified_bytes - self._counted_bytes
        self._counted_bytes = verified_bytes
        if self._keeping is not None:
            self._keeping.read(index)
            self._context.keeper.pump()

    def end(self) -> None:
        """Ends it for good, when it is neither `reading` nor `copying`. Its counts stay."""
        self._filling = None
        if self._keeping is not None:
            self._keeping.close()
            self._keeping = None
