"""Keeps one checkpoint of a warm set warm.

    look which version there is --> is it warm? --> is there room? --> prefetch, then give up the old version
      ^                                                                                             |
      +---- after the interval, sooner when it was evicted, there is room, or a failure is retried --+

Looking asks storage once for each file (and once for a directory's names). Only what does not fit, or was
evicted for others, keeps a look at the memory, which asks storage for nothing.
"""

from __future__ import annotations

import asyncio
import functools
import os
import random

from ...checkpoint.files import Checkpoint
from ...errors import PenstockError, StagingExhaustedError
from ...sources import Access
from ...staging.entry import CacheEntry
from ...system import failure
from ..admission import resolve
from ..at_start import DaemonItself
from ..prefetch import Prefetch, Progress
from ..request import Queued, Request
from .disk import Pins, ToDisk
from .shared import SLOT_SECONDS, Shared, Turn
from .standing import Standing
from .survey import Survey, measure
from .warm_up import WarmUp
from .wishes import Wish

LOOK_SECONDS = 1.0
"""Between two looks whether it was evicted."""
ROOM_SECONDS = 5.0
"""Between two looks whether there is room for it."""
RETRY_SECONDS = 1.0
RETRY_MAX_SECONDS = 300.0
JITTER = 0.2
"""Of the interval, so that the nodes of a fleet do not ask a store at the same moment."""


