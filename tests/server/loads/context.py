"""What loads work with, around a staging buffer to try."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from penstock.server.loads.request import LoadContext
from penstock.server.system.fair import FairExecutor

from ..bench import Bench, running
from ..support import ClockLoop


@asynccontextmanager
async def load_context(**config: Any) -> AsyncIterator[tuple[Bench, LoadContext]]:
    """A buffer, as `running` makes it, and what loads work with."""
    async with running(**config) as bench:
        threads = FairExecutor(4, "test")
        loop = asyncio.get_running_loop()
        if isinstance(loop, ClockLoop):
            loop.stand_still_while(lambda: not threads.idle)
        yield (
            bench,
            LoadContext(
                catalog=bench.catalog,
                staging=bench.staging,
                totals=bench.totals,
                resolvers=lambda _, uid: threads.of(uid),
                cpu_pool=threads,
                selector=threads,
            ),
        )
        threads.shutdown()
