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
from pathlib import Path

from ..config.units import show_size
from ..system.copying import copy
from ..system.counts import TIER_COUNTS
from ..system.fair import FairExecutor
from ..system.log import event
from .directory import BLOCKS, RECORDS, Directory, LockedError
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
            version = self._versions.get(key)
            if version is None:
                version = Version(self._directory, key)
                self._add(version)
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
        return Hold(self, version)

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

    def _release(self, version: Version) -> None:
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

    def _pin(self, version: Version, step: int) -> None:
        with self._lock:
            version.pins += step

    def _write(
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
                self._release(version)
                with self._lock:
                    self._writing -= 1
                done()

        try:
            self._writers.submit(os.geteuid(), run)
        except RuntimeError:  # penstockd stops, or there is no thread
            version.end_write(start, end)
            self._release(version)
            with self._lock:
                self._writing -= 1
            copied()
            done()

    def _write_copy(self, version: Version, start: int, views: Sequence[memoryview]) -> None:
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
        self._write(version, start, start + size_bytes, [held], lambda: None, done)

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


class Hold:
    """See `sources.kept.Keep`."""

    def __init__(self, tier: Tier, version: Version) -> None:
        """Takes over one use of the version."""
        self.version = version
        self._tier = tier
        self._lock = threading.Lock()
        self._released = self._pinned = False

    def again(self) -> Hold:
        """Another hold on the same."""
        with self._tier._lock:
            self.version.users += 1
        return Hold(self._tier, self.version)

    def missing(self, start: int, end: int) -> tuple[int, int] | None:
        return None if self._tier.off_because else self.version.missing(start, end)

    def write(
        self,
        start: int,
        end: int,
        views: Sequence[memoryview],
        copied: Callable[[], object],
        done: Callable[[], object],
    ) -> None:
        self._tier._write(self.version, start, end, views, copied, done)

    def write_copy(self, start: int, views: Sequence[memoryview]) -> None:
        """Keeps bytes that the caller needs back at once, unless too many wait already."""
        self._tier._write_copy(self.version, start, views)

    def pin(self, pinned: bool) -> None:
        with self._lock:
            if pinned != self._pinned:
                self._pinned = pinned
                self._tier._pin(self.version, 1 if pinned else -1)

    def release(self) -> None:
        self.pin(False)
        self.rest()

    def rest(self) -> None:
        with self._lock:
            released, self._released = self._released, True
        if not released:
            self._tier._release(self.version)


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
