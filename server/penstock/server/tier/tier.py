"""What is kept on the disk, for files that are open and for what is read of them.

    open a file --hold--> a version (versions.py) --reads--> threads.py
                                                 --writes--> writing.py, where there is room (versions.py)

A disk that fails is written to no more.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

from ..system.counts import TIER_COUNTS
from ..system.log import event
from .directory import Directory, is_momentary
from .hold import Hold
from .records import Identity, padded
from .threads import DiskThreads, UnavailableError
from .version import RECORD_ROOM_BYTES, Version
from .versions import Versions, key_of
from .writing import WRITERS, WriterThreads

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


class Tier:
    """Every thread may use it. Only `__init__` raises, and waits for the disk."""

    def __init__(self, directory: Directory, limit_bytes: int, *, threads: DiskThreads | None = None) -> None:
        """Owns the directory. Removes what is over the limit, and what a crash left. Raises OSError."""
        self.limit_bytes = limit_bytes
        self.threads = threads or DiskThreads()
        self.counts = Counter(dict.fromkeys(TIER_COUNTS, 0))
        self._directory = directory
        self._lock = threading.Lock()
        self._versions = Versions(directory, limit_bytes, on_evicted=lambda: self.count("evictions", 1))
        self.writers = WriterThreads(self)
        self.off_because = ""
        """Why nothing is written any more; empty while all is well."""

    @property
    def used_bytes(self) -> int:
        return self._versions.used_bytes

    @property
    def version_count(self) -> int:
        return self._versions.count

    @property
    def free(self) -> bool:
        """A write that begins now need not wait for another."""
        return not self.off_because and self.writes < WRITERS

    @property
    def writes(self) -> int:
        """How many wait or are under way."""
        return self.writers.writes

    @property
    def waiting_bytes(self) -> int:
        """Copies of bytes that wait to be written."""
        return self.writers.waiting_bytes

    def call_when_free(self, call: Callable[[], object]) -> None:
        self.writers.when_free = call

    def count(self, what: str, amount: int) -> None:
        with self._lock:
            self.counts[what] += amount

    def has(self, uri: str) -> bool:
        """Some version of it may be kept."""
        return self._versions.has(uri)

    def hold(self, identity: Identity, uid: int) -> Hold:
        """A hold on that version, with what is kept of it read from the disk, if that answers."""
        version = self._versions.use(identity)
        if not version.is_open:
            self._ask(uid, version, lambda: version.open(identity))
        if not version.is_open or version.place != identity.place:
            # The disk does not answer; or another file system is mounted where the file was, and that one is
            # still in use. Keep nothing, also when others open that version later.
            self.give_back(version)
            version = Version(self._directory, key_of(identity))
            version.users = 1
        return Hold(self, version)

    def latest(self, uri: str, uid: int) -> tuple[Identity, Hold, float] | None:
        """The version of it that was held last, a hold on it, and when that was, in seconds since 1970: this
        counts as no use. None: there is none on the disk, or that does not answer."""
        found = self._versions.use_latest(uri)
        if found is None:
            return None
        version, used_at = found
        identity = self._ask(uid, version, version.open_unused)
        hold = Hold(self, version)
        if identity is None or identity.uri != uri or key_of(identity) != version.key:
            hold.release()
            return None
        return identity, hold, used_at

    def is_latest(self, identity: Identity) -> bool:
        """No other version of the same was held later."""
        return self._versions.is_latest(identity)

    def outdate(self, uri: str, uid: int, *, but: Identity | None = None) -> None:
        """The other versions of it are not the latest, whatever happens to that one."""
        for version in self._versions.outdate(uri, but=but):
            # If the disk does not answer, it is outdated all the same until the daemon ends.
            self._ask(uid, version, version.outdate)

    def drop(self, uri: str, version: str, *, although_pinned: bool) -> None:
        """Forgets what is kept of a version, as its bytes turned out to be wrong: they were so when they
        came. Those who use it get no more of it, and its files are removed after them. Does not wait."""
        unused = self._versions.drop(uri, version, although_pinned=although_pinned)
        if unused is not None:
            self._remove(unused)

    def turn_off(self, error: OSError) -> None:
        """Nothing is written any more. What is there is still read."""
        if is_momentary(error):
            return
        with self._lock:
            if self.off_because:
                return
            self.off_because = error.strerror or str(error)
        event(
            logger,
            "tier off",
            {
                "directory": str(self._directory.path),
                "why": self.off_because,
                "hint": "loads go on, and nothing more is kept on the disk; see to the disk, or lower "
                "--tier-limit, and start penstockd again",
            },
            level=logging.WARNING,
        )

    def stop(self) -> None:
        """Begins nothing more. Does not wait: a disk may hang."""
        self.writers.shutdown()
        self.threads.shutdown()

    def close(self) -> None:
        """Gives the directory back. No call may be under way."""
        self.stop()
        self._directory.close()

    # ---- for holds ------------------------------------------------------------------------------

    def take(self, version: Version) -> None:
        self._versions.take(version)

    def give_back(self, version: Version) -> None:
        if self._versions.leave(version):
            self._remove(version)

    def pin(self, version: Version, step: int) -> None:
        self._versions.pin(version, step)

    # ---- for writers ----------------------------------------------------------------------------

    def keep(self, version: Version, start: int, size_bytes: int, buffer: memoryview) -> bool:
        reserved_bytes = padded(size_bytes) + RECORD_ROOM_BYTES
        if self.off_because:
            return True
        if not self._versions.reserve(reserved_bytes):
            return False
        allocated_bytes = None
        try:
            allocated_bytes = version.write(start, size_bytes, buffer)
            self.count("written_bytes", size_bytes)
        finally:
            self._versions.settle(version, reserved_bytes, allocated_bytes)
        return True

    # ---- inside ---------------------------------------------------------------------------------

    def _ask(self, uid: int, version: Version, work: Callable[[], _T]) -> _T | None:
        """Has one of the disk's threads do something to a version. None: the disk does not answer."""

        def run() -> _T:
            try:
                return work()
            finally:
                self._versions.opened(version)

        try:
            return self.threads.call(uid, lambda ticket: run())
        except OSError as error:
            self.turn_off(error)
        except UnavailableError:
            pass  # the store has it all
        return None

    def _remove(self, version: Version) -> None:
        """Removes the files of a version that was dropped and that nobody uses. Does not wait. If the daemon
        stops first, they are found at the next start, and are dropped after the next load that fails."""

        def run() -> None:
            try:
                version.remove()
            except OSError as error:
                self.turn_off(error)
                return
            self._versions.removed(version)

        self.writers.call(run)
