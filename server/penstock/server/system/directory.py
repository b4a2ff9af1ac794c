"""Notices by inotify that a file in a directory was written, replaced or removed.

The directory is watched and not the file: in a ConfigMap only the link `..data` is replaced, so no event
names the file. inotify does not report some changes, such as writes by another machine. The caller has to
look for these from time to time.
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
        """-1 without inotify: a seccomp profile forbids it, or the user has too many instances."""
        return self._fd

    def watch(self) -> bool:
        """Watches the directory until it is removed or unmounted. Call it again when the directory is back.
        Returns False if it cannot be watched. May block as long as the directory's mount hangs."""
        mask = _IN_CLOSE_WRITE | _IN_MOVED | _IN_DELETE | _IN_ONLYDIR
        return self._fd >= 0 and _libc.inotify_add_watch(self._fd, self._directory, mask) >= 0

    def clear(self) -> None:
        """Takes all events, so that the descriptor is not readable until the next one."""
        try:
            while os.read(self._fd, _BUFFER_BYTES):
                continue
        except BlockingIOError:
            return

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
