"""What is kept on the disk, how much that may be, and which version goes first.

    limit >= what all files have (allocated) + what writes under way may need (reserved)

Room is reserved before a byte is written. Where there is too little, whole versions go, least recently used
first, pinned ones last. A version that is being read or written stays: if only such are left, the block is
not kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import os
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

from ..system.copying import copy
from ..system.counts import TIER_COUNTS
from ..system.fair import FairExecutor
from ..system.log import event
from .directory import BLOCKS, RECORDS, Directory
from .hold import Hold
from .records import BLOCK_BYTES, Identity, padded
from .threads import DiskThreads, UnavailableError
from .version import RECORD_ROOM_BYTES, Version

logger = logging.getLogger(__name__)

WRITERS = 2
"""With a block of memory each."""
WAITING_BYTES = 16 << 20
"""Of headers that wait to be written."""


def key_of(identity: Identity) -> str:
    """What the names of its files begin with."""
    return f"{_object_of(identity.uri)}-{_digest(identity.version)[:32]}"


def _object_of(uri: str) -> str:
    return _digest(uri)[:24]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _outdate(versions: Sequence[Version]) -> None:
    for version in versions:
        version.outdate()


class Tier:
    """Every thread may use it. Only `__init__` raises, and waits for the disk."""

    def __init__(self, directory: Directory, limit_bytes: int, *, threads: DiskThreads | None = None) -> None:
        """Owns the directory. Removes what is over the limit, and what a crash left. Raises OSError."""
        self.limit_bytes = limit_bytes
        self.threads = threads or DiskThreads()
        self.counts = Counter(dict.fromkeys(TIER_COUNTS, 0))
        self._directory = directory
        self._writers = FairExecutor(WRITERS, "tier-writer")
        self._buffers: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        for _ in range(WRITERS):
            self._buffers.put(memoryview(mmap.mmap(-1, BLOCK_BYTES)))
        self._lock = threading.Lock()
        self._making_room = threading.Lock()
        self._versions: dict[str, Version] = {}
        self._objects: Counter[str] = Counter()
        """How many of these versions each URI has, by what their keys begin with."""
        self._used_bytes = 0
        self._writing = 0
        self._waiting_bytes = 0
        self._when_free: Callable[[], object] = lambda: None
        self.off_because = ""
        """Why nothing is written any more; empty while all is well."""
        self._find()
        self._make_room(0)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def version_count(self) -> int:
        with self._lock:
            return sum(version.stem is not None for version in self._versions.values())

    @property
    def free(self) -> bool:
        """A write that begins now need not wait for another."""
        return not self.off_because and self._writing < WRITERS

    def call_when_free(self, call: Callable[[], object]) -> None:
        self._when_free = call

    def count(self, what: str, amount: int) -> None:
        with self._lock:
            self.counts[what] += amount

    def has(self, uri: str) -> bool:
        """Some version of it may be kept."""
        with self._lock:
            return self._objects[_object_of(uri)] > 0

    def hold(self, identity: Identity, uid: int) -> Hold:
        """A hold on that version, with what is kept of it read from the disk, if that answers."""
        key = key_of(identity)
        with self._lock:
            if key not in self._versions:
                self._add(Version(self._directory, key))
            version = self._versions[key]
            version.users += 1
            version.used_at = time.time()
        if not version.is_open:
            try:
                self.threads.call(uid, lambda ticket: version.open(identity))
            except OSError as error:
                self.turn_off(error)
            except UnavailableError:
                pass  # the store has it all
            self._forget_removed(version)
        if version.is_open and version.place != identity.place:
            # Another file system is mounted where the file was, and that one is still in use: keep nothing.
            self.give_back(version)
            version = Version(self._directory, key)
            version.users = 1
        return Hold(self, version)

    def latest(self, uri: str, uid: int) -> tuple[Identity, Hold, float] | None:
        """The version of it that was held last, a hold on it, and when that was, in seconds since 1970: this
        counts as no use. None: there is none on the disk, or that does not answer."""
        with self._lock:
            kept = [version for version in self._of(uri) if version.stem is not None]
            if not kept:
                return None
            version = max(kept, key=lambda version: version.used_at)
            version.users += 1
            used_at = version.used_at
        identity = None
        try:
            identity = self.threads.call(uid, lambda ticket: version.open_unused())
        except OSError as error:
            self.turn_off(error)
        except UnavailableError:
            pass  # as if there were none
        self._forget_removed(version)
        hold = Hold(self, version)
        if identity is None or identity.uri != uri or key_of(identity) != version.key:
            hold.release()
            return None
        return identity, hold, used_at

    def is_latest(self, identity: Identity) -> bool:
        """No other version of the same was held later."""
        key = key_of(identity)
        with self._lock:
            versions = {version.key: version.used_at for version in self._of(identity.uri)}
        used_at = versions.pop(key, 0.0)
        return all(used_at >= other for other in versions.values())

    def outdate(self, uri: str, uid: int, *, but: Identity | None = None) -> None:
        """The other versions of it are not the latest, whatever happens to that one."""
        kept = key_of(but) if but is not None else ""
        with self._lock:
            outdated = [version for version in self._of(uri) if version.key != kept and version.used_at]
            for version in outdated:
                version.used_at = 0.0
        if outdated:
            try:
                self.threads.call(uid, lambda ticket: _outdate(outdated))
            except OSError as error:
                self.turn_off(error)
            except UnavailableError:
                pass  # until the daemon ends they are outdated all the same

    def _of(self, uri: str) -> list[Version]:
        start = f"{_object_of(uri)}-"
        return [version for key, version in self._versions.items() if key.startswith(start)]

    def drop(self, uri: str, version: str, *, although_pinned: bool) -> None:
        """Forgets what is kept of a version, as its bytes turned out to be wrong: they were so when they
        came. Those who use it get no more of it, and its files are removed after them. Does not wait."""
        key = key_of(Identity(uri, version, 0))
        with self._lock:
            dropped = self._versions.get(key)
            if dropped is None or (dropped.pins and not although_pinned):
                return
            self._discard(dropped)
            dropped.drop()
            unused = not dropped.users
        if unused:
            self._remove(dropped)

    def turn_off(self, error: OSError) -> None:
        """Nothing is written any more. What is there is still read."""
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
        self._writers.shutdown()
        self.threads.shutdown()

    def close(self) -> None:
        """Gives the directory back. No call may be under way."""
        self.stop()
        self._directory.close()

    # ---- for holds ------------------------------------------------------------------------------

    def take(self, version: Version) -> None:
        with self._lock:
            version.users += 1

    def give_back(self, version: Version) -> None:
        with self._lock:
            version.users -= 1
            if version.users:
                return
            version.close()
            if version.stem is None and self._versions.get(version.key) is version:
                self._discard(version)
            dropped = version.dropped  # under the lock: else `drop` might remove it too
        if dropped:
            self._remove(version)

    def _remove(self, version: Version) -> None:
        """Removes the files of a version that was dropped and that nobody uses. Does not wait. If the daemon
        stops first, they are found at the next start, and are dropped after the next load that fails."""

        def run() -> None:
            try:
                version.remove()
            except OSError as error:
                self.turn_off(error)
                return
            with self._lock:
                self._used_bytes -= version.allocated_bytes
                version.allocated_bytes = 0

        with contextlib.suppress(RuntimeError):  # penstockd stops, or there is no thread
            self._writers.submit(os.geteuid(), run)

    def pin(self, version: Version, step: int) -> None:
        with self._lock:
            version.pins += step

    def write(
        self,
        version: Version,
        start: int,
        end: int,
        views: Sequence[memoryview],
        copied: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        """Begins to write what `Version.missing` gave."""
        with self._lock:
            self._writing += 1
            version.users += 1
        version.begin_write(start, end)

        def run() -> None:
            room = True
            try:
                buffer = self._buffers.get()
                try:
                    copy(views, buffer)
                    copied()
                    room = self._keep(version, start, end - start, buffer)
                finally:
                    self._buffers.put(buffer)
            except OSError as error:
                self.turn_off(error)
            except Exception:  # a fault of the program's own costs no load
                logger.exception("keeping a block failed unexpectedly")
            finally:
                version.end_write(start, end, room=room)
                self.give_back(version)
                with self._lock:
                    self._writing -= 1
                done()

        try:
            self._writers.submit(os.geteuid(), run)
        except RuntimeError:  # penstockd stops, or there is no thread
            version.end_write(start, end)
            self.give_back(version)
            with self._lock:
                self._writing -= 1
            copied()
            done()

    def write_copy(self, version: Version, start: int, views: Sequence[memoryview]) -> None:
        """The same for bytes that are gone when this returns, unless too many wait already."""
        size_bytes = sum(map(len, views))
        with self._lock:
            if self._waiting_bytes + size_bytes > WAITING_BYTES:
                return
            self._waiting_bytes += size_bytes

        def done() -> None:
            with self._lock:
                self._waiting_bytes -= size_bytes
            self._when_free()

        held = memoryview(b"".join(views))
        self.write(version, start, start + size_bytes, [held], lambda: None, done)

    def _keep(self, version: Version, start: int, size_bytes: int, buffer: memoryview) -> bool:
        """Whether there was room."""
        reserved_bytes = padded(size_bytes) + RECORD_ROOM_BYTES
        if self.off_because:
            return True
        if not self._make_room(reserved_bytes):
            return False
        allocated_bytes = version.allocated_bytes
        try:
            allocated_bytes = version.write(start, size_bytes, buffer)
            self.count("written_bytes", size_bytes)
        finally:
            with self._lock:
                # Of two that write at once, the earlier may have been the later to look.
                grown_bytes = max(0, allocated_bytes - version.allocated_bytes)
                version.allocated_bytes += grown_bytes
                self._used_bytes += grown_bytes - reserved_bytes
        return True

    def _make_room(self, size_bytes: int) -> bool:
        """Reserves so much, if it can be had. Waits for the disk; raises OSError."""
        with self._making_room:  # until the files are gone: others must not count on their room before
            while True:
                with self._lock:
                    if self._used_bytes + size_bytes <= self.limit_bytes:
                        self._used_bytes += size_bytes
                        return True
                    victim = self._victim()
                    if victim is None:
                        return False
                    self._discard(victim)
                victim.remove()
                with self._lock:
                    self._used_bytes -= victim.allocated_bytes
                self.count("evictions", 1)

    def _add(self, version: Version) -> None:
        self._versions[version.key] = version
        self._objects[version.key.partition("-")[0]] += 1

    def _discard(self, version: Version) -> None:
        del self._versions[version.key]
        self._objects[version.key.partition("-")[0]] -= 1

    def _forget_removed(self, version: Version) -> None:
        """Its files were of no use, and are gone."""
        with self._lock:
            if version.is_open and version.stem is None:
                self._used_bytes -= version.allocated_bytes
                version.allocated_bytes = 0

    def _victim(self) -> Version | None:
        idle = [version for version in self._versions.values() if version.stem and not version.users]
        return min(idle, key=lambda version: (version.pins > 0, version.used_at), default=None)

    # ---- at the start ---------------------------------------------------------------------------

    def _find(self) -> None:
        """What earlier daemons left. Of two pairs of files of one version the later counts."""
        files = {found.name: found for found in self._directory.found}
        pairs = sorted(
            (found for name, found in files.items() if name.endswith(RECORDS)),
            key=lambda found: found.used_at,
        )
        kept: set[str] = set()
        for records in pairs:
            stem = records.name.removesuffix(RECORDS)
            blocks = files.get(stem + BLOCKS)
            key = stem.rpartition("-")[0]
            if blocks is None or not key:
                continue
            version = Version(self._directory, key, stem)
            version.used_at = records.used_at
            version.allocated_bytes = records.allocated_bytes + blocks.allocated_bytes
            older = self._versions.get(key)
            if older is not None and older.stem is not None:
                kept -= {older.stem + RECORDS, older.stem + BLOCKS}
                self._discard(older)
            self._add(version)
            kept |= {stem + RECORDS, stem + BLOCKS}
        for name in sorted(files.keys() - kept, reverse=True):  # records before blocks
            self._directory.remove(name)
        self._used_bytes = sum(version.allocated_bytes for version in self._versions.values())
