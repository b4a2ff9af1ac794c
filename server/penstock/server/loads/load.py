"""One load, from the request to the last segment.

    enter (admission.py: resolve, choose, admit) -> hand off -> deliver

It reports to its client by events, which `service.py` puts on the wire. `release` is called for the client's
releases. The load holds its place in the staging buffer until the client's handoff connection closes,
because until then the client may have the slabs mapped.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from ..checkpoint.files import Checkpoint
from ..checkpoint.headers.table import TensorTable
from ..checkpoint.selection import Indices, Selection, selected_bytes
from ..checkpoint.slices import SegmentSlice
from ..errors import CheckpointCorruptError, SessionRequiredError
from ..sources import Access
from ..staging.entry import CacheEntry
from ..staging.ring import WAITS_FOR_OTHERS
from .admission import Admission
from .request import Client, Emit, Listing, LoadContext, Queued, Request


@dataclass(frozen=True, slots=True)
class Manifest:
    load_id: str
    checkpoint: Checkpoint
    version: str
    slab_count: int
    slab_bytes: int
    full: bool
    tensor_count: int
    segment_count: int
    total_bytes: int
    warm_bytes: int
    variant: str = ""
    verify: str = ""


@dataclass(frozen=True, slots=True)
class GroupProgress:
    """With this a member goes on together with the others at another daemon; see `sharing.Group`."""

    window: str
    released_tensors: int
    members: int


@dataclass(frozen=True, slots=True)
class SegmentReady:
    index: int
    ring_offset: int
    start: int
    end: int
    table: TensorTable
    tensors: Indices
    group: GroupProgress | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    waited_seconds: float
    read_bytes: int
    tier_bytes: int
    verified_bytes: int


@dataclass(frozen=True, slots=True)
class InGroup:
    """A load among the others of its group, for status and log."""

    name: str
    size: int
    joined: int
    """Members that have joined its entry of the buffer."""
    waited_seconds: float
    """In which other members kept it waiting, until what they made room for was there."""


Event = Queued | Listing | Manifest | SegmentReady | Finished


class Load(Admission):
    """One client's pass over one checkpoint. `run` it once."""

    kind = "load"

    def __init__(self, request: Request, client: Client, access: Access, context: LoadContext) -> None:
        super().__init__(request, client, access, context)
        self._client = client
        self._slices: Sequence[SegmentSlice] = ()
        self._announced = 0
        self._handed_off = False
        self._awaited: int | None = None
        """The segment of the entry that it waits for."""
        self._joined = 0
        self._group_waited_seconds = 0.0
        self._group_waits_since: float | None = None

    @property
    def waits_for(self) -> str:
        if self._awaited is None or self.entry is None or self.entry.ring is None:
            return super().waits_for
        return self.entry.ring.waits_for(self, self._awaited)

    @property
    def in_group(self) -> InGroup | None:
        if (group := self.request.group) is None:
            return None
        if self.entry is not None:
            # When it ended, others may have left.
            self._joined = max(self._joined, self.entry.members.joined_of(group.name))
        waited = self._group_waited_seconds
        if self._group_waits_since is not None:
            waited += asyncio.get_running_loop().time() - self._group_waits_since
        return InGroup(group.name, group.size, self._joined, waited)

    def release(self, count: int) -> None:
        """The client needs no announced segment below `count` any more."""
        count = min(count, self._announced)
        if self.entry is not None and count > 0:
            self.entry.release(self, self._slices[count - 1].segment + 1)
            self._watch_group()

    def _withdraw(self, error: CheckpointCorruptError) -> None:
        """Tells the client ahead of the segments that are on their way, if it loads any of that file. The
        call, if it has not ended, ends with the error too, but only behind these segments."""
        if self.entry is None or self.entry.ring is None:
            return
        files, segments = self.entry.checkpoint.files, self.entry.ring.segments
        if any(files[segments[part.segment].file].version == error.version for part in self._slices):
            self._client.send_failure(error, self.id)

    def count(self, result: str) -> None:
        super().count(result)
        if result == "ok":
            cache = "hit" if self.was_warm else "miss"
            seconds = asyncio.get_running_loop().time() - self.began
            self._context.totals.load_seconds[self.source, cache].observe(seconds)
        member = self.in_group
        if member is not None and self._handed_off:
            self._context.totals.group_loads["yes" if member.waited_seconds else "no",] += 1
            self._context.totals.group_wait_seconds.observe(member.waited_seconds)

    def first_line(self) -> dict[str, object]:
        group = self.request.group
        members = {"group": group.name, "group_size": group.size} if group is not None else {}
        return {**super().first_line(), **members}

    def log_line(self) -> dict[str, object]:
        line, member = super().log_line(), self.in_group
        if member is not None:
            line |= {
                "group": member.name,
                "group_size": member.size,
                "group_joined": member.joined,
                "group_waited_seconds": round(member.waited_seconds, 4),
            }
        return line

    async def run(self, emit: Emit) -> None:
        """Raises PenstockError, and CancelledError when the client goes."""
        try:
            checkpoint, selection, entry = await self._enter(emit, owner_uid=self.caller.uid)
            self._release_names()
            self._slices = slices = entry.contents.slices(checkpoint, selection)
            await self._hand_off(entry)
            await emit(await self._manifest(entry, checkpoint, selection, slices))
            await self._deliver(
                entry, entry.contents.tables(checkpoint), slices, selection.tensor_count, emit
            )
            self.finished = True
            read_bytes = entry.read_bytes - self.read_before
            await emit(
                Finished(
                    self.waited_seconds,
                    read_bytes,
                    min(read_bytes, entry.tier_bytes - self.tier_before),
                    self._verified_bytes(entry, entry.contents.tables(checkpoint), slices),
                )
            )
        finally:
            if not self._handed_off:
                self._leave()

    async def _hand_off(self, entry: CacheEntry) -> None:
        self._handed_off = True
        await self._client.send_slabs([slab.fd for slab in entry.slabs])
        # Before Python 3.12 `asyncio.wait_for` can swallow the cancellation of a load whose client goes away
        # just when the last slabs were sent. The load holds no slabs any more then.
        if self.caller.closed:
            raise SessionRequiredError(
                "the load's handoff connection was closed when its slabs were sent; load it again"
            )

    async def _manifest(
        self,
        entry: CacheEntry,
        checkpoint: Checkpoint,
        selection: Selection,
        slices: Sequence[SegmentSlice],
    ) -> Manifest:
        ring = entry.ring
        assert ring is not None
        self.total_bytes = await self._in_thread(selected_bytes, checkpoint.tables, selection)
        if self.warm_segments.issuperset(part.segment for part in slices):
            warm = self.total_bytes
            self.was_warm = True
        else:
            warm = sum(
                ring.segments[part.segment].size_bytes
                for part in slices
                if part.segment in self.warm_segments
            )
        self.state = "streaming"
        return Manifest(
            load_id=self.id,
            checkpoint=checkpoint,
            version=checkpoint.version,
            slab_count=len(entry.slabs),
            slab_bytes=entry.slabs[0].size_bytes,
            full=ring.full,
            tensor_count=selection.tensor_count,
            segment_count=len(slices),
            total_bytes=self.total_bytes,
            warm_bytes=min(warm, self.total_bytes),
            variant=self.request.variant,
            verify=self._wish.mode,
        )

    async def _deliver(
        self,
        entry: CacheEntry,
        tables: Sequence[TensorTable | None],
        slices: Sequence[SegmentSlice],
        tensor_count: int,
        emit: Emit,
    ) -> None:
        ring = entry.ring
        assert ring is not None
        for index, part in enumerate(slices):
            self._awaited = part.segment
            self._watch_group()
            try:
                await entry.wait_ready(part.segment, self)
            finally:
                self._awaited = None
                self._watch_group()
            segment = ring.segments[part.segment]
            table = tables[segment.file]
            assert table is not None
            start, end = table.start(part.tensors[0]), table.end(part.tensors[-1])
            self._announced = index + 1
            await emit(
                SegmentReady(
                    index=index,
                    ring_offset=ring.ring_offset(part.segment) + start - segment.start,
                    start=start,
                    end=end,
                    table=table,
                    tensors=part.tensors,
                    group=self._group_progress(entry, tensor_count),
                )
            )
            self.delivered_bytes += end - start
            self._context.totals.delivered_bytes += end - start

    @staticmethod
    def _verified_bytes(
        entry: CacheEntry, tables: Sequence[TensorTable | None], slices: Sequence[SegmentSlice]
    ) -> int:
        """Of the bytes that it was given, those of files that were compared with their checksums."""
        assert entry.ring is not None
        assert entry.verifier is not None
        total = 0
        for part in slices:
            file = entry.ring.segments[part.segment].file
            table = tables[file]
            if file in entry.verifier.verified and table is not None:
                total += table.end(part.tensors[-1]) - table.start(part.tensors[0])
        return total

    def _watch_group(self) -> None:
        """Notes when other members of its group begin to keep it waiting, and when that is over."""
        waits = self.request.group is not None and self.waits_for == WAITS_FOR_OTHERS
        now = asyncio.get_running_loop().time()
        if not waits and self._group_waits_since is not None:
            self._group_waited_seconds += now - self._group_waits_since
            self._group_waits_since = None
        elif waits and self._group_waits_since is None:
            self._group_waits_since = now

    def _group_progress(self, entry: CacheEntry, tensor_count: int) -> GroupProgress | None:
        if self.request.group is None:
            return None
        self._joined = max(self._joined, entry.members.joined_of(self.request.group.name))
        window, released, members = entry.group_progress(self.request.skip_tensors + tensor_count)
        return GroupProgress(window, released, members)
