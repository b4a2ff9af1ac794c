"""The status of an open file, with its birth and the mount that it was opened through.

Python's `os.fstat` has neither birth times nor mounts, and network file systems answer it from a cache that
may be some seconds old.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_AT_STATX_FORCE_SYNC = 0x2000
_STATX_BASIC_STATS = 0x7FF
_STATX_BTIME = 0x800
_STATX_MNT_ID = 0x1000
_STATX_MNT_ID_UNIQUE = 0x4000
_SYS_STATMOUNT = 457
_STATMOUNT_MNT_BASIC = 2

_LAYOUT = struct.Struct("=IIQIIIHHQQQQ qII qII qII qII IIII Q")
"""`struct statx` of <linux/stat.h> up to `stx_mnt_id`. A time is seconds, nanoseconds and padding."""
_STATX_BYTES = 256

_NO_STATX = (errno.ENOSYS, errno.EINVAL, errno.EPERM)
"""Errors of old kernels, and of seccomp profiles that do not know the call."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_statx = getattr(_libc, "statx", None)  # not in every libc


@dataclass(frozen=True, slots=True)
class Mount:
    """A mount, as far as the kernel tells mounts apart. 0: it does not say."""

    id: int
    unique: bool
    """No other mount has the id until the machine is started again (Linux 6.8). Else it may be given to
    another as soon as this one is unmounted."""


@dataclass(frozen=True, slots=True)
class FileStatus:
    """The status of one file at one moment."""

    device: tuple[int, int]
    """Major and minor number."""
    inode: int
    size_bytes: int
    mode: int
    uid: int
    gid: int
    links: int
    mtime_ns: int
    ctime_ns: int
    birth_ns: int
    """0 where the file system does not say."""
    mount: Mount


def file_status(fd: int) -> FileStatus:
    """The status that the file's server reports now. Raises OSError."""
    if _statx is not None:
        answer = ctypes.create_string_buffer(_STATX_BYTES)
        flags = _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC
        mask = _STATX_BASIC_STATS | _STATX_BTIME
        for mount_mask in (_STATX_MNT_ID_UNIQUE, _STATX_MNT_ID):
            if _statx(fd, b"", flags, mask | mount_mask, answer) != 0:
                if ctypes.get_errno() in _NO_STATX:
                    return _plain_status(fd)
                raise _fail("statx")
            status = _parse(answer.raw, mount_mask)
            if status.mount.id:
                break
        return status
    return _plain_status(fd)


def root_mount() -> Mount:
    """The mount of "/": where ids of mounts are unique, it also tells mount namespaces apart."""
    answer = ctypes.create_string_buffer(_STATX_BYTES)
    if _statx is None or _statx(_AT_FDCWD, b"/", 0, _STATX_MNT_ID_UNIQUE, answer) != 0:
        return Mount(0, False)
    return _parse(answer.raw, _STATX_MNT_ID_UNIQUE).mount


class _MountRequest(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_uint32),
        ("spare", ctypes.c_uint32),
        ("mount", ctypes.c_uint64),
        ("param", ctypes.c_uint64),
    )


def is_mounted(mount: Mount) -> bool:
    """Whether a mount with a unique id is still there. True where the kernel does not say."""
    request = _MountRequest(ctypes.sizeof(_MountRequest), 0, mount.id, _STATMOUNT_MNT_BASIC)
    answer = ctypes.create_string_buffer(1024)
    size = ctypes.c_size_t(len(answer))
    failed = _libc.syscall(_SYS_STATMOUNT, ctypes.byref(request), answer, size, 0) != 0
    return not (failed and ctypes.get_errno() == errno.ENOENT)


def _parse(raw: bytes, mount_mask: int) -> FileStatus:
    fields = _LAYOUT.unpack_from(raw)
    mask, _, _, links, uid, gid, mode, _, inode, size_bytes, _, _ = fields[:12]
    _, birth, changed, modified = (fields[at] * 1_000_000_000 + fields[at + 1] for at in (12, 15, 18, 21))
    return FileStatus(
        device=(fields[26], fields[27]),
        inode=inode,
        size_bytes=size_bytes,
        mode=mode,
        uid=uid,
        gid=gid,
        links=links,
        mtime_ns=modified,
        ctime_ns=changed,
        birth_ns=birth if mask & _STATX_BTIME else 0,
        mount=Mount(fields[28], mount_mask == _STATX_MNT_ID_UNIQUE) if mask & mount_mask else Mount(0, False),
    )


def _plain_status(fd: int) -> FileStatus:
    status = os.fstat(fd)
    return FileStatus(
        device=(os.major(status.st_dev), os.minor(status.st_dev)),
        inode=status.st_ino,
        size_bytes=status.st_size,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        links=status.st_nlink,
        mtime_ns=status.st_mtime_ns,
        ctime_ns=status.st_ctime_ns,
        birth_ns=0,
        mount=Mount(_mount_of(fd), False),
    )


def _mount_of(fd: int) -> int:
    """The id of the file's mount, from /proc. 0 if that is not mounted."""
    try:
        with open(f"/proc/self/fdinfo/{fd}", "rb") as lines:
            return next((int(line.split()[1]) for line in lines if line.startswith(b"mnt_id:")), 0)
    except OSError:
        return 0


def _fail(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")
