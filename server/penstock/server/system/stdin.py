"""Notices the end of standard input, by which the parent of a private daemon ends it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable

from ..errors import ConfigError


def watch(on_end: Callable[[], None]) -> None:
    """Calls `on_end` on the running loop when standard input ends. Raises ConfigError for an input that has
    no end to wait for, such as /dev/null or a file."""
    why = "it is closed"
    if sys.stdin is not None:  # None where the descriptor was closed, whose number others may have now
        try:
            asyncio.get_running_loop().add_reader(sys.stdin.fileno(), _readable, on_end)
            return
        except PermissionError:
            why = "it is a file or /dev/null"
    raise ConfigError(
        f"--exit-with-stdin: standard input cannot be watched, as {why}; give penstockd a pipe, and "
        "hold its other end open for as long as it shall run"
    )


def _readable(on_end: Callable[[], None]) -> None:
    if not os.read(sys.stdin.fileno(), 4096):
        asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
        on_end()
