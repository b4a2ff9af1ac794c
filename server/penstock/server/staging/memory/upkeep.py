"""The staging buffer's background work: takes memory while the system has room for it, populates it, and
gives back what nobody uses."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from ...config.settings import Config
from ...config.units import show_size
from ...system.failure import NoThreadError
from ...system.headroom import buffer_headroom, spare_bytes
from ...system.log import event
from ..pool import SlabPool, Workers

logger = logging.getLogger(__name__)

HEADROOM_SECONDS = 1.0
LOOK_SECONDS = 0.25
"""Between two looks for memory that is to go back to the system."""
FREE_SECONDS = 60.0
"""Slabs without a checkpoint go back after this: they only save the cost of fresh pages."""


class Upkeep:
    """Of one pool. `run` it once, on the event loop; what blocks runs on `workers`."""

    def __init__(
        self,
        config: Config,
        pool: SlabPool,
        workers: Workers,
        *,
        may_populate: Callable[[], bool],
        evict_idle: Callable[[float], None],
        evict_for: Callable[[int], None],
        spare: Callable[[], int] = spare_bytes,
    ) -> None:
        """`evict_idle` evicts what nobody has used since a time of the loop's clock. `evict_for` evicts what
        nobody uses, least recently used first, until so many slabs are free. `spare` says how much memory
        the system has to spare, as `spare_bytes` does."""
        self.populating = False
        """The buffer's pages are being made."""
        self._config = config
        self._pool = pool
        self._workers = workers
        self._may_populate = may_populate
        self._evict_idle = evict_idle
        self._evict_for = evict_for
        self._spare = spare
        self._blind = False
        """The last look at the system's memory failed."""
        pool.limit_headroom(self._headroom_slabs())

    async def run(self) -> None:
        """For ever."""
        growing = asyncio.create_task(self._grow())
        try:
            await self._populate()
            await self._trim()
            await growing
        finally:
            growing.cancel()

    def _headroom_slabs(self) -> int:
        return buffer_headroom(self._config.capacity_bytes) // self._pool.slab_bytes

    async def _grow(self) -> None:
        """Takes what others let go, until the whole limit can be had."""
        pool = self._pool
        if pool.headroom_slabs < pool.max_slabs and self._config.memory_limit > 0:
            logger.warning(
                "the machine or the container has memory for only %s of the staging buffer's %s; others hold "
                "the rest, perhaps clients of an earlier penstockd, and it is added as they let go",
                show_size(pool.headroom_slabs * pool.slab_bytes),
                show_size(self._config.capacity_bytes),
            )
        while pool.headroom_slabs < pool.max_slabs:
            await asyncio.sleep(HEADROOM_SECONDS)
            loop, workers = asyncio.get_running_loop(), self._workers.of(os.geteuid())
            try:
                pool.grow_headroom(await loop.run_in_executor(workers, self._headroom_slabs))
            except (OSError, MemoryError, NoThreadError) as error:
                logger.warning("how much memory there is could not be asked: %s", error)

    async def _populate(self) -> None:
        if self._config.populate:
            self.populating = True
            await self._pool.populate(self._may_populate)
            self.populating = False
            event(logger, "populated", {"bytes": self._pool.existing_slabs * self._pool.slab_bytes})

    async def _trim(self) -> None:
        """Without a limit: gives back what nobody has used for long, and at once what others lack."""
        loop, after = asyncio.get_running_loop(), self._config.trim_after_seconds
        while self._config.trims:
            await asyncio.sleep(LOOK_SECONDS)
            self._evict_idle(loop.time() - after)
            await self._pool.trim(min(after, FREE_SECONDS))
            if self._pool.existing_slabs:
                await self._give_back(max(0, -await self.spare_slabs()))

    async def _give_back(self, missing_slabs: int) -> None:
        """Free slabs first, then checkpoints that are only warm."""
        if not missing_slabs:
            return
        self._evict_for(missing_slabs)
        if given := await self._pool.shrink(missing_slabs):
            slab_bytes = self._pool.slab_bytes
            fields = {"missing": missing_slabs * slab_bytes, "given_back": given * slab_bytes}
            event(logger, "memory is short", fields)

    async def spare_slabs(self) -> int:
        """How many more the system has memory for, at most; negative: so many have to go back."""
        loop, workers = asyncio.get_running_loop(), self._workers.of(os.geteuid())
        try:
            spare_bytes = await loop.run_in_executor(workers, self._spare)
        except (OSError, MemoryError, NoThreadError, ValueError) as error:
            if not self._blind:
                logger.warning("how much memory is left could not be asked: %s", error)
            self._blind = True
            return 0
        self._blind = False
        return spare_bytes // self._pool.slab_bytes
