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
import logging
import os
import random
from dataclasses import dataclass, field

from ...checkpoint.files import Checkpoint
from ...config.units import show_size
from ...errors import PenstockError, StagingExhaustedError
from ...sources import Access
from ...staging.entry import CacheEntry
from ...system import failure
from ...system.log import event
from ...system.shown import encodable
from ..admission import resolve
from ..at_start import DaemonItself, Run
from ..prefetch import Prefetch, Progress
from ..request import LoadContext, Queued, Request
from .disk import Pins, ToDisk
from .survey import Survey, measure
from .wishes import Wish

logger = logging.getLogger(__name__)

STATES = ("waiting", "reading", "warm", "on_disk", "failed", "does_not_fit")
LOOK_SECONDS = 1.0
"""Between two looks whether it was evicted."""
ROOM_SECONDS = 5.0
"""Between two looks whether there is room for it."""
RETRY_SECONDS = 1.0
RETRY_MAX_SECONDS = 300.0
JITTER = 0.2
"""Of the interval, so that the nodes of a fleet do not ask a store at the same moment."""
AT_ONCE = 4
"""Checkpoints staged at a time: the first of the file are warm first."""
SLOT_SECONDS = 60.0
"""Then the next one begins beside it: a mount that hangs holds up only its own checkpoints."""


