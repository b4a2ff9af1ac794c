"""Which versions are kept, how much of the disk they take, and which go first.

    limit >= what all files have (allocated) + what writes under way may need (reserved)

Room is reserved before a byte is written. Where there is too little, whole versions go, least recently used
first, pinned ones last. A version that is being read or written stays: if only such are left, the block is
not kept. Nor are more than `MAX_VERSIONS` kept, as the daemon remembers each of them.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable

from .directory import BLOCKS, RECORDS, Directory
from .records import Identity
from .version import Version

MAX_VERSIONS = 20_000
"""Each takes about a kilobyte of the daemon's memory, however little of the disk it takes."""


def key_of(identity: Identity) -> str:
    """What the names of its files begin with."""
    return f"{_object_of(identity.uri)}-{_digest(identity.version)[:32]}"


def _object_of(uri: str) -> str:
    return _digest(uri)[:24]


def _digest(text: str) -> str:
    # Names of local files need not be UTF-8.
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


class Versions:
    """Every thread may use it. Methods that wait for the disk say so."""

    def __init__(
        self, directory: Directory, limit_bytes: int, *, on_evicted: Callable[[], object] = lambda: None
    ) -> None:
        """Finds what earlier daemons left. Removes what a crash left, and what is over the limit. Waits for
        the disk; raises OSError."""
        self.limit_bytes = limit_bytes
        self._directory = directory
        self._on_evicted = on_evicted
        self._lock = threading.Lock()
        """Also of those fields of a version that are the tier's."""
        self._making_room = threading.Lock()
        self._by_object: dict[str, dict[str, Version]] = {}
        """By what their keys begin with, and by key."""
        self._count = 0
        self._used_bytes = 0
        self._find()
        self.reserve(0)

    @property
    def used_bytes(self) -> int:
        return self._used_bytes

    @property
    def count(self) -> int:
        """Those that have files."""
        with self._lock:
            return sum(
                version.stem is not None for some in self._by_object.values() for version in some.values()
            )

    def has(self, uri: str) -> bool:
        """Some version of it may be kept."""
        with self._lock:
            return _object_of(uri) in self._by_object

    # ---- uses -----------------------------------------------------------------------------------

    def use(self, identity: Identity) -> Version:
        """That version, with one use more, which is its latest."""
        key = key_of(identity)
        with self._lock:
            version = self._get(key)
            if version is None:
                version = Version(self._directory, key)
                self._add(version)
            version.users += 1
            version.used_at = time.time()
            return version

    def use_latest(self, uri: str) -> tuple[Version, float] | None:
        """The version of it that was used last, unless all are outdated, and when that was, in seconds since
        1970. It has one use more, which does not count as its latest."""
        with self._lock:
            kept = [version for version in self._of(uri) if version.stem is not None and version.used_at]
            if not kept:
                return None
            version = max(kept, key=lambda version: version.used_at)
            version.users += 1
            return version, version.used_at

    def take(self, version: Version) -> None:
        """One use more."""
        with self._lock:
            version.users += 1

    def leave(self, version: Version) -> bool:
        """One use less. True: it was dropped, and its files are to be removed now."""
        with self._lock:
            version.users -= 1
            if version.users:
                return False
            self._rest(version)
            return version.dropped  # under the lock: else `drop` might tell the same

    def opened(self, version: Version) -> None:
        """An attempt to open it ended. Its caller may have given up long ago."""
        with self._lock:
            if version.stem is None:  # its files were of no use
                self._forget_bytes(version)
            if not version.users:
                self._rest(version)

    def pin(self, version: Version, step: int) -> None:
        with self._lock:
            version.pins += step

    # ---- which one counts -----------------------------------------------------------------------

    def is_latest(self, identity: Identity) -> bool:
        """No other version of the same was used later."""
        key = key_of(identity)
        with self._lock:
            used = {version.key: version.used_at for version in self._of(identity.uri)}
        used_at = used.pop(key, 0.0)
        return all(used_at >= other for other in used.values())

    def outdate(self, uri: str, *, but: Identity | None = None) -> list[Version]:
        """The other versions of it are not the latest any more, whatever happens to that one. Those that were
        not outdated before."""
        kept = key_of(but) if but is not None else ""
        with self._lock:
            outdated = [version for version in self._of(uri) if version.key != kept and version.used_at]
            for version in outdated:
                version.used_at = 0.0
        return outdated

    def drop(self, uri: str, version: str, *, although_pinned: bool) -> Version | None:
        """Gives nothing of that version any more. The version, if its files are to be removed now."""
        with self._lock:
            dropped = self._get(key_of(Identity(uri, version, 0)))
            if dropped is None or (dropped.pins and not although_pinned):
                return None
            self._discard(dropped)
            dropped.drop()
            return None if dropped.users else dropped

    # ---- room -----------------------------------------------------------------------------------

    def reserve(self, size_bytes: int) -> bool:
        """Whether so much could be reserved. Waits for the disk; raises OSError."""
        with self._making_room:  # until the files are gone: others must not count on their room before
            victims = None
            while not self._reserve_now(size_bytes):
                victims = iter(self._in_order()) if victims is None else victims
                victim = next(victims, None)
                if victim is None:
                    return False
                self._evict(victim)
            return True

    def settle(self, version: Version, reserved_bytes: int, allocated_bytes: int | None) -> None:
        """The write that reserved so much ended, and the version's files have so much now. None: it failed,
        and may have taken all of it."""
        with self._lock:
            if allocated_bytes is None:
                version.allocated_bytes += reserved_bytes
                return
            # Of two that write at once, the earlier may have been the later to look.
            grown_bytes = max(0, allocated_bytes - version.allocated_bytes)
            version.allocated_bytes += grown_bytes
            self._used_bytes += grown_bytes - reserved_bytes

    def removed(self, version: Version) -> None:
        """Its files are gone."""
        with self._lock:
            self._forget_bytes(version)

    def _reserve_now(self, size_bytes: int) -> bool:
        with self._lock:
            if self._used_bytes + size_bytes <= self.limit_bytes and self._count <= MAX_VERSIONS:
                self._used_bytes += size_bytes
                return True
            return False

    def _in_order(self) -> list[Version]:
        """Those with files, in the order in which they go."""
        with self._lock:
            every = [version for some in self._by_object.values() for version in some.values()]
        kept = (version for version in every if version.stem)
        return sorted(kept, key=lambda version: (version.pins > 0, version.used_at))

    def _evict(self, victim: Version) -> None:
        with self._lock:
            if victim.users or self._get(victim.key) is not victim:  # in use, or dropped meanwhile
                return
            self._discard(victim)
        victim.remove()
        self.removed(victim)
        self._on_evicted()

    # ---- inside, with the lock ------------------------------------------------------------------

    def _get(self, key: str) -> Version | None:
        return self._by_object.get(key.partition("-")[0], {}).get(key)

    def _of(self, uri: str) -> list[Version]:
        return list(self._by_object.get(_object_of(uri), {}).values())

    def _add(self, version: Version) -> None:
        self._by_object.setdefault(version.key.partition("-")[0], {})[version.key] = version
        self._count += 1

    def _discard(self, version: Version) -> None:
        """If it is still the one of its key."""
        known = version.key.partition("-")[0]
        if self._get(version.key) is version:
            del self._by_object[known][version.key]
            self._count -= 1
            if not self._by_object[known]:
                del self._by_object[known]

    def _rest(self, version: Version) -> None:
        """Nobody uses it."""
        version.close()
        if version.stem is None:
            self._discard(version)

    def _forget_bytes(self, version: Version) -> None:
        self._used_bytes -= version.allocated_bytes
        version.allocated_bytes = 0

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
            older = self._get(key)
            if older is not None:
                kept -= {f"{older.stem}{RECORDS}", f"{older.stem}{BLOCKS}"}
                self._used_bytes -= older.allocated_bytes
                self._discard(older)
            self._add(version)
            self._used_bytes += version.allocated_bytes
            kept |= {stem + RECORDS, stem + BLOCKS}
        for name in sorted(files.keys() - kept, reverse=True):  # records before blocks
            self._directory.remove(name)
