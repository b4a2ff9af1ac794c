"""Notices writes to files by inotify. If a writer puts the time of its write back, nothing else shows the
write but ctime, and other changes move ctime too.

A write takes its time when it begins, and is reported when it ends. A file may be opened, read and closed
during one write. So a closed file keeps its watch (`Watches.keep`), and reported writes are counted: their
number is a part of the file's version.

A watch is on an inode, and keeps neither a file nor a mount busy. The kernel reports writes, truncation, hole
punching and reflinks on this machine. It does not report stores through a mapping, writes of other machines
to a network file system, or writes to the layers beneath an overlay.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import termios
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict

_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_IN_MODIFY = 0x2
_IN_UNMOUNT = 0x2000
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_EVENT = struct.Struct("=iIII")
_INT = struct.Struct("i")
MOST_KEPT = 2048
"""Closed files that are watched. Before Linux 5.11 a user has 8192 watches."""
MOST_COUNTED = 10_000
"""Files of which the reported writes are counted. Of the others they count as none."""

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """The watch of one open file. Made by `Watches.watch`, and closed by its owner."""

    __slots__ = ("_inode", "_number", "_watches", "lost", "modified", "writes_before")

    def __init__(self, watches: Watches, inode: tuple[int, int]) -> None:
        self._watches = watches
        self._inode = inode
        self._number = -1
        self.writes_before = 0
        """How often a write to the file was reported before."""
        self.modified = False
        """Nothing is reported after the first write."""
        self.lost = False
        """Whether writes may have been missed: too many happened at once, or the kernel dropped the watch."""

    def look(self) -> None:
        """Updates `modified` and `lost`. Writes that ended before this call count."""
        self._watches.drain()

    def close(self) -> None:
        """A write that is under way will still count for the next watch of the file."""
        self._watches.keep(self)


class Watches:
    """All watches of the process, on one descriptor. Thread-safe."""

    def __init__(self) -> None:
        """It watches nothing if there is no inotify: because of a seccomp profile, or too many instances of
        the user."""
        self._fd: int = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)
        # Also if nobody calls `close`: a user has only 128 instances.
        self._close = weakref.finalize(self, os.close, self._fd) if self._fd >= 0 else None
        self._lock = threading.Lock()
        self._by_number: dict[int, set[Watch]] = {}
        self._adding: Counter[tuple[int, int]] = Counter()
        """How many threads ask the kernel for a watch of each inode."""
        self._unused: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
        """By inode: the numbers that nobody uses, and that are to be removed when no thread adds one."""
        self._kept: OrderedDict[tuple[int, int], Watch] = OrderedDict()
        """By inode: the watches that were closed, the oldest first."""
        self._writes: OrderedDict[tuple[int, int], int] = OrderedDict()
        """By inode: how often a write was reported, the oldest report first."""

    def watch(self, fd: int) -> Watch | None:
        """Of the file that is open as `fd`. None where that cannot be. May block as long as the file's mount
        hangs, and then holds up no other thread."""
        # None of an inode is removed while one is added. The kernel tells a group of watches once of each
        # write, and one that is being removed still counts for a moment: a new one of the same inode would
        # miss what is written then. And the kernel may give the number of one that is just being removed.
        try:
            status = os.fstat(fd)
        except OSError:
            return None
        watch = Watch(self, (status.st_dev, status.st_ino))
        with self._lock:
            self._adding[watch._inode] += 1
        number = self._add(fd)
        with self._lock:
            self._drain()  # what is queued was written before, and is news for others only
            watch.writes_before = self._writes.get(watch._inode, 0)
            if number >= 0:
                watch._number = number
                self._by_number.setdefault(number, set()).add(watch)
            self._adding[watch._inode] -= 1
            if not self._adding[watch._inode]:
                del self._adding[watch._inode]
                for unused in self._unused.pop(watch._inode, ()):
                    self._remove_unused(unused)
        return watch if number >= 0 else None

    def keep(self, watch: Watch) -> None:
        """Its owner has closed it. Keeping twice is keeping once. Does not block."""
        with self._lock:
            if watch._number < 0:
                return
            before = self._kept.pop(watch._inode, None)
            self._kept[watch._inode] = watch
            if before is not None and before is not watch:
                self._forget(before)
            while len(self._kept) > MOST_KEPT:
                self._forget(self._kept.popitem(last=False)[1])

    def _forget(self, watch: Watch) -> None:
        number, watch._number = watch._number, -1
        if number not in self._by_number:
            return
        self._by_number[number].discard(watch)
        if watch._inode in self._adding:
            self._unused[watch._inode].add(number)
        else:
            self._remove_unused(number)

    def _remove_unused(self, number: int) -> None:
        if number in self._by_number and not self._by_number[number]:
            del self._by_number[number]
            _libc.inotify_rm_watch(self._fd, number)  # fails where the file is gone already

    def drain(self) -> None:
        """Passes on the events that the kernel has queued."""
        with self._lock:
            self._drain()

    def _drain(self) -> None:
        """Reads what is queued when it begins, and no more. Users can write faster than this reads."""
        if self._fd < 0:
            return
        (queued_bytes,) = _INT.unpack(fcntl.ioctl(self._fd, termios.FIONREAD, bytes(_INT.size)))
        events = os.read(self._fd, queued_bytes) if queued_bytes else b""
        at = 0
        while at < len(events):
            number, mask, _, name_bytes = _EVENT.unpack_from(events, at)
            at += _EVENT.size + name_bytes
            self._tell(number, mask)

    def close(self) -> None:
        """Ends all watches. None may be used after that."""
        with self._lock:
            if self._close is not None:
                self._close()
            self._fd = -1
            self._by_number.clear()

    def _add(self, fd: int) -> int:
        if self._fd < 0:
            return -1
        number: int = _libc.inotify_add_watch(self._fd, f"/proc/self/fd/{fd}".encode(), _IN_MODIFY)
        return number

    def _tell(self, number: int, mask: int) -> None:
        if mask & _IN_Q_OVERFLOW:
            for watches in self._by_number.values():
                for watch in watches:
                    watch.lost = True
        of_file = tuple(self._by_number.get(number, ()))
        if of_file and mask & _IN_MODIFY:
            inode = of_file[0]._inode
            self._writes[inode] = self._writes.pop(inode, 0) + 1
            while len(self._writes) > MOST_COUNTED:
                self._writes.popitem(last=False)
        for watch in of_file:
            watch.modified = watch.modified or bool(mask & _IN_MODIFY)
            watch.lost = watch.lost or bool(mask & (_IN_IGNORED | _IN_UNMOUNT))
            if watch.modified or watch.lost:
                if self._kept.get(watch._inode) is watch:
                    del self._kept[watch._inode]
                self._forget(watch)  # or a user who goes on writing would have events read for ever
