"""The slabs that exist: made, populated, kept for reuse, retired. Never more than `max_slabs`.

Writing to a fresh page costs several times as much as writing to a used one, so slabs are kept. A slab that a
user has held goes only to that user again. For another user it is closed, and a new one is made.

All methods run on the event loop and decide at once over plain state. Making, populating and closing slabs is
slow and runs on `workers`. The pool knows nothing of entries and queues; `allocator.py` does.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from typing import Any, Protocol, TypeVar

from ..system.failure import NoThreadError
from .slab import Slab

logger = logging.getLogger(__name__)

POPULATORS = 2

_T = TypeVar("_T")


class Workers(Protocol):
    """Threads that serve users in turn, as `FairExecutor` does."""

    def of(self, uid: int) -> Executor: ...


class SlabPool:
    def __init__(
        self, *, slab_bytes: int, max_slabs: int, workers: Workers, on_free: Callable[[], None]
    ) -> None:
        """`on_free` is called when more slabs than before may be taken."""
        self.slab_bytes = slab_bytes
        self.max_slabs = max_slabs
        self._headroom_slabs = max_slabs
        self._workers = workers
        self._on_free = on_free
        self._free: list[tuple[Slab, float]] = []
        """Slabs that nobody uses, each with the time since when; oldest first."""
        self._taken = 0
        """Slabs in use, including those that are still being made for an entry."""
        self._working = 0
        """Slabs that are being populated or closed: they exist but cannot be taken."""
        self.peak_slabs = 0
        self._stopped = False

    @property
    def available(self) -> int:
        """How many slabs may be taken now."""
        return self._headroom_slabs - self._taken - self._working

    @property
    def headroom_slabs(self) -> int:
        """How many slabs the system has memory for: at most `max_slabs`, and never fewer than before."""
        return self._headroom_slabs

    def limit_headroom(self, slabs: int) -> None:
        """Lets no more than so many slabs exist until `grow_headroom`. Called before any exist."""
        assert not self.existing_slabs
        self._headroom_slabs = min(slabs, self.max_slabs)

    def grow_headroom(self, slabs: int) -> None:
        if slabs > self._headroom_slabs:
            self._headroom_slabs = min(slabs, self.max_slabs)
            self._on_free()

    @property
    def free_slabs(self) -> int:
        return len(self._free)

    @property
    def existing_slabs(self) -> int:
        """Slabs that exist or are being made."""
        return self._taken + self._working + len(self._free)

    def take(self, count: int, owner_uid: int | None) -> Coroutine[Any, Any, list[Slab]]:
        """Takes `count` slabs, at most `available`, that nobody but `owner_uid` has ever held. They belong to
        the caller until `release`. They are taken at once. The result must be awaited and not cancelled, or
        slabs that are being made would be lost. If the system has no more, raises OSError, MemoryError or
        NoThreadError, and takes nothing."""
        if count > self.available:
            raise AssertionError(f"{count} slabs asked for, {self.available} available")
        self._taken += count
        slabs, foreign = self._pick(count, owner_uid)
        # What is promised here counts already. The next caller may come before these slabs are closed and the
        # new ones made, and then closes as many more as it needs.
        doomed = foreign[: max(0, self.existing_slabs - self._headroom_slabs)]
        doomed_ids = {id(slab) for slab in doomed}
        self._free = [entry for entry in self._free if id(entry[0]) not in doomed_ids]
        self.peak_slabs = max(self.peak_slabs, self.existing_slabs)
        return self._bring(slabs, doomed, count - len(slabs), owner_uid)

    def release(self, slabs: Sequence[Slab], *, missing: int = 0, idle_since: float | None = None) -> None:
        """Takes slabs back for reuse. `missing` more were promised but never made. `idle_since` is when they
        were last used, if not just now."""
        since = asyncio.get_running_loop().time() if idle_since is None else idle_since
        self._free += [(slab, since) for slab in slabs]
        self._taken -= len(slabs) + missing
        self._on_free()

    async def trim(self, older_than_seconds: float) -> None:
        """Gives slabs that were free for that long back to the system."""
        limit = asyncio.get_running_loop().time() - older_than_seconds
        old = [slab for slab, since in self._free if since <= limit]
        self._free = [entry for entry in self._free if entry[1] > limit]
        await self._retire(old)

    async def shrink(self, count: int) -> int:
        """Gives up to `count` free slabs back to the system, longest free first. How many it gave."""
        old, self._free = self._free[:count], self._free[count:]
        await self._retire([slab for slab, _ in old])
        return len(old)

    async def populate(self, may_go_on: Callable[[], bool]) -> None:
        """Makes every slab that the limit allows and touches its pages, pausing while not `may_go_on()`."""
        await asyncio.gather(*(self._populate(may_go_on) for _ in range(POPULATORS)))

    async def stop(self) -> None:
        """Closes the free slabs. Slabs in use belong to their users."""
        self._stopped = True
        free, self._free = [slab for slab, _ in self._free], []
        await self._retire(free)

    def _pick(self, count: int, owner_uid: int | None) -> tuple[list[Slab], list[Slab]]:
        """Takes up to `count` free slabs that `owner_uid` may have off the list, latest used first. Also
        returns those that it may not have; they stay on the list."""
        picked: list[Slab] = []
        rest: list[tuple[Slab, float]] = []
        foreign: list[Slab] = []
        for entry in reversed(self._free):
            slab = entry[0]
            if slab.owner_uid not in (None, owner_uid):
                foreign.append(slab)
                rest.append(entry)
            elif len(picked) < count:
                picked.append(slab)
            else:
                rest.append(entry)
        rest.reverse()
        self._free = rest
        return picked, foreign

    async def _populate(self, may_go_on: Callable[[], bool]) -> None:
        while not self._stopped and self.existing_slabs < self.max_slabs:
            if not may_go_on() or self.existing_slabs >= self._headroom_slabs:
                await asyncio.sleep(0.05)
                continue
            self._working += 1
            self.peak_slabs = max(self.peak_slabs, self.existing_slabs)
            try:
                slab = await self._run(os.geteuid(), _make_populated, self.slab_bytes)
            except (OSError, MemoryError, NoThreadError) as error:
                logger.warning("populating the staging buffer stopped: %s", error)
                return
            else:
                self._free.insert(0, (slab, asyncio.get_running_loop().time()))
            finally:
                self._working -= 1
                self._on_free()

    async def _bring(
        self, slabs: list[Slab], doomed: Sequence[Slab], missing: int, owner_uid: int | None
    ) -> list[Slab]:
        uid = os.geteuid() if owner_uid is None else owner_uid
        try:
            if doomed:
                await self._close(uid, doomed)
            if missing:
                slabs += await self._run(uid, _make, missing, self.slab_bytes)
        except BaseException:
            self.release(slabs, missing=missing)
            raise
        return slabs

    async def _retire(self, slabs: Sequence[Slab]) -> None:
        if not slabs:
            return
        self._working += len(slabs)
        try:
            await self._close(os.geteuid(), slabs)
        finally:
            self._working -= len(slabs)
            self._on_free()

    async def _close(self, uid: int, slabs: Sequence[Slab]) -> None:
        try:
            await self._run(uid, _close, slabs)
        except NoThreadError:
            _close(slabs)  # here, as memory that is not given back would be lost

    async def _run(self, uid: int, call: Callable[..., _T], *arguments: object) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._workers.of(uid), call, *arguments)


def _make(count: int, size_bytes: int) -> list[Slab]:
    slabs: list[Slab] = []
    try:
        for _ in range(count):
            slabs.append(Slab(size_bytes))
    except BaseException:
        _close(slabs)
        raise
    return slabs


def _make_populated(size_bytes: int) -> Slab:
    slab = Slab(size_bytes)
    try:
        slab.populate()
    except BaseException:
        slab.close()
        raise
    return slab


def _close(slabs: Sequence[Slab]) -> None:
    with contextlib.ExitStack() as stack:  # if one fails, the others are closed all the same
        for slab in slabs:
            stack.callback(slab.close)
