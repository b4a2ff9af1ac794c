"""penstockd, of which a part hangs for real until somebody opens the pipe's other end.

    hanging.py PIPE PART FLAGS...

`start`: the event loop, before the first client is served. `loop`: the event loop, at SIGUSR1. `readers`:
every read of a file by a reader thread. `open`, `list`, `stat`, `read`: whoever does that in /dev/shm, a
mount of its own. `no-spares`: the same as `read`, and no more threads can be started for readers.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from penstock.server import daemon
from penstock.server.config.settings import load_config
from penstock.server.edge import handoff
from penstock.server.sources.file import paths
from penstock.server.sources.file.local_file import LocalFile
from penstock.server.sources.stores import FLAGS
from penstock.server.staging.reading import reader
from penstock.server.system import log, statx
from penstock.server.system.limits import memory_bound


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


def in_shm(subject: object) -> bool:
    """Whether a path, a descriptor or an open file is of /dev/shm."""
    if isinstance(subject, int):
        subject = os.readlink(f"/proc/self/fd/{subject}")
    return str(getattr(subject, "uri", subject)).startswith("/dev/shm/")


def hanging_in_shm(call: Callable[..., Any], pipe: str) -> Callable[..., Any]:
    """`call`, which hangs first where its first argument is in /dev/shm."""

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if in_shm(arguments[0]):
            hang(pipe)
        return call(*arguments, **named)

    return wrapped


async def serve(pipe: str, part: str, flags: list[str]) -> None:
    config = load_config(flags, os.environ, memory_bound, FLAGS)
    log.set_up(as_json=False, level=config.log_level)
    if part == "loop":
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, hang, pipe)
    elif part == "start":
        handoff.HandoffServer.start = hanging_first(handoff.HandoffServer.start, pipe, "Main")  # type: ignore[method-assign]
    elif part == "open":
        paths.open_regular = hanging_in_shm(paths.open_regular, pipe)
    elif part == "list":
        os.scandir = hanging_in_shm(os.scandir, pipe)
    elif part == "stat":
        statx.file_status = hanging_in_shm(statx.file_status, pipe)
    elif part in ("read", "no-spares"):
        LocalFile._read_cached = hanging_in_shm(LocalFile._read_cached, pipe)  # type: ignore[method-assign]
    else:
        assert part == "readers"
        LocalFile._read_cached = hanging_first(LocalFile._read_cached, pipe, "reader-")  # type: ignore[method-assign]
    if part == "no-spares":
        start = reader.ReaderPool._add_threads
        reader.ReaderPool._add_threads = lambda self: None if self.threads else start(self)  # type: ignore[method-assign]
    await daemon.serve(config)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], sys.argv[2], sys.argv[3:]))
