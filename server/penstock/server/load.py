"""The story of one load, from the request to the last segment.

    resolve -> choose -> admit -> hand off -> deliver

It speaks to its client in events, which `service.py` puts on the wire, and is told of releases by
`release`. What it holds in the staging buffer it holds until the client's handoff connection closes,
because until then the client may have the slabs mapped.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from . import plan
from .catalog import Catalog, Checkpoint
from .checkpoint import TensorTable
from .errors import CheckpointChangedError, InvalidRequestError
from .handoff import Session
from .metrics import Totals
from .plan import Indices, Selection
from .sources import Access
from .stage import SegmentState
from .staged import Holder, Piece, StagedCheckpoint
from .staging import Group, Staging
from .units import show_size

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Request:
    """What the client asked for."""

    sources: tuple[str, ...]
    names: tuple[str, ...] | None
    list_tensors: bool
    memory_limit: int | None
    group: Group | None
    skip_tensors: int
    expect_version: str
    client_name: str


@dataclass(frozen=True, slots=True)
class Queued:
    place: int
    reason: str


@dataclass(frozen=True, slots=True)
class Listing:
    tables: tuple[TensorTable, ...]


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


@dataclass(frozen=True, slots=True)
class SegmentReady:
    index: int
    ring_offset: int
    start: int
    end: int
    table: TensorTable
    tensors: Indices


@dataclass(frozen=True, slots=True)
class Finished:
    waited_seconds: float
    read_bytes: int


Event = Queued | Listing | Manifest | SegmentReady | Finished
Emit = Callable[[Event], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Parts:
    """What every load of the daemon works with. `resolvers` runs what takes long."""

    catalog: Catalog
    staging: Staging
    totals: Totals
    resolvers: Executor


class Load:
    """One client's pass over one checkpoint. `run` it once."""

    def __init__(self, request: Request, session: Session, access: Access, parts: Parts) -> None:
        self.id = secrets.token_hex(4)
        self.request = request
        self.session = session
        self.state = "resolving"
        self.staged: StagedCheckpoint | None = None
        self.delivered_bytes = 0
        self.total_bytes = 0
        self.began = asyncio.get_running_loop().time()
        self.waited_seconds = 0.0
        self._access = access
        self._parts = parts
        self._choice: asyncio.Future[tuple[str, ...]] = asyncio.get_running_loop().create_future()
        self._announced = 0
        self._read_before = 0
        self._handed_off = False

    # ---- told by the client ---------------------------------------------------------------------

    def choose(self, names: Sequence[str]) -> None:
        """The client's answer to the listing."""
        if not self._choice.done():
            self._choice.set_result(tuple(names))

    def release(self, count: int) -> None:
        """The client needs no segment below `count` any more, of those it has been told of."""
        if self.staged is not None:
            self.staged.release(self, min(count, self._announced))

    # ---- the story ------------------------------------------------------------------------------

    async def run(self, emit: Emit) -> None:
        """Raises PenstockError, and CancelledError when the client goes."""
        try:
            checkpoint = await self._resolve()
            try:
                selection = await self._select(checkpoint, emit)
                staged = await self._admit(checkpoint, selection)
            finally:
                if self.staged is None or self.staged.checkpoint is not checkpoint:
                    checkpoint.close()
            await self._wait_for_memory(staged, emit)
            pieces = staged.pieces(checkpoint, selection)
            await self._hand_off(staged)
            await emit(await self._manifest(staged, checkpoint, selection, pieces))
            await self._deliver(staged, pieces, emit)
            await emit(Finished(self.waited_seconds, staged.read_bytes - self._read_before))
        finally:
            if self.staged is not None and not self._handed_off:
                self.staged.leave(self)

    async def _resolve(self) -> Checkpoint:
        catalog, request = self._parts.catalog, self.request
        loop = asyncio.get_running_loop()
        resolving = loop.run_in_executor(
            self._parts.resolvers, catalog.resolve, request.sources, self._access
        )
        try:
            checkpoint = await asyncio.shield(resolving)
        except asyncio.CancelledError:
            resolving.add_done_callback(_close_unwanted)
            raise
        if request.expect_version and request.expect_version != checkpoint.version:
            checkpoint.close()
            raise CheckpointChangedError(
                f"{', '.join(request.sources[:3])} changed since the load to be resumed began; load it again"
            )
        return checkpoint

    async def _select(self, checkpoint: Checkpoint, emit: Emit) -> Selection:
        names = self.request.names
        if self.request.list_tensors:
            await emit(Listing(checkpoint.tables))
            names = await self._choice
        selection = await self._in_thread(plan.select, checkpoint.tables, names)
        return plan.skip(selection, self.request.skip_tensors)

    async def _admit(self, checkpoint: Checkpoint, selection: Selection) -> StagedCheckpoint:
        staging, request = self._parts.staging, self.request
        demand = await self._in_thread(staging.demand, checkpoint, selection, request.memory_limit)
        if self.session.closed:
            raise InvalidRequestError("the handoff connection closed before the load began")
        holder = Holder(self.session.uid, self.session.pid, request.client_name, self.began)
        self.staged = staged = staging.enter(
            checkpoint, selection, demand, key=self, holder=holder, group=request.group
        )
        self._read_before = staged.read_bytes
        self.session.on_close(functools.partial(staged.leave, self))
        return staged

    async def _wait_for_memory(self, staged: StagedCheckpoint, emit: Emit) -> None:
        self.state = "waiting"
        began = asyncio.get_running_loop().time()
        told = 0
        while not staged.started and staged.error is None:
            place = self._parts.staging.place(staged)
            if place not in (0, told):
                await emit(Queued(place, "waiting for staging memory that other loads use"))
                told = place
            else:
                await staged.wait_change()
        await staged.wait_started()
        self.waited_seconds = asyncio.get_running_loop().time() - began

    async def _hand_off(self, staged: StagedCheckpoint) -> None:
        self._handed_off = True
        await self.session.send_slabs([slab.fd for slab in staged.slabs])

    async def _manifest(
        self,
        staged: StagedCheckpoint,
        checkpoint: Checkpoint,
        selection: Selection,
        pieces: Sequence[Piece],
    ) -> Manifest:
        stage = staged.stage
        assert stage is not None
        self.total_bytes = await self._in_thread(plan.selected_bytes, checkpoint.tables, selection)
        if all(stage.state(piece.segment) is SegmentState.READY for piece in pieces):
            warm = self.total_bytes
        else:
            warm = sum(
                stage.segments[piece.segment].size_bytes
                for piece in pieces
                if stage.state(piece.segment) is SegmentState.READY
            )
        self.state = "streaming"
        return Manifest(
            load_id=self.id,
            checkpoint=checkpoint,
            version=checkpoint.version,
            slab_count=len(staged.slabs),
            slab_bytes=staged.slabs[0].size_bytes,
            full=stage.full,
            tensor_count=selection.tensor_count,
            segment_count=len(pieces),
            total_bytes=self.total_bytes,
            warm_bytes=min(warm, self.total_bytes),
        )

    async def _deliver(self, staged: StagedCheckpoint, pieces: Sequence[Piece], emit: Emit) -> None:
        stage = staged.stage
        assert stage is not None
        tables = staged.checkpoint.tables
        for index, piece in enumerate(pieces):
            await staged.wait_ready(piece.segment)
            segment = stage.segments[piece.segment]
            table = tables[segment.file]
            start, end = table.start(piece.tensors[0]), table.end(piece.tensors[-1])
            self._announced = index + 1
            await emit(
                SegmentReady(
                    index=index,
                    ring_offset=stage.ring_offset(piece.segment) + start - segment.start,
                    start=start,
                    end=end,
                    table=table,
                    tensors=piece.tensors,
                )
            )
            self.delivered_bytes += end - start
            self._parts.totals.delivered_bytes += end - start

    async def _in_thread(self, call: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._parts.resolvers, call, *arguments)

    def log_line(self) -> dict[str, object]:
        """What the log says of it when it ended."""
        seconds = asyncio.get_running_loop().time() - self.began
        rate = self.delivered_bytes / seconds / 1e9 if seconds > 0 else 0.0
        return {
            "load": self.id,
            "source": ",".join(self.request.sources[:3]),
            "uid": self.session.uid,
            "pid": self.session.pid,
            "bytes": self.delivered_bytes,
            "size": show_size(self.delivered_bytes),
            "seconds": round(seconds, 4),
            "gb_per_second": round(rate, 2),
            "waited_seconds": round(self.waited_seconds, 4),
            "stage": self.staged.id if self.staged else 0,
        }


def _close_unwanted(resolving: asyncio.Future[Checkpoint]) -> None:
    if not resolving.cancelled() and resolving.exception() is None:
        resolving.result().close()
