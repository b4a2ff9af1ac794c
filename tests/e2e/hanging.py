"""penstockd, of which a part hangs for real until somebody opens the pipe's other end.

    hanging.py PIPE start|loop|readers|shm FLAGS...

`start`: the event loop, before the first client is served. `loop`: the event loop, at SIGUSR1. `readers`:
every read of a file. `shm`: whatever opens a path in /dev/shm, a mount of its own.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from penstock.server import daemon, handoff, log
from penstock.server.config import load_config
from penstock.server.limits import memory_bound
from penstock.server.sources import file


def hang(pipe: str) -> None:
    """Returns when the other end has been opened."""
    os.close(os.open(pipe, os.O_RDONLY))


def hanging_first(call: Callable[..., Any], pipe: str, threads: str) -> Callable[..., Any]:
    """`call`, which hangs first on threads whose name begins with `threads`."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if threading.current_thread().name.startswith(threads):
            hang(pipe)
        return call(*arguments, **named)

    return wrapped


def hanging_in(directory: str, call: Callable[..., int], pipe: str) -> Callable[..., int]:
    """`call`, which hangs first for paths in `directory`."""

    def wrapped(path: str, *arguments: Any) -> int:
        if path.startswith(directory):
            hang(pipe)
        return call(path, *arguments)

    return wrapped


async def serve(pipe: str, part: str, flags: list[str]) -> None:
    config = load_config(flags, os.environ, memory_bound)
    log.set_up(as_json=False, level=config.log_level)
    if part == "loop":
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, hang, pipe)
    elif part == "start":
        handoff.HandoffServer.start = hanging_first(handoff.HandoffServer.start, pipe, "Main")  # type: ignore[method-assign]
    elif part == "shm":
        file.open_path = hanging_in("/dev/shm/", file.open_path, pipe)
    else:
        file.LocalFile.read_into = hanging_first(file.LocalFile.read_into, pipe, "reader-")  # type: ignore[method-assign]
    await daemon.serve(config)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], sys.argv[3:]))