@dataclass(slots=True)
class Shared:
    """What the keepers of one set have in common."""

    context: LoadContext
    run: Run
    interval_seconds: float
    has_tier: bool
    """There is a local disk that keeps what is read."""
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    disk: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held by the one whose checkpoint passes to the local disk."""
    staging: set[Keeper] = field(default_factory=set)
    """Those that stage their checkpoint, and may have no memory for it yet."""


class _WarmUp(Prefetch):
    """A prefetch that leaves its entry to a keeper."""

    def __init__(self, wish: Wish, keeper: Keeper, shared: Shared, *, keep_old: bool) -> None:
        super().__init__(keeper.request, keeper.caller, keeper.access(), shared.context, pin=False)
        self._warm_as = wish
        self._keeps_old = keep_old

    def _keep(self, entry: CacheEntry) -> None:
        entry.want(self._warm_as.name, self._warm_as.sources, pin=self._warm_as.pin)


class Keeper:
    """Of one wish. `run` it once; `release` it when the wish is gone. The fields are for status."""

    def __init__(self, wish: Wish, shared: Shared, ahead: Keeper | None) -> None:
        """`ahead` stands before it in the file, and may take memory first."""
        self.wish = wish
        self.state = "waiting"
        self.reason = ""
        """Why it is not warm, or why it may not be the newest version."""
        self.needed_bytes = self.left_bytes = 0
        """What it takes, and what it can have; told where it does not fit."""
        self.checked_at: float | None = None
        """When storage was last asked which version it has."""
        self.request = Request(wish.sources, variant=wish.variant, patterns=wish.tensors)
        self.caller = DaemonItself(os.geteuid(), os.getpid())
        self._shared = shared
        self._ahead = ahead
        self._decided = asyncio.Event()
        """It has taken its memory, or can have none for now."""
        self._entry: CacheEntry | None = None
        self._pins = Pins()
        self._on_disk = False
        self._copied = ""
        """The version that passed to the local disk, as far as that took it."""
        self._prefetch: Prefetch | None = None
        self._loop = asyncio.get_running_loop()
        self.since = self._loop.time()
        """When it came into its state."""
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
            self._decided.set()

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
            self._decided.set()
            await self._rest(pause)

    def change_pin(self, wish: Wish) -> None:
        """The wish is another only in whether it pins."""
        self.wish = wish
        if self.entry is not None and self.entry.wanted_as(wish.name):
            self.entry.want(wish.name, wish.sources, pin=wish.pin)

    def release(self) -> None:
        """The wish is gone: what is warm is so as after a load."""
        if self._entry is not None:
            self._entry.unwant(self.wish.name)
        self._pins.hold(())

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
                held.want(self.wish.name, self.wish.sources, pin=self.wish.pin)
                self._become("warm", self._doubts(stale_seconds))
                return
            survey = await self._measure(checkpoint)
        finally:
            checkpoint.close()
        if not self._lacks_memory:
            self._become("waiting")
        await self._wait_for_turn()
        async with self._shared.slots:
            room = await self._room(survey)
            staging = asyncio.ensure_future(self._get(survey, room))
            if room is not None:
                self._shared.staging.add(self)
            self._decided.set()
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

    async def _wait_for_turn(self) -> None:
        """Memory is given in the order of the file. A mount that hangs delays others for a while only."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None:
            deciding = asyncio.ensure_future(ahead._decided.wait())
            try:
                await asyncio.wait([deciding], timeout=SLOT_SECONDS)
            finally:
                deciding.cancel()

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
        self._become(self._without_memory, self._numbers())
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
        self._become(self._without_memory, self._numbers())

    @property
    def _lacks_memory(self) -> bool:
        return self.state in ("does_not_fit", "on_disk")

    @property
    def _without_memory(self) -> str:
        return "on_disk" if self._on_disk else "does_not_fit"

    async def _left_bytes(self) -> int:
        free_only = not self.wish.pin and self._loop.time() < self._free_only_until
        spare_bytes = await self._shared.context.staging.spare_bytes(
            evicting=not free_only, evicting_wanted=self.wish.pin
        )
        return spare_bytes - sum(keeper._promised_bytes for keeper in self._shared.staging)

    @property
    def _promised_bytes(self) -> int:
        """What it is about to take, as long as it has not taken it."""
        entry = self._prefetch.entry if self._prefetch is not None else None
        return 0 if entry is not None and entry.slab_count else self.needed_bytes

    def _numbers(self) -> str:
        return (
            f"it needs {show_size(self.needed_bytes)}, and {show_size(self.left_bytes)} can be had beside "
            "what is in use or kept warm already; raise --memory-limit, or keep less warm"
        )

    async def _stage(self, *, keep_old: bool) -> None:
        shared, old, began = self._shared, self.entry, self._loop.time()
        self._prefetch = prefetch = _WarmUp(self.wish, self, shared, keep_old=keep_old)
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
        self._become("warm", self._doubts(prefetch.stale_seconds))

    def _doubts(self, stale_seconds: float | None) -> str:
        """Why what is warm may not be what the file asks for."""
        if stale_seconds is not None:
            return "whether it is the newest version could not be asked: its store does not answer"
        if self.wish.tier and not self._shared.has_tier:
            return "nothing of it is kept on a local disk: give penstockd --tier-dir, or remove tier"
        return ""

    async def _hear(self, told: object) -> None:
        if isinstance(told, Progress):
            self._become("reading")
        elif isinstance(told, Queued):
            self._become("waiting", told.reason)

    # ---- between rounds -------------------------------------------------------------------------

    async def _rest(self, seconds: float) -> None:
        """Until so many have passed, or there is something to do."""
        ends = self._loop.time() + seconds
        looked = self._loop.time()
        while (now := self._loop.time()) < ends:
            if self._lost():
                return
            if self._lacks_memory and now >= looked + ROOM_SECONDS:
                looked = now
                self.left_bytes = max(0, await self._left_bytes())
                if self.needed_bytes <= self.left_bytes:
                    return
                self._become(self._without_memory, self._numbers())
            await asyncio.sleep(min(LOOK_SECONDS, max(0.0, ends - now)))

    def _lost(self) -> bool:
        """It was evicted, for others or by an operator."""
        if self._entry is None or (self.entry is not None and self._entry.wanted_as(self.wish.name)):
            return False
        if self.entry is None:
            self._entry = None
            self._free_only_until = self._loop.time() + self._shared.interval_seconds
        self._become("waiting", "it was evicted")
        return True

    def _fail(self, error: PenstockError) -> None:
        if self.entry is not None and error.retryable:
            self._become("warm", f"whether it is the newest version could not be asked: {error.message}")
        elif isinstance(error, StagingExhaustedError):
            self._become(self._without_memory, error.message)
        else:
            self._become("waiting" if error.reason == "TOO_MANY_LOADS" else "failed", error.message)

    def _become(self, state: str, reason: str = "") -> None:
        reason = encodable(reason)
        if state != self.state:
            self.since = self._loop.time()
        numbers_moved = state == self.state and self._lacks_memory
        if (state, reason) != (self.state, self.reason) and not numbers_moved:
            trouble = state in ("failed", "does_not_fit") or (state == "warm" and reason)
            fields = {"name": self.wish.name, "state": state, **({"why": reason} if reason else {})}
            event(logger, "warm set", fields, level=logging.WARNING if trouble else logging.INFO)
        self.state, self.reason = state, reason
