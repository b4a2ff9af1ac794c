"""A file for the local source of node-feature-discovery: a label for each checkpoint that is warm here, and
another for each that is on the local disk.

The labels let a scheduler prefer this node, and the daemon needs no right in the cluster for that. They
expire (`# +expiry-time`), so a daemon that is killed does not go on promising what it had. While it runs, the
file is written again in time. It is removed when the daemon stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...system import failure
from ...system.log import event
from ..request import LoadContext

logger = logging.getLogger(__name__)

WARM_PREFIX = "penstock.dev/warm-"
DISK_PREFIX = "penstock.dev/disk-"
LOOK_SECONDS = 1.0
REFRESH_SECONDS = 120.0
EXPIRY_SECONDS = 600.0


class Features:
    """`run` it once, on the event loop."""

    def __init__(self, path: Path, context: LoadContext, labels: Callable[[], Sequence[str]]) -> None:
        """`labels` are those that are true now."""
        self._path = path
        self._context = context
        self._labels = labels
        self._failing = False

    async def run(self) -> None:
        """For ever."""
        loop = asyncio.get_running_loop()
        written: list[str] | None = None
        written_at = 0.0
        try:
            while True:
                labels = sorted(self._labels())
                if labels != written or loop.time() >= written_at + REFRESH_SECONDS:
                    written = labels if await self._write(labels) else None
                    written_at = loop.time()
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            with contextlib.suppress(OSError):
                self._path.unlink()

    async def _write(self, labels: Sequence[str]) -> bool:
        """Whether it could be written; the log says why not, once."""
        uid = os.geteuid()
        try:
            threads = self._context.resolvers((str(self._path),), uid)
            await asyncio.get_running_loop().run_in_executor(threads, replace_file, self._path, text(labels))
        except Exception as error:
            why = error.strerror if isinstance(error, OSError) else failure.explain(error, "writing").message
            if not self._failing:
                fields = {"file": str(self._path), "why": why, "hint": "make its directory writable"}
                event(logger, "node features could not be written", fields, level=logging.WARNING)
            self._failing = True
            return False
        self._failing = False
        return True


def text(labels: Sequence[str]) -> str:
    """The file for what is so now."""
    expiry = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + EXPIRY_SECONDS))
    return f"# +expiry-time={expiry}\n" + "".join(f"{label}=true\n" for label in labels)


def replace_file(path: Path, content: str) -> None:
    """Readers see the file before or after, never a part. The name beside it begins with a dot, which
    node-feature-discovery passes over. Raises OSError."""
    beside = path.with_name(f".{path.name}.new")
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
    with open(os.open(beside, flags, 0o644), "w") as file:
        os.fchmod(file.fileno(), 0o644)  # whatever the umask: another user reads it
        file.write(content)
    beside.replace(path)
