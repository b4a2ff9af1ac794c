"""Files with their threads. Each mount has threads of its own for all calls that may hang, so it holds up no
other mount."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Collection, Sequence
from concurrent.futures import Executor
from urllib.parse import unquote

from ...config.options import StoreFlags
from ...config.settings import Config
from ...config.values import Locators
from ...errors import SourceUnavailableError
from ...system.failure import NoThreadError
from ...system.quota import Quota
from ..store import Events, Reading, Store
from .local_file import FileContext
from .mounts import MountEvents, MountTable, MountThreads
from .source import FileSource
from .watches import Watches

logger = logging.getLogger(__name__)

HEADER_READERS = 24
RESOLVERS = 20
HUNG_MOUNTS = 4
"""How many mounts may hang without taking threads from the others."""
CLOSED_MOUNTS = 1024
"""Most mounts of which files are being closed at a time. Each has one thread for that."""


def _prefix(location: str) -> str:
    """The path in a prefix of `--allow`: it is compared with paths."""
    return unquote(location.removeprefix("file://")) if location.startswith("file://") else location


class FileStore(Store):
    kind = FileSource.kind
    schemes = FileSource.schemes
    flags = StoreFlags(Locators(("/", "file:///"), "an absolute path", _prefix))

    def __init__(self, config: Config) -> None:
        # HUNG_MOUNTS mounts may hang, each with as many reads as there are threads, and take none from
        # others.
        self.reading = Reading(
            threads=config.concurrency,
            spare_threads=HUNG_MOUNTS * config.concurrency,
            block_bytes=config.block_bytes,
            may_hang=True,
            copies_at_once=len(os.sched_getaffinity(0)),
        )
        self._mounts = MountTable()
        self._openers = MountThreads(HEADER_READERS, "header", self._mounts)
        self._resolvers = MountThreads(RESOLVERS, "resolver", self._mounts)
        self._closers = MountThreads(1, "closer", self._mounts, most_mounts=CLOSED_MOUNTS)
        self._descriptors: Quota | None = None
        self.context = FileContext(self._mounts, Watches(), self._close_later)
        self.source = FileSource(lambda path, uid: self._openers.of(path).of(uid), self.context)

    def charge_to(self, descriptors: Quota) -> None:
        self._descriptors = descriptors

    def resolvers(self, location: str, uid: int) -> Executor:
        return self._resolvers.of(location).of(uid)

    def place(self, source: str) -> str:
        return f"{self.kind} {self._mounts.point(self.source.location(source)).path}"

    def asked_since(self) -> Collection[tuple[str, float]]:
        return self._mounts.asked_since()

    def gone_events(self) -> Events | None:
        try:
            return MountEvents()
        except OSError:
            logger.warning("/proc is not mounted: what is warm of a file system outlives its mount")
            return None

    def _close_later(self, mount: str, uid: int, fds: Sequence[int]) -> None:
        """On the mount's thread, whose users take turns. Until then they count as open."""
        descriptors = self._descriptors
        if descriptors is not None:
            descriptors.charge(uid, len(fds))

        def close() -> None:
            for fd in fds:
                with contextlib.suppress(OSError):  # FUSE may say anything; it is closed all the same
                    os.close(fd)
            if descriptors is not None:
                descriptors.release(uid, len(fds))

        try:
            self._closers.submit(mount, uid, close)
        except NoThreadError:
            close()
        except SourceUnavailableError:
            pass  # mounts by the hundred let no file be closed: these stay open, and charged

    def stop(self) -> None:
        """Does nothing: a read of a file cannot be ended."""

    def shutdown(self) -> None:
        for threads in (self._resolvers, self._openers, self._closers):
            threads.shutdown()
