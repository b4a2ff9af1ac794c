"""The directory of the tier: whose it is, its lock, and the system calls on its files.

Files are opened relative to the directory's descriptor and never through links, so nobody can put another
directory in its place once it is open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from .records import MAX_RECORDS_BYTES

LOCK = "lock"
RECORDS = ".records"
BLOCKS = ".blocks"
_BLOCK_OF_STATUS = 512
_FLAGS = os.O_NOFOLLOW | os.O_CLOEXEC
_REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class LockedError(Exception):
    """Another daemon has the directory."""


def is_momentary(error: OSError) -> bool:
    """The daemon, or the machine, is short of descriptors or memory: that says nothing of the disk."""
    return error.errno in _SHORT_OF


@dataclass(frozen=True, slots=True)
class Found:
    """A file of the directory."""

    name: str
    allocated_bytes: int
    used_at: float


class Directory:
    """Owns the directory's descriptor and lock. Every thread may use it; every method may wait for the disk,
    and raises OSError."""

    def __init__(self, path: Path) -> None:
        """Makes the directory if it is missing. Raises ConfigError for one that is not the daemon's alone,
        LockedError, and OSError."""
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):  # of an earlier daemon, or a stranger: it is checked now
            os.mkdir(path, 0o700)
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | _FLAGS)
        except OSError as error:
            if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise _refused(path, "is a link or no directory; name a directory itself") from None
        try:
            self._check_directory()
            self._lock_fd = self._lock()
            try:
                self.found = self._look()
            except BaseException:
                os.close(self._lock_fd)
                raise
        except BaseException:
            os.close(self.fd)
            raise
        self.direct = True
        """Until the file system refuses it."""

    def close(self) -> None:
        os.close(self._lock_fd)
        os.close(self.fd)

    # ---- files ----------------------------------------------------------------------------------

    def open(self, name: str, flags: int, *, direct: bool = False) -> int:
        """The caller closes it."""
        if direct and self.direct:
            try:
                return os.open(name, flags | os.O_DIRECT | _FLAGS, 0o600, dir_fd=self.fd)
            except OSError as error:
                if error.errno not in _REFUSES_DIRECT:
                    raise
                self.direct = False
        return os.open(name, flags | _FLAGS, 0o600, dir_fd=self.fd)

    def read_all(self, name: str) -> bytes:
        """Raises OSError (EFBIG) for a file that is longer than any of its kind can be."""
        fd = self.open(name, os.O_RDONLY)
        with os.fdopen(fd, "rb") as file:
            data = file.read(MAX_RECORDS_BYTES + 1)
        if len(data) > MAX_RECORDS_BYTES:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        return data

    def read(self, fd: int, view: memoryview, position: int) -> int:
        """How many bytes came; fewer only at the end of the file."""
        done = 0
        while done < len(view) and (count := os.preadv(fd, [view[done:]], position + done)):
            done += count
        return done

    def write(self, fd: int, data: bytes | memoryview, position: int) -> None:
        rest = memoryview(data)
        while rest:
            count = os.pwritev(fd, [rest], position)
            rest, position = rest[count:], position + count

    def sync(self, fd: int) -> None:
        os.fdatasync(fd)

    def truncate(self, name: str, size_bytes: int) -> None:
        """To at most that."""
        fd = self.open(name, os.O_WRONLY)
        try:
            if os.fstat(fd).st_size > size_bytes:
                os.ftruncate(fd, size_bytes)
                self.sync(fd)
        finally:
            os.close(fd)

    def touch(self, name: str) -> None:
        """It is used now: after a restart the order of use is that of these times. A file that was removed
        stays so."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(name, dir_fd=self.fd, follow_symlinks=False)

    def outdate(self, name: str) -> None:
        """It counts as used before everything else, and that is synced. A file that was removed stays so."""
        with contextlib.suppress(FileNotFoundError):
            fd = self.open(name, os.O_RDONLY)
            try:
                os.utime(fd, (0, 0))
                self.sync_times(fd)
            finally:
                os.close(fd)

    def sync_times(self, fd: int) -> None:
        """`sync` leaves these out."""
        os.fsync(fd)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self.fd)

    def allocated_bytes(self, fd: int) -> int:
        return os.fstat(fd).st_blocks * _BLOCK_OF_STATUS

    def size_bytes(self, name: str) -> int:
        return os.stat(name, dir_fd=self.fd, follow_symlinks=False).st_size

    # ---- inside ---------------------------------------------------------------------------------

    def _check_directory(self) -> None:
        status = os.fstat(self.fd)
        if status.st_uid != os.geteuid():
            raise _refused(
                self.path, f"belongs to uid {status.st_uid}; name one of penstockd's own user, or a new one"
            )
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise _refused(self.path, "can be entered by other users; chmod it to 700, or name a new one")

    def _lock(self) -> int:
        fd = self.open(LOCK, os.O_RDONLY | os.O_CREAT)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise LockedError from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _look(self) -> list[Found]:
        """All files but the lock. Raises ConfigError for what no daemon puts there."""
        found = []
        for name in os.listdir(self.fd):
            status = os.stat(name, dir_fd=self.fd, follow_symlinks=False)
            plain = stat.S_ISREG(status.st_mode) and status.st_nlink == 1
            if not plain or status.st_uid != os.geteuid():
                what = "is a link or no plain file" if not plain else f"belongs to uid {status.st_uid}"
                raise _refused(self.path / name, f"{what}; remove it, or name a directory for the tier alone")
            if name == LOCK:
                continue
            if not name.endswith((RECORDS, BLOCKS)):
                raise _refused(self.path / name, "is no file of the tier; name a directory for it alone")
            found.append(Found(name, status.st_blocks * _BLOCK_OF_STATUS, status.st_mtime))
        return found


def _refused(path: Path, why: str) -> ConfigError:
    return ConfigError(f"--tier-dir: {path} {why}")
