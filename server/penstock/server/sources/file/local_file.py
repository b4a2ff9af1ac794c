"""An open file on a disk or any mounted file system.

A block is first read with `RWF_NOWAIT`, which copies the cached pages and never waits. (If the file system
has no `RWF_NOWAIT`, and all pages are cached, the read is buffered.) The rest is read with `O_DIRECT` into
the slab. That costs a tenth of the CPU and does not change the page cache. If the file system refuses direct
reads, they are buffered.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import stat
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...errors import (
    CheckpointChangedError,
    CheckpointInvalidError,
    SourceUnavailableError,
)
from ...system import linux, statx
from ...system.progress import about_to_wait
from .. import Access, too_slow, without
from ..checksums import Checksum
from ..resuming import Place
from . import modes, paths
from .identity import Look, change, lasting_version, portable_version
from .mounts import MountTable
from .watches import Watches

SETTLED_SECONDS = 5.0
"""File systems count times in steps of up to two seconds. A file that was written longer ago than that gets
another version from the next write."""
_NOT_CACHED = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


@dataclass(frozen=True, slots=True)
class FileContext:
    """The machine's part of a file: mounts, watches, and threads that close. If a part is missing, changes
    and hangs are noticed less reliably."""

    mounts: MountTable | None = None
    watches: Watches | None = None
    close: Callable[[str, int, Sequence[int]], object] | None = None
    """Closes descriptors that a user had of a file below that mount point, on a thread that may hang."""
    settled_seconds: float = SETTLED_SECONDS
    """See `LocalFile.settled`."""

    def asking(self, path: str) -> contextlib.AbstractContextManager[None]:
        """Records, while it lasts, that this thread waits for the mount of `path`."""
        if self.mounts is None:
            return contextlib.nullcontext()
        return self.mounts.asking(self.mounts.point(path).path)


class LocalFile:
    """One open regular file. Owns its descriptors until `close`."""

    kind = "file"
    alignment = linux.PAGE_BYTES
    checksums: Sequence[Checksum] = ()

    def __init__(self, path: str, fd: int, context: FileContext | None = None, uid: int = 0) -> None:
        """Opened for that user. Takes `fd` over, also when it raises."""
        self.uri = path
        self._uid = uid
        self.give_up_at = math.inf
        self._context = context or FileContext()
        self._fd = fd
        self._direct_fd: int | None = None
        self._checking = threading.Lock()
        self._watch = None
        mounts, watches = self._context.mounts, self._context.watches
        point = mounts.point(_name(fd)) if mounts else None
        self.mount_point = point.path if point else ""
        self._closes_at_once = point is None or point.closes_at_once
        try:
            # Before the look that determines the version: a write in between must not be missed.
            self._watch = watches.watch(fd) if watches else None
            self._seen = self._look()
            status = self._seen.status
            if not stat.S_ISREG(status.mode):
                raise CheckpointInvalidError(f"{path} is not a regular file; name one", file=path)
            self.size_bytes = status.size_bytes
            self.mount = mounts.identity(status.mount) if mounts else f"{status.mount.id:x}"
            self.portable_version = self.listed_version = portable_version(status)
            self.writes_before = self._watch.writes_before if self._watch is not None else 0
            self.version = f"{self.portable_version}+{self.writes_before}@{self.mount}"
            self._server = point.server if point else ""
            self._opened_at = time.time()
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # pages that are not cached are read directly
            self._direct_fd = _open_direct(fd)
            self._has_nowait = _has_nowait(fd, self.size_bytes)
            # For files of other users mincore says that everything is cached.
            self._has_mincore = os.geteuid() in (0, status.uid)
        except BaseException:
            self.close()
            raise

    @property
    def lasting_version(self) -> str:
        """See `sources.kept.LocalVersion`."""
        return lasting_version(self._seen.status, self._server)

    @property
    def place(self) -> str:
        root = statx.root_mount()
        return str(Place(f"{statx.boot_id()}.{root.id:x}" if root.id else "", self.mount))

    @property
    def settled(self) -> bool:
        return self._opened_at - self._seen.status.ctime_ns / 1e9 >= self._context.settled_seconds

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        end = min(offset + sum(map(len, views)), self.size_bytes)
        with self._asking():
            try:
                position = self._read_cached(offset, end, views)
                if position < end:
                    about_to_wait()
                    position = self._read_direct(offset, position, end, views)
                while position < end:
                    position += self._read_once(self._fd, offset, position, views)
            except OSError as error:
                raise SourceUnavailableError(
                    f"{self.uri}: reading at byte {offset} failed: {error.strerror}; check the file system",
                    file=self.uri,
                ) from error

    def check_unchanged(self) -> None:
        """Compares size and times, and looks at reported writes. `identity.change` has the rule."""
        with self._asking(), self._checking:
            # In this order: if a writer put a time back before this look, its write has been reported by now.
            now = self._look()
            if self._watch is not None:
                self._watch.look()
            watched = self._watch is not None and not self._watch.lost
            modified = self._watch is not None and self._watch.modified
            why = change(self._seen, now, watched=watched, modified=modified)
            if why:
                raise self._changed(why)
            self._seen = now

    def check_access(self, access: Access) -> None:
        """Raises AccessDeniedError if modes count and forbid the caller to read the file."""
        modes.check_modes(self._fd, self.uri, access)

    def unmounted(self) -> bool:
        """Whether the mount through which it was opened is gone."""
        mounts = self._context.mounts
        return mounts is not None and mounts.is_gone(self._seen.status.mount, self.mount)

    def _asking(self) -> contextlib.AbstractContextManager[None]:
        mounts = self._context.mounts
        return mounts.asking(self.mount_point) if mounts else contextlib.nullcontext()

    def _look(self) -> Look:
        try:
            return Look(statx.file_status(self._fd), _name(self._fd))
        except OSError as error:
            raise SourceUnavailableError(
                f"{self.uri}: asking for its size and times failed: {error.strerror}; check the file system",
                file=self.uri,
            ) from error

    def close(self) -> None:
        if self._watch is not None:
            self._watch.close()
        fds = [fd for fd in (self._fd, self._direct_fd) if fd is not None and fd >= 0]
        self._fd, self._direct_fd = -1, None
        if not fds:
            return
        # Who closes a file without a name frees all its blocks, which may take seconds.
        at_once = self._closes_at_once and os.fstat(fds[0]).st_nlink > 0
        if self._context.close is not None and not at_once:
            self._context.close(self.mount_point, self._uid, fds)
        else:
            for fd in fds:
                os.close(fd)

    def _read_cached(self, offset: int, end: int, views: Sequence[memoryview]) -> int:
        """Copies cached pages from `offset` on. Returns the position reached.

        If pages are not cached, some kernels start to read them ahead. Then they are read twice, or through
        the page cache. So the kernel is first asked whether the first page is cached. If it does not say, one
        page is read before the others.
        """
        if not self._has_nowait:
            return self._read_if_cached(offset, end, views)
        position = offset
        try:
            while position < end:
                cached = linux.page_is_cached(self._fd, position)
                if cached is False:
                    break
                rest = without(views, position - offset)
                if cached is None and end - position > linux.PAGE_BYTES:
                    os.preadv(self._fd, [rest[0][: linux.PAGE_BYTES]], position, os.RWF_NOWAIT)
                count = os.preadv(self._fd, rest, position, os.RWF_NOWAIT)
                if count == 0:
                    break
                position += count
        except OSError as error:
            if error.errno not in _NOT_CACHED:
                raise
        return position

    def _read_if_cached(self, offset: int, end: int, views: Sequence[memoryview]) -> int:
        """The same for file systems without RWF_NOWAIT, such as overlayfs and FUSE: all or nothing."""
        position = offset
        if self._has_mincore and linux.pages_are_cached(self._fd, offset, end - offset):
            while position < end:
                position += self._read_once(self._fd, offset, position, views)
        return position

    def _read_direct(self, offset: int, position: int, end: int, views: Sequence[memoryview]) -> int:
        """Reads whole pages, beginning with the one that holds `position`. Returns the position reached."""
        fd = self._direct_fd
        while fd is not None and position < end:
            aligned = position // linux.PAGE_BYTES * linux.PAGE_BYTES
            if aligned < offset:
                break
            try:
                count = os.preadv(fd, without(views, aligned - offset), aligned)
            except OSError as error:
                if error.errno not in _REFUSES_DIRECT:
                    raise
                break
            if aligned + count <= position:
                break  # the end of the file, or of the part that can be read directly
            position = aligned + count
            self._check_time(position)
        return position

    def _read_once(self, fd: int, offset: int, position: int, views: Sequence[memoryview]) -> int:
        count = os.preadv(fd, without(views, position - offset), position)
        if count == 0:
            raise self._changed("it ended early")
        self._check_time(position + count)
        return count

    def _check_time(self, position: int) -> None:
        if time.monotonic() > self.give_up_at:
            raise too_slow(self.uri, position)

    def _changed(self, why: str) -> CheckpointChangedError:
        return CheckpointChangedError(
            f"{self.uri} was changed while it was read ({why}); load it again", file=self.uri
        )


def _name(fd: int) -> str:
    """The open file's name in the kernel, without asking the file system; empty without /proc."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _open_direct(fd: int) -> int | None:
    """Opens the same file once more for direct I/O. None if that is impossible: the file system has no direct
    I/O, /proc is not mounted, or the file's mode changed since it was opened."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in paths.TOO_MANY:  # the file would be slow for as long as it is open
            raise
        return None


def _has_nowait(fd: int, size_bytes: int) -> bool:
    """Whether the file system has RWF_NOWAIT. It is tried at the end of the file, where nothing can be read
    ahead."""
    try:
        os.preadv(fd, [bytearray(1)], size_bytes, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def open_file(path: str, access: Access, context: FileContext | None = None) -> LocalFile:
    """Opens a regular file that the caller may read. Raises a PenstockError that names the file."""
    fd = paths.open_regular(path, access)
    try:
        file = LocalFile(path, fd, context, access.uid)
        try:
            file.check_access(access)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise paths.path_error(path, access, error) from error
    return file
