"""What `--prefetch` names: staged when the daemon starts, retried for as long as it takes."""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ..errors import PenstockError
from ..sources import Access
from ..system.log import event
from .prefetch import Prefetch
from .request import Emit, LoadContext, Request

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
RETRY_MAX_SECONDS = 60.0

Run = Callable[[Prefetch, Emit], Awaitable[None]]


@dataclass(slots=True)
class DaemonItself:
    """The caller of the prefetches that the daemon's flags name."""

    uid: int
    pid: int
    closed: bool = False

    def on_close(self, release: Callable[[], None]) -> Callable[[], object]:
        """It never closes before the daemon ends."""
        return lambda: None


async def stage_all(sources: Sequence[str], context: LoadContext, run: Run) -> None:
    """Stages each as a whole and pins it. `run` is what every load and prefetch is run by."""
    await asyncio.gather(*(_stage(source, context, run) for source in sources))


async def _stage(source: str, context: LoadContext, run: Run) -> None:
    caller = DaemonItself(os.geteuid(), os.getpid())
    delay = RETRY_SECONDS
    while True:
        access = Access(caller.uid, privileged=True, prefixes=())  # anew, as it keeps what a branch was
        prefetch = Prefetch(Request((source,)), caller, access, context, pin=True)
        try:
            await run(prefetch, _ignore)
            return
        except PenstockError as error:
            event(
                logger,
                "prefetch failed",
                {"source": source, "error": error.message, "retry_seconds": round(delay, 1)},
                level=logging.WARNING,
            )
        await asyncio.sleep(delay * random.uniform(0.5, 1))
        delay = min(2 * delay, RETRY_MAX_SECONDS)


async def _ignore(_: object) -> None:
    """Progress that nobody watches."""
