"""From a client's request to an entry in the staging buffer: resolve, choose, admit.

Loads and prefetches begin alike. What they do with their entry is in `load.py` and `prefetch.py`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import ClassVar, TypeVar

from ..checkpoint.catalog import NO_WISH
from ..checkpoint.files import Checkpoint
from ..checkpoint.selection import Selection, select
from ..config.units import show_size
from ..errors import CheckpointChangedError, CheckpointCorruptError, InvalidRequestError
from ..sources import Access
from ..sources.looking import ListingCost
from ..sources.resuming import continues
from ..sources.stores import kind_of
from ..sources.verification import Wish
from ..staging.entry import CacheEntry
from ..staging.members import Holder
from ..system.log import event
from ..system.shown import shown_source
from .names import Names
from .request import Caller, Emit, Listing, LoadContext, Queued, Request
from .selecting import ClientChoice, left_to_load

_T = TypeVar("_T")

logger = logging.getLogger(__name__)

WAITS_FOR_CHOICE = "its client to choose tensors"
WAITS_FOR_MEMORY = "waiting for staging memory that other loads use"


class Admission:
    """One client's way to an entry in the staging buffer. `state` and the numbers are for status and the
    log."""

    _keeps_old = False
    """It leaves older versions of the checkpoint in the buffer."""
    kind: ClassVar[str]
    """Its kind in the log and in status: load or prefetch."""

    def __init__(self, request: Request, caller: Caller, access: Access, context: LoadContext) -> None:
        self.id = secrets.token_hex(4)
        self.request = request
        self.caller = caller
        self.state = "resolving"
        self.entry: CacheEntry | None = None
        self.delivered_bytes = 0
        self.memory_bytes = self.tier_bytes = 0
        """Of `delivered_bytes`, those that were in the staging buffer when it came, and those that were read
        from the tier; the others came from storage."""
        self.total_bytes = 0
        self.began = asyncio.get_running_loop().time()
        self.queued_since = 0.0
        """When it began to wait for memory. `waited_seconds` is how long it waited."""
        self.waited_seconds = 0.0
        self.warm_segments: frozenset[int] = frozenset()
        """Segments that were in the staging buffer before it joined."""
        self.read_before = 0
        """Bytes that had been read into the entry before it joined."""
        self.tier_before = 0
        """Of these, from the tier."""
        self.was_warm = False
        """Whether everything that it asked for was in the staging buffer before it joined."""
        self.finished = False
        """Whether it has got everything that it asked for: if the caller goes away now, nothing is lost."""
        self.stale_seconds: float | None = None
        """Its store could not be asked; see `Checkpoint.stale_seconds`."""
        self._access = access
        self._context = context
        self._wish = NO_WISH
        self._choice = ClientChoice()
        self._unsubscribe: Callable[[], object] = lambda: None

    @property
    def source(self) -> str:
        """The kind of store of its first source."""
        return kind_of(next(iter(self.request.sources), ""))

    @property
    def waits_for(self) -> str:
        """What it waits for, in words; empty while it makes progress."""
        if self._choice.waiting:
            return WAITS_FOR_CHOICE
        return WAITS_FOR_MEMORY if self.state == "waiting" else ""

    @property
    def awaits_choice(self) -> bool:
        return self.request.list_tensors and not self._choice.made

    def choose(self, names: Names | Sequence[str]) -> None:
        """Sets the client's answer to the listing."""
        self._choice.make(names)

    async def _enter(
        self, emit: Emit, *, owner_uid: int | None, whole: bool = False
    ) -> tuple[Checkpoint, Selection, CacheEntry]:
        """Joins a staged checkpoint that has its slabs, and holds it under the key `self`. The caller must
        call `leave(self)` on the entry. `owner_uid` is the uid that gets the slabs, if that is known. With
        `whole` it neither joins nor makes a window; but it may join an entry that waits and becomes one."""
        checkpoint = await self._resolve()
        try:
            selection, made_for = await self._select(checkpoint, emit)
            entry = await self._admit(checkpoint, selection, made_for, owner_uid=owner_uid, whole=whole)
        finally:
            if self.entry is None or self.entry.checkpoint is not checkpoint:
                checkpoint.close()
        await self._wait_for_memory(entry, emit)
        assert entry.verifier is not None
        damaged = entry.verifier.damaged_header(checkpoint)
        if damaged is not None:
            self._context.on_corrupt(damaged)
            raise damaged
        return checkpoint, selection, entry

    async def _resolve(self) -> Checkpoint:
        request = self.request
        self._wish = Wish.of(self._context.verify, request.verify, request.digests)
        checkpoint = await resolve(self._context, request, self._access, self._wish)
        if request.expect_version and not continues(request.expect_version, checkpoint.version):
            checkpoint.close()
            raise CheckpointChangedError(
                f"{shown_source(request.sources)} changed since the load to be resumed began; load it again"
            )
        self.stale_seconds = checkpoint.stale_seconds
        if self.stale_seconds is not None:
            self._keeps_old = True  # what is in the buffer may be newer
            self._context.totals.stale_loads += 1
        for warning in checkpoint.warnings:
            event(logger, "odd checkpoint", {"load": self.id, "why": warning}, level=logging.WARNING)
        return checkpoint

    async def _select(self, checkpoint: Checkpoint, emit: Emit) -> tuple[Selection, Selection]:
        names = self.request.names
        if self.request.list_tensors:
            everything = select(checkpoint.tables, None, checkpoint.delivered).files
            names = await self._choice.ask(Listing(checkpoint.tables, everything), emit)
        if names is None and not self.request.patterns:
            # It need not wait for others' names to be looked up.
            return await self._in_thread(left_to_load, self.request, checkpoint, None)
        selecting = self._context.selector.of(self.caller.uid)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(selecting, left_to_load, self.request, checkpoint, names)

    def _release_names(self) -> None:
        """Gives the memory of the names back: they have been looked up, and are not needed again."""
        if isinstance(self.request.names, Names):
            self.request.names.close()
        self._choice.release()

    async def _admit(
        self,
        checkpoint: Checkpoint,
        selection: Selection,
        made_for: Selection,
        *,
        owner_uid: int | None,
        whole: bool,
    ) -> CacheEntry:
        staging, request = self._context.staging, self.request
        demand = await self._in_thread(
            staging.demand, checkpoint, made_for, request.memory_limit, self.caller.uid
        )
        if whole:
            demand = demand.only_whole(staging.capacity_bytes)
        if self.caller.closed:
            raise InvalidRequestError("the handoff connection closed before the load began; keep it open")
        group = request.group.name if request.group else ""
        holder = Holder(
            self.caller.uid, self.caller.pid, request.client_name, self.began, group, self._withdraw
        )
        self.entry = entry = staging.enter(
            checkpoint,
            selection,
            demand,
            key=self,
            holder=holder,
            group=request.group,
            owner_uid=owner_uid,
            made_for=made_for,
            keep_old=self._keeps_old,
        )
        self.warm_segments = entry.ready_segments()
        self.read_before, self.tier_before = entry.read_bytes, entry.tier_bytes
        self._unsubscribe = self.caller.on_close(functools.partial(entry.leave, self))
        return entry

    def _withdraw(self, error: CheckpointCorruptError) -> None:
        """The bytes of a file of its entry are wrong. A prefetch, which gives no bytes to anybody, learns it
        when it waits for the entry."""

    def _leave(self) -> None:
        """Leaves its entry, if it has one, before its caller goes away."""
        if self.entry is not None:
            self.entry.leave(self)
            self._unsubscribe()

    async def _wait_for_memory(self, entry: CacheEntry, emit: Emit) -> None:
        self.queued_since = asyncio.get_running_loop().time()
        self.state = "waiting"
        told = 0
        try:
            while not entry.started and entry.error is None:
                place = self._context.staging.place(entry)
                if place not in (0, told):
                    await emit(Queued(self.id, place, WAITS_FOR_MEMORY))
                    told = place
                else:
                    await entry.wait_change()
            await entry.wait_started()
        finally:
            self.waited_seconds = asyncio.get_running_loop().time() - self.queued_since

    async def _in_thread(self, call: Callable[..., _T], *arguments: object) -> _T:
        cpu_pool = self._context.cpu_pool.of(self.caller.uid)
        return await asyncio.get_running_loop().run_in_executor(cpu_pool, call, *arguments)

    def count(self, result: str) -> None:
        """Counts how it ended: "ok", "failed" or "cancelled"."""
        totals = self._context.totals
        totals.loads[self.source, result] += 1
        if self.state != "resolving":
            totals.load_wait_seconds.observe(self.waited_seconds)

    def first_line(self) -> dict[str, object]:
        """The fields of its log line when it begins."""
        return {
            "load": self.id,
            "kind": self.kind,
            "source": shown_source(self.request.sources),
            "uid": self.caller.uid,
            "pid": self.caller.pid,
            "client": self.request.client_name,
        }

    def log_line(self) -> dict[str, object]:
        """The fields of its log line when it ends."""
        seconds = asyncio.get_running_loop().time() - self.began
        rate = self.delivered_bytes / seconds / 1e9 if seconds > 0 else 0.0
        return {
            "load": self.id,
            "source": shown_source(self.request.sources),
            "uid": self.caller.uid,
            "pid": self.caller.pid,
            "bytes": self.delivered_bytes,
            "size": show_size(self.delivered_bytes),
            "from_memory": self.memory_bytes,
            "from_tier": self.tier_bytes,
            "seconds": round(seconds, 4),
            "gb_per_second": round(rate, 2),
            "waited_seconds": round(self.waited_seconds, 4),
            "stage": self.entry.id if self.entry else 0,
        }


async def resolve(context: LoadContext, request: Request, access: Access, wish: Wish = NO_WISH) -> Checkpoint:
    """The caller has to close it. Raises as `Catalog.resolve` does."""
    access = replace(access, listing=ListingCost())
    resolvers = context.resolvers(request.sources, access.uid)
    resolving = resolvers.submit(
        context.catalog.resolve, request.sources, access, variant=request.variant, wish=wish
    )
    try:
        return await asyncio.wrap_future(resolving)
    except asyncio.CancelledError:
        # Cancelling the one cancelled the other, if that had not begun.
        access.listing.stop()
        resolving.add_done_callback(_close_unwanted)
        raise
    finally:
        del resolving  # or an error and this frame would keep each other, and a header, until gc comes


def _close_unwanted(resolving: Future[Checkpoint]) -> None:
    if not resolving.cancelled() and resolving.exception() is None:
        resolving.result().close()
