"""Gives up warm checkpoints whose files are gone, as after an unmount."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from ..sources.store import Events, Store
from ..system.log import event
from .buffer import StagingBuffer

logger = logging.getLogger(__name__)


def watch(stores: Iterable[Store], staging: StagingBuffer) -> Callable[[], None]:
    """Evicts what the stores report as gone. Returns a function that ends it."""
    loop = asyncio.get_running_loop()
    watched = [events for store in stores if (events := store.gone_events()) is not None]
    for events in watched:
        loop.add_reader(events.fileno(), _evict, events, staging)

    def unwatch() -> None:
        for events in watched:
            loop.remove_reader(events.fileno())
            events.close()

    return unwatch


def _evict(events: Events, staging: StagingBuffer) -> None:
    events.clear()
    gone = {
        entry
        for entry in staging.entries.values()
        if any(file.unmounted() for file in entry.checkpoint.files)
    }
    if gone:
        event(logger, "unmounted", {"stages": len(gone)})
        staging.evict(lambda entry: entry in gone)
