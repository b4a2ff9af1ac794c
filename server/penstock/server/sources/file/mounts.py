"""The table of mounts, and threads for each mount, so a mount that does not answer holds up no other."""

from __future__ import annotations

import contextlib
import os
import re
import select
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from ...errors import SourceUnavailableError
from ...system.fair import FIRST_CALLS, FairExecutor
from ...system.quota import Quota
from ...system.statx import Mount, is_mounted

_ESCAPE = re.compile(r"\\([0-7]{3})")
_MOUNTS = "/proc/self/mountinfo"

MOST_MOUNTS = 64
"""Most mounts that have threads at a time. Mounts without a call make room for others."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


_LOCAL = """bcachefs btrfs devtmpfs erofs exfat ext2 ext3 ext4 f2fs hugetlbfs iso9660 jfs ntfs3 proc ramfs
squashfs sysfs tmpfs udf vfat xfs zfs"""
_CLOSES_AT_ONCE = frozenset(_LOCAL.split())
"""Kinds of file systems on which closing a file waits for nobody. FUSE and network file systems are not among
them."""


@dataclass(frozen=True, slots=True)
class MountPoint:
    path: str
    kind: str
    """The kind of file system, such as ext4."""
    source: str = ""
    """What is mounted: a device, or a server and its export, as the kernel writes it."""

    @property
    def server(self) -> str:
        """The kind, the server and the export of a network file system; empty for what has no server."""
        named = self.source.startswith("//") or (":" in self.source and not self.source.startswith("/"))
        return f"{self.kind} {self.source}" if named else ""

    @property
    def closes_at_once(self) -> bool:
        """Whether closing a file of it cannot hang."""
        return self.kind in _CLOSES_AT_ONCE


_ROOT = MountPoint("/", "")


class MountTable:
    """The mounts of this process, the number of their changes, and the mounts that threads wait for.
    Thread-safe."""

    def __init__(self) -> None:
        """If /proc is not mounted, all paths count as one mount that never changes."""
        self._lock = threading.Lock()
        self._poll = select.poll()
        self._generation = 0
        self._asked: dict[int, tuple[str, float]] = {}
        """By thread: the mount point that it waits for, and since when."""
        try:
            self._fd = os.open(_MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1
            self._points = [_ROOT]
            return
        self._poll.register(self._fd, select.POLLPRI)
        self._points = self._read()

    def close(self) -> None:
        with self._lock:
            if self._fd >= 0:
                self._poll.unregister(self._fd)
                os.close(self._fd)
            self._fd = -1

    def point(self, path: str) -> MountPoint:
        """The mount point of the file system that holds `path`, by names alone. Asking the file system might
        hang. So a symbolic link counts as a file where it lies. However a path is spelled (`//`, `/./`,
        `/../`), it is of the same mount: a user could hang the threads of another one otherwise."""
        path = "/" + os.path.normpath(path).lstrip("/")
        with self._lock:
            self._look()
            points = self._points
        around = [
            point for point in points if path == point.path or path.startswith(point.path.rstrip("/") + "/")
        ]
        # If several are mounted in one place, the last is on top.
        return max(reversed(around), key=lambda point: len(point.path), default=_ROOT)

    @contextlib.contextmanager
    def asking(self, point: str) -> Iterator[None]:
        """Records, while it lasts, that this thread waits for that mount."""
        thread = threading.get_ident()
        self._asked[thread] = point, time.monotonic()
        try:
            yield
        finally:
            del self._asked[thread]

    def asked_since(self) -> list[tuple[str, float]]:
        """For each thread that waits for a mount: the mount point, and since when, by the monotonic clock."""
        return list(self._asked.copy().values())

    def identity(self, mount: Mount) -> str:
        """An identity that differs between any two mounts that this process has seen.

        If ids are not unique, a mount may have the id of an earlier one after anything was mounted or
        unmounted. So the number of such changes is a part of the identity then.
        """
        if mount.unique:
            return f"{mount.id:x}"
        with self._lock:
            self._look()
            return f"{mount.id:x}.{self._generation}"

    def is_gone(self, mount: Mount, identity: str) -> bool:
        """Whether the mount with that identity was unmounted. True also if that cannot be known."""
        return not is_mounted(mount) if mount.unique else self.identity(mount) != identity

    def _look(self) -> None:
        if self._poll.poll(0):  # the kernel reports once that something was mounted or unmounted
            self._generation += 1
            self._points = self._read()

    def _read(self) -> list[MountPoint]:
        chunks = []
        os.lseek(self._fd, 0, os.SEEK_SET)
        while chunk := os.read(self._fd, 1 << 20):
            chunks.append(chunk)
        points = []
        for line in os.fsdecode(b"".join(chunks)).split("\n"):
            fields, _, rest = line.partition(" - ")
            if rest:
                path = _ESCAPE.sub(_unescape, fields.split(" ")[4])
                kind, source = rest.split(" ")[:2]
                points.append(MountPoint(path, kind, source))
        return points


class MountEvents:
    """A descriptor that becomes readable when something is mounted or unmounted, for an event loop."""

    def __init__(self) -> None:
        """Raises OSError if /proc is not mounted."""
        self._fd = os.open(_MOUNTS, os.O_RDONLY | os.O_CLOEXEC)
        # In an epoll set of its own: the file itself can always be read, and event loops wait for that.
        self._events = select.epoll()
        self._events.register(self._fd, select.EPOLLPRI)

    def fileno(self) -> int:
        return self._events.fileno()

    def clear(self) -> None:
        self._events.poll(0)

    def close(self) -> None:
        self._events.close()
        os.close(self._fd)


class MountThreads:
    """Up to `count` threads for each mount, which serve users in turn."""

    def __init__(self, count: int, name: str, mounts: MountTable, *, most_mounts: int = MOST_MOUNTS) -> None:
        self._count = count
        self._name = name
        self._mounts = mounts
        self._quota = Quota(most_mounts)
        self._lock = threading.Lock()
        self._executors: dict[str, FairExecutor] = {}
        self._counted: dict[str, int] = {}
        """By mount that has threads: the user who first asked for it, and whose share it is of."""
        self._stopped = False

    def of(self, path: str) -> MountExecutor:
        """The threads of the mount that holds `path`."""
        return MountExecutor(self, self._mounts.point(path).path)

    def submit(
        self, mount: str, uid: int, call: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs
    ) -> Future[_T]:
        """Raises RuntimeError after `shutdown`, as executors do, and SourceUnavailableError if too many
        mounts have calls under way."""
        with self._lock:
            if self._stopped:
                raise RuntimeError("the threads have been stopped")
            if mount not in self._executors:
                self._make_room(mount, uid)
                self._executors[mount] = FairExecutor(
                    self._count, f"{self._name}:{mount}", first_calls=FIRST_CALLS
                )
                self._counted[mount] = uid
            return self._executors[mount].submit(uid, call, *arguments, **named)

    def shutdown(self) -> None:
        """Begins no more calls. Does not wait: a call may hang in the kernel."""
        with self._lock:
            self._stopped = True
            executors = list(self._executors.values())
        for executor in executors:
            executor.shutdown()

    def _make_room(self, mount: str, uid: int) -> None:
        """Takes a share of that user's for a mount. Mounts without a call give way."""
        while not self._quota.take(uid):
            idle = next((name for name, executor in self._executors.items() if executor.idle), None)
            if idle is None:
                raise SourceUnavailableError(
                    f"{mount} cannot be opened: threads wait for {len(self._executors)} other mounts "
                    "already; see penstock status for those that hang, or try again later"
                )
            self._executors.pop(idle).shutdown()
            self._quota.release(self._counted.pop(idle))


class MountExecutor:
    """The threads of one mount."""

    def __init__(self, threads: MountThreads, mount: str) -> None:
        self._threads = threads
        self.mount = mount

    def of(self, uid: int) -> MountUserExecutor:
        """The same threads as an executor whose calls are that user's."""
        return MountUserExecutor(self._threads, self.mount, uid)


class MountUserExecutor(Executor):
    """The threads of one mount as an executor of one user."""

    def __init__(self, threads: MountThreads, mount: str, uid: int) -> None:
        self._threads = threads
        self._mount = mount
        self._uid = uid

    def submit(self, call: Callable[_P, _T], /, *arguments: _P.args, **named: _P.kwargs) -> Future[_T]:
        return self._threads.submit(self._mount, self._uid, call, *arguments, **named)


def _unescape(match: re.Match[str]) -> str:
    return chr(int(match[1], 8))
