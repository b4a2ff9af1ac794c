"""The system calls that Python does not wrap, or wraps without releasing the GIL."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

PAGE_BYTES = max(4096, os.sysconf("SC_PAGE_SIZE"))
"""The size of a page, and the alignment of direct reads. 64 KiB on some arm64 machines."""
HUGE_PAGE_BYTES = 2 << 20

F_SEAL_SEAL = 0x0001
F_SEAL_SHRINK = 0x0002
F_SEAL_GROW = 0x0004
F_SEAL_FUTURE_WRITE = 0x0010
MFD_NOEXEC_SEAL = 0x0008

MADV_HUGEPAGE = 14
MADV_POPULATE_WRITE = 23
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_MAP_FAILED = ctypes.c_void_p(-1).value

_SYS_OPENAT2 = 437
_SYS_CACHESTAT = 451
_RESOLVE_NO_MAGICLINKS = 0x02
_RESOLVE_BENEATH = 0x08
_MOST_RACES = 10_000
"""How often a path is resolved. The kernel gives up on `..` if anything on the machine is renamed meanwhile.
Measured: three attempts at most while two processes do nothing but rename."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long


def _fail(call: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{call}: {os.strerror(code)}")


def map_shared_aligned(fd: int, size_bytes: int) -> int:
    """Maps `fd` readable, writable and shared at an address that suits huge pages; returns the address."""
    room = size_bytes + HUGE_PAGE_BYTES
    start: int | None = _libc.mmap(
        None, room, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0
    )
    if start is None or start == _MAP_FAILED:
        raise _fail("mmap")
    address = -(-start // HUGE_PAGE_BYTES) * HUGE_PAGE_BYTES
    mapped = _libc.mmap(
        address, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED, fd, 0
    )
    if mapped != address:
        error = _fail("mmap")
        _libc.munmap(start, room)
        raise error
    if address > start:
        _libc.munmap(start, address - start)
    if start + room > address + size_bytes:
        _libc.munmap(address + size_bytes, start + room - address - size_bytes)
    return address


def unmap(address: int, size_bytes: int) -> None:
    if _libc.munmap(address, size_bytes) != 0:
        raise _fail("munmap")


def advise(address: int, size_bytes: int, advice: int) -> None:
    """`madvise` without the GIL: populating a slab takes long."""
    while _libc.madvise(address, size_bytes, advice) != 0:
        if ctypes.get_errno() != errno.EINTR:
            raise _fail("madvise")


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def open_beneath(directory: int, path: str, flags: int) -> int:
    """Opens `path` relative to the open `directory`; the kernel refuses every way out of it.

    Symbolic links are followed as long as they stay beneath. The caller owns the descriptor.
    Raises OSError: EXDEV for a path that leaves, ELOOP for a magic link, EAGAIN if renames disturb each of
    many attempts, the usual ones otherwise.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS)
    raw = os.fsencode(path)
    for _ in range(_MOST_RACES):
        fd = int(
            _libc.syscall(
                _SYS_OPENAT2,
                directory,
                ctypes.c_char_p(raw),
                ctypes.byref(how),
                ctypes.c_size_t(ctypes.sizeof(how)),
            )
        )
        if fd >= 0:
            return fd
        if ctypes.get_errno() not in (errno.EINTR, errno.EAGAIN):  # EAGAIN: `..` raced with a rename
            break
    raise _fail("openat2")


class _CacheRange(ctypes.Structure):
    _fields_ = (("offset", ctypes.c_uint64), ("size_bytes", ctypes.c_uint64))


class _CacheCounts(ctypes.Structure):
    _fields_ = (
        ("cached", ctypes.c_uint64),
        ("dirty", ctypes.c_uint64),
        ("written_back", ctypes.c_uint64),
        ("evicted", ctypes.c_uint64),
        ("recently_evicted", ctypes.c_uint64),
    )


def page_is_cached(fd: int, offset: int) -> bool | None:
    """Whether the page cache holds the page at `offset`. Does not read the page. None if the kernel does not
    say: before Linux 6.5, behind some seccomp profiles, and since 6.13 for files of another user."""
    page, counts = _CacheRange(offset, PAGE_BYTES), _CacheCounts()
    if _libc.syscall(_SYS_CACHESTAT, fd, ctypes.byref(page), ctypes.byref(counts), 0) != 0:
        return None
    return bool(counts.cached)


def pages_are_cached(fd: int, offset: int, size_bytes: int) -> bool:
    """Whether the page cache holds all of a range. For a file that this process neither owns nor may write,
    the kernel says so of any range."""
    start = offset // PAGE_BYTES * PAGE_BYTES
    length = offset + size_bytes - start
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, start)
    if address is None or address == _MAP_FAILED:
        return False
    pages = ctypes.create_string_buffer(-(-length // PAGE_BYTES))
    try:
        return _libc.mincore(address, length, pages) == 0 and all(byte & 1 for byte in pages.raw)
    finally:
        unmap(address, length)