class Keeper(Standing):
    """Of one wish. `run` it once; `release` it when the wish is gone."""

    def __init__(self, wish: Wish, shared: Shared, ahead: Keeper | None) -> None:
        """`ahead` stands before it in the file, and may take memory first."""
        super().__init__(wish)
        self.request = Request(wish.sources, variant=wish.variant, patterns=wish.tensors)
        self.caller = DaemonItself(os.geteuid(), os.getpid())
        self._shared = shared
        self.turn: Turn = Turn(ahead.turn if ahead is not None else None)
        self._entry: CacheEntry | None = None
        self._pins = Pins()
        self._on_disk = False
        self._copied = ""
        """The version that passed to the local disk, as far as that took it."""
        self._prefetch: Prefetch | None = None
        self._loop = asyncio.get_running_loop()
        self._released = False
        self._free_only_until = 0.0
        """It was evicted for others: until then it takes only memory that is free."""

    def access(self) -> Access:
        """For one look, since it keeps what a branch was."""
        return Access(self.caller.uid, privileged=True, prefixes=())

    @property
    def entry(self) -> CacheEntry | None:
        """The entry of the buffer that is kept for it."""
        held = self._entry
        return held if held is not None and not held.closed and held.error is None and held.full else None

    @property
    def progress(self) -> tuple[int, int]:
        """Bytes that are in the buffer, and of how many."""
        if self._prefetch is not None:
            return self._prefetch.delivered_bytes, self._prefetch.total_bytes
        ring = self.entry.ring if self.entry is not None else None
        return (ring.ready_bytes, ring.total_bytes) if ring is not None else (0, 0)

    async def run(self) -> None:
        """For ever."""
        try:
            await self._run()
        finally:
            self.turn.decide()

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                await self._round()
                failures = 0
                pause = self._shared.interval_seconds * random.uniform(1 - JITTER, 1 + JITTER)
            except Exception as caught:
                self._fail(failure.explain(caught, f"keeping {self.wish.name} warm"))
                pause = min(RETRY_SECONDS * 2**failures, RETRY_MAX_SECONDS) * random.uniform(0.5, 1)
                failures = min(failures + 1, 32)
            self.turn.decide()
            await self._rest(pause)

    def change_pin(self, wish: Wish) -> None:
        """The wish is another only in whether it pins."""
        self.wish = wish
        if self.entry is not None and self.entry.wanted_as(wish.name):
            self._want(self.entry)

    def release(self) -> None:
        """The wish is gone: what is warm is so as after a load."""
        self._released = True
        if self._entry is not None:
            self._entry.unwant(self.wish.name)
        self._pins.close()

    def _want(self, entry: CacheEntry) -> None:
        """The entry stays warm, unless the wish went in this very moment."""
        if not self._released:
            entry.want(self.wish.name, self.wish.sources, pin=self.wish.pin)

    async def _round(self) -> None:
        checkpoint = await resolve(self._shared.context, self.request, self.access())
        if checkpoint.stale_seconds is None:
            self.checked_at = self._loop.time()
        try:
            if self.wish.tier:
                self._pins.hold(checkpoint.files)
            held = self.entry
            stale_seconds = checkpoint.stale_seconds
            if held is not None and (held.version == checkpoint.version or stale_seconds is not None):
                self._want(held)
                self.become("warm", self._doubts(stale_seconds))
                return
            survey = await self._measure(checkpoint)
        finally:
            checkpoint.close()
        if not self.lacks_memory:
            self.become("waiting")
        await self.turn.wait()
        async with self._shared.slots:
            room = await self._room(survey)
            staging = asyncio.ensure_future(self._get(survey, room))
            if room is not None:
                self._shared.staging.add(self)
            self.turn.decide()
            try:
                await asyncio.wait([staging], timeout=SLOT_SECONDS if room is not None else 0)
            except asyncio.CancelledError:
                staging.cancel()
                await asyncio.gather(staging, return_exceptions=True)
                self._shared.staging.discard(self)
                raise
        try:
            await staging
        finally:
            staging.cancel()
            await asyncio.gather(staging, return_exceptions=True)
            self._shared.staging.discard(self)

    async def _get(self, survey: Survey, room: bool | None) -> None:
        if room is not None:
            await self._stage(keep_old=room)
        else:
            await self._copy_to_disk(survey)

    async def _measure(self, checkpoint: Checkpoint) -> Survey:
        context, uid = self._shared.context, self.caller.uid
        measuring = functools.partial(measure, context, self.request, checkpoint, uid)
        return await self._loop.run_in_executor(context.selector.of(uid), measuring)

    async def _room(self, survey: Survey) -> bool | None:
        """Whether it can be staged beside the old version. None: not at all, as its state says then."""
        staging, old = self._shared.context.staging, self.entry
        old_bytes = 0
        if old is not None and old.idle:
            old_bytes = old.unused_slabs * staging.pool.slab_bytes
        left_bytes = await self._left_bytes() if survey.fits else staging.capacity_bytes - old_bytes
        self.needed_bytes, self.left_bytes = survey.needed_bytes, max(0, left_bytes + old_bytes)
        if survey.fits and survey.needed_bytes <= left_bytes:
            return True
        if old is not None:  # it serves no load any more
            staging.evict(lambda entry: entry is old)
        if survey.fits and survey.needed_bytes <= left_bytes + old_bytes:
            return False
        self._on_disk = survey.on_disk
        self.become(self._without_memory, self.numbers())
        return None

    async def _copy_to_disk(self, survey: Survey) -> None:
        """It has no memory, and is to be on the local disk: it passes through a window, once a version."""
        shared = self._shared
        if not (self.wish.tier and shared.has_tier) or survey.on_disk or self._copied == survey.version:
            return
        async with shared.disk:
            spare_bytes = await shared.context.staging.spare_bytes(evicting=True, evicting_wanted=False)
            if spare_bytes < survey.window_bytes:
                return
            memory_bytes = survey.window_bytes
            self._prefetch = copy = ToDisk(
                self.request, self.caller, self.access(), shared.context, memory_bytes=memory_bytes
            )
            try:
                await shared.run(copy, self._hear)
            finally:
                self._prefetch = None
        self._copied = survey.version
        if copy.entry is not None:
            self._pins.hold(copy.entry.checkpoint.files)
        self._on_disk = copy.complete
        self.become(self._without_memory, self.numbers())

    @property
    def _without_memory(self) -> str:
        return "on_disk" if self._on_disk else "does_not_fit"

    async def _left_bytes(self) -> int:
        free_only = not self.wish.pin and self._loop.time() < self._free_only_until
        return await self._shared.left_bytes(free_only=free_only, pin=self.wish.pin)

    @property
    def promised_bytes(self) -> int:
        """See `Promise`."""
        entry = self._prefetch.entry if self._prefetch is not None else None
        return 0 if entry is not None and entry.slab_count else self.needed_bytes

    async def _stage(self, *, keep_old: bool) -> None:
        shared, old, began = self._shared, self.entry, self._loop.time()
        self._prefetch = prefetch = WarmUp(
            self.request, self.caller, self.access(), shared.context, keep=self._want, keep_old=keep_old
        )
        try:
            await shared.run(prefetch, self._hear)
            self._entry = prefetch.entry
        finally:
            self._prefetch = None
        entry = self.entry
        if entry is None:  # evicted in this very moment
            return
        if old is not None and old is not entry:
            old.unwant(self.wish.name)
            if old.version != entry.version:
                shared.context.staging.evict(lambda one: one is old)
        if prefetch.stale_seconds is None:
            shared.context.staging.evict_old_versions(entry.checkpoint, began)
        if self.wish.tier:
            self._pins.hold(entry.checkpoint.files)
        self.become("warm", self._doubts(prefetch.stale_seconds))

    def _doubts(self, stale_seconds: float | None) -> str:
        """Why what is warm may not be what the file asks for."""
        if stale_seconds is not None:
            return "whether it is the newest version could not be asked: its store does not answer"
        if self.wish.tier and not self._shared.has_tier:
            return "nothing of it is kept on a local disk: give penstockd --tier-dir, or remove tier"
        return ""

    async def _hear(self, told: object) -> None:
        if isinstance(told, Progress):
            self.become("reading")
        elif isinstance(told, Queued):
            self.become("waiting", told.reason)

    # ---- between rounds -------------------------------------------------------------------------

    async def _rest(self, seconds: float) -> None:
        """Until so many have passed, or there is something to do."""
        ends = self._loop.time() + seconds
        looked = self._loop.time()
        while (now := self._loop.time()) < ends:
            if self._lost():
                return
            if self.lacks_memory and now >= looked + ROOM_SECONDS:
                looked = now
                self.left_bytes = max(0, await self._left_bytes())
                if self.needed_bytes <= self.left_bytes:
                    return
                self.become(self._without_memory, self.numbers())
            await asyncio.sleep(min(LOOK_SECONDS, max(0.0, ends - now)))

    def _lost(self) -> bool:
        """It was evicted, for others or by an operator."""
        if self._entry is None or (self.entry is not None and self._entry.wanted_as(self.wish.name)):
            return False
        if self.entry is None:
            self._entry = None
            self._free_only_until = self._loop.time() + self._shared.interval_seconds
        self.become("waiting", "it was evicted")
        return True

    def _fail(self, error: PenstockError) -> None:
        if self.entry is not None and error.retryable:
            self.become("warm", f"whether it is the newest version could not be asked: {error.message}")
        elif isinstance(error, StagingExhaustedError):
            self.become(self._without_memory, error.message)
        else:
            self.become("waiting" if error.reason == "TOO_MANY_LOADS" else "failed", error.message)
