"""The staging buffer's background work: takes memory while the system has room for it, populates it, and
gives back what nobody uses."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from ..config.settings import Config
from ..config.units import show_size
from ..system.failure import NoThreadError
from ..system.headroom import buffer_headroom
from ..system.log import event
from .pool import SlabPool, Workers

logger = logging.getLogger(__name__)

HEADROOM_SECONDS = 1.0
TRIM_SECONDS = 0.5
"""The least between two looks for what nobody uses."""


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
    ) -> None:
        """`evict_idle` evicts what nobody has used since a time of the loop's clock."""
        self.populating = False
        """The buffer's pages are being made."""
        self._config = config
        self._pool = pool
        self._workers = workers
        self._may_populate = may_populate
        self._evict_idle = evict_idle
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
        while self._config.trims:
            await asyncio.sleep(max(self._config.trim_after_seconds / 4, TRIM_SECONDS))
            self._evict_idle(asyncio.get_running_loop().time() - self._config.trim_after_seconds)
            await self._pool.trim(self._config.trim_after_seconds)
