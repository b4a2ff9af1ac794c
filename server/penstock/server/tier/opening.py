"""The tier of a daemon at its start, or why it has none."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from ..config.units import show_size
from ..system.fair import FairExecutor
from ..system.log import event
from .directory import Directory, LockedError
from .tier import Tier

logger = logging.getLogger(__name__)

OPENING_SECONDS = 60
"""Looking at ten thousand files of a healthy disk takes less than one."""


async def open_in_time(path: Path | None, limit_bytes: int) -> Tier | None:
    """None: there is none, also if its disk does not answer. Raises ConfigError."""
    if path is None:
        return None
    opener = FairExecutor(1, "tier-opener")  # of its own, as it may hang
    opening = opener.submit(os.geteuid(), open_tier, path, limit_bytes)
    try:
        return await asyncio.wait_for(asyncio.wrap_future(opening), OPENING_SECONDS)
    except asyncio.TimeoutError:
        why = {"directory": str(path), "why": f"its disk did not answer for {OPENING_SECONDS} s"}
        hint = {"hint": "penstockd runs without it; see to the disk, and start penstockd again"}
        event(logger, "no tier", {**why, **hint}, level=logging.WARNING)
        return None
    finally:
        opener.shutdown()


def open_tier(path: Path, limit_bytes: int) -> Tier | None:
    """None, with a warning, where another daemon has the directory or it cannot be used. Raises ConfigError
    for a directory that is not the daemon's alone. Waits for the disk."""
    try:
        directory = Directory(path)
        try:
            tier = Tier(directory, limit_bytes)
        except BaseException:
            directory.close()
            raise
    except LockedError:
        why, hint = "another penstockd has it", "give each penstockd a --tier-dir of its own"
    except OSError as error:
        why, hint = error.strerror or str(error), "see to the disk, or name another --tier-dir"
    else:
        fields = {"directory": str(path), "limit": show_size(limit_bytes), "used": show_size(tier.used_bytes)}
        event(logger, "tier", {**fields, "versions": tier.version_count})
        return tier
    event(
        logger,
        "no tier",
        {"directory": str(path), "why": why, "hint": f"penstockd runs without it; {hint}"},
        level=logging.WARNING,
    )
    return None
