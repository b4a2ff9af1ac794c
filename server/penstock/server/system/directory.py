"""Notices by inotify that the names in a directory changed, as where a file is replaced or written.

A ConfigMap is a directory whose link `..data` is replaced by another: no event is of the file itself. So the
directory is watched. What inotify does not tell of, such as writes of another machine, the caller has to look
for now and then.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

_IN_NONBLOCK = os.O_NONBLOCK
_IN_CLOEXEC = os.O_CLOEXEC
_IN_CLOSE_WRITE = 0x8
_IN_MOVED = 0x40 | 0x80
_IN_DELETE = 0x200
_IN_ONLYDIR = 0x1000000
_BUFFER_BYTES = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


class DirectoryEvents:
    """A descriptor that becomes readable when something in a directory is written, renamed or removed."""

    def __init__(self, directory: Path) -> None:
        """Watches nothing before `watch`."""
        self._directory = os.fsencode(directory)
        self._fd: int = _libc.inotify_init1(_IN_NONBLOCK | _IN_CLOEXEC)

    def fileno(self) -> int:
        """-1 where there is no inotify: a seccomp profile, or too many instances of the user."""
        return self._fd

    def watch(self) -> bool:
        """From now on, until the directory is removed or unmounted; again after it came back. False where it
        cannot be watched. May block as long as the directory's mount hangs."""
        mask = _IN_CLOSE_WRITE | _IN_MOVED | _IN_DELETE | _IN_ONLYDIR
        return self._fd >= 0 and _libc.inotify_add_watch(self._fd, self._directory, mask) >= 0

    def clear(self) -> None:
        """Until something happens again, it is not readable."""
        try:
            while os.read(self._fd, _BUFFER_BYTES):
                continue
        except BlockingIOError:
            return

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
