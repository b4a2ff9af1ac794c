"""Notices writes to files by inotify. If a writer puts the time of its write back, nothing else shows the
write but ctime, and other changes move ctime too.

A watch is on an inode, and keeps neither a file nor a mount busy. The kernel reports writes, truncation, hole
punching and reflinks on this machine. It does not report stores through a mapping, writes of other machines
to a network file system, or writes to the layers beneath an overlay.
"""

from __future__ import annotations

import ctypes
import os
import struct
import threading
import weakref

_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_IN_MODIFY = 0x2
_IN_UNMOUNT = 0x2000
_IN_Q_OVERFLOW = 0x4000
_IN_IGNORED = 0x8000
_EVENT = struct.Struct("=iIII")
_BUFFER_BYTES = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


class Watch:
    """The watch of one open file. Made by `Watches.watch`, and closed by its owner."""

    __slots__ = ("_number", "_watches", "lost", "modified")

    def __init__(self, watches: Watches) -> None:
        self._watches = watches
        self._number = -1
        self.modified = False
        self.lost = False
        """Whether writes may have been missed: too many happened at once, or the kernel dropped the watch."""

    def look(self) -> None:
        """Updates `modified` and `lost`. Writes that ended before this call count."""
        self._watches.drain()

    def close(self) -> None:
        self._watches.forget(self)


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

    def watch(self, fd: int) -> Watch | None:
        """Watches the file that is open as `fd`. None if that is impossible. May block for as long as the
        file's mount hangs, and holds up no other thread then."""
        watch = Watch(self)
        # The first number may be that of a watch that another thread is just removing. Once it is registered,
        # nobody removes it. The second call returns the same number then, and finds the watch alive.
        while (number := self._add(fd)) >= 0:
            if number == watch._number:
                watch.lost = False  # the removal had set it
                return watch
            self.forget(watch)
            with self._lock:
                watch._number = number
                self._by_number.setdefault(number, set()).add(watch)
        self.forget(watch)
        return None

    def forget(self, watch: Watch) -> None:
        """Ends a watch. A second call does nothing."""
        with self._lock:
            number, watch._number = watch._number, -1
            others = self._by_number.get(number)
            if others is None:
                return
            others.discard(watch)
            if not others:
                del self._by_number[number]
                _libc.inotify_rm_watch(self._fd, number)  # fails if the file is gone already

    def drain(self) -> None:
        """Passes on the events that the kernel has queued."""
        with self._lock:
            while self._fd >= 0:
                try:
                    events = os.read(self._fd, _BUFFER_BYTES)
                except BlockingIOError:
                    return
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
        for watch in self._by_number.get(number, ()):
            watch.modified = watch.modified or bool(mask & _IN_MODIFY)
            watch.lost = watch.lost or bool(mask & (_IN_IGNORED | _IN_UNMOUNT))
