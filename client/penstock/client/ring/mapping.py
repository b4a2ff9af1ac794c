"""Slabs, mapped side by side into one contiguous range of addresses.

    reserve          PROT_NONE, aligned to 2 MiB so that huge pages fit
    map              every slab at its position, MAP_FIXED; for a window the whole ring twice in a row,
                     so that a segment that crosses the ring's end is contiguous all the same
    one ctypes array over it all; torch tensors made from it keep it alive
    unmap            when the array dies, that is, with the last tensor; then the lease is closed

MAP_PRIVATE and writable: a caller that writes into a tensor gets its own copy of that page, and neither
crashes nor changes what others see. The slabs' fds are closed once mapped.

Interpreter exit does not unmap: code that runs later may still use tensors, and the kernel unmaps anyway.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import sys
import weakref
from collections.abc import Callable, Iterable

from .. import errors
from .written import may_be_written

_HUGE_PAGE_BYTES = 2 * 1024 * 1024
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000  # not in `mmap`; the same on x86-64 and arm64
_MADV_POPULATE_WRITE = 23
_PROT_NONE = 0
_F_GET_SEALS = 1034
_SEALS = 0x2 | 0x4 | 0x10  # SHRINK, GROW, FUTURE_WRITE
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_mmap = _libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_ssize_t,
)
_munmap = _libc.munmap
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_madvise = _libc.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def leased_bytes() -> int:
    """Bytes of slabs that this process has mapped, for loads under way or tensors that it keeps."""
    return sum(addresses.leased_bytes for addresses in list(_mapped))


class Mapping:
    """The ring of one load as memory.

    `array` spans `mapped_bytes`: the ring's `capacity_bytes` once, or twice when mirrored. The object
    itself is disposable; the memory lives as long as `array` or a tensor made from it.
    """

    __slots__ = ("_addresses", "address", "array", "capacity_bytes", "mapped_bytes")

    def __init__(
        self,
        packets: Iterable[list[int]],
        *,
        slab_count: int,
        slab_bytes: int,
        mirrored: bool,
        release: Callable[[], None],
    ) -> None:
        """Maps the slabs of `packets`, lists of fds in ring order, and closes the fds.

        `release` is called once, after the memory is unmapped: when the last tensor has died, or before this
        raises. Raises ProtocolError for slabs that differ from the daemon's promise: a memfd that could still
        shrink would kill this process, and one that others could write is no checkpoint.
        """
        if slab_count < 1 or slab_bytes < 1 or slab_bytes % mmap.PAGESIZE:
            release()
            raise errors.broken(f"a ring of {slab_count} slabs of {slab_bytes} bytes cannot be mapped")
        self.capacity_bytes = slab_count * slab_bytes
        self.mapped_bytes = self.capacity_bytes * (2 if mirrored else 1)
        self._addresses = addresses = _Addresses(self.mapped_bytes, release)
        self.address = addresses.start
        try:
            self._map_slabs(packets, slab_count, slab_bytes, mirrored)
            _madvise(self.address, self.mapped_bytes, mmap.MADV_HUGEPAGE)
            self.array = (ctypes.c_ubyte * self.mapped_bytes).from_address(self.address)
            weakref.finalize(self.array, addresses.unmap).atexit = False
        except BaseException:
            addresses.unmap()
            raise

    def discard(self, offset: int, size_bytes: int) -> None:
        """Discards writes to this range, rounded out to pages, so that it shows the slabs again."""
        start = offset - offset % mmap.PAGESIZE
        end = -(-(offset + size_bytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        if end == start or not may_be_written(self.address + start, self.address + end):
            return
        if _madvise(self.address + start, end - start, mmap.MADV_DONTNEED):
            raise _os_error("cannot drop the private pages of a segment")

    def revoke(self) -> None:
        """Replaces the slabs by zeros and releases them, even if references to the array are left."""
        self._addresses.revoke()

    def _map_slabs(
        self, packets: Iterable[list[int]], slab_count: int, slab_bytes: int, mirrored: bool
    ) -> None:
        mapped = 0
        for fds in packets:
            try:
                if mapped + len(fds) > slab_count:
                    raise errors.broken(f"more than {slab_count} slabs were sent")
                for fd in fds:
                    _check_slab(fd, slab_bytes)
                    address = self.address + mapped * slab_bytes
                    _map_slab(address, fd, slab_bytes)
                    if mirrored:
                        _map_slab(address + self.capacity_bytes, fd, slab_bytes)
                    mapped += 1
            finally:
                for fd in fds:
                    os.close(fd)
        if mapped != slab_count:
            raise errors.broken(f"{mapped} slabs were sent instead of {slab_count}")


def map_anonymous(size_bytes: int) -> int:
    """The address of fresh private memory, of huge pages where the system has them on request."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    address = _mmap(None, size_bytes, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
    if address is None or address == _MAP_FAILED:
        raise _os_error(f"cannot map {size_bytes} bytes")
    _madvise(address, size_bytes, mmap.MADV_HUGEPAGE)
    return int(address)


def populate(address: int, size_bytes: int) -> None:
    """Takes the pages of a writable range now, if the kernel can do that (Linux 5.14)."""
    _madvise(address, size_bytes, _MADV_POPULATE_WRITE)


def keep_from_children(address: int, size_bytes: int) -> None:
    """Forked processes do not get the range, so its pages never move while a device reads them."""
    if _madvise(address, size_bytes, mmap.MADV_DONTFORK):
        raise _os_error("cannot keep memory from forked processes")


def unmap(address: int, size_bytes: int) -> None:
    """Only when nothing refers to the range any more."""
    if _munmap(address, size_bytes):
        raise _os_error(f"cannot unmap {size_bytes} bytes")


class _Addresses:
    """A reserved range that starts at a multiple of 2 MiB; `unmap` and the release work once."""

    _size_bytes = 0

    def __init__(self, size_bytes: int, release: Callable[[], None]) -> None:
        self._release: Callable[[], None] | None = release
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        reserved = _mmap(None, size_bytes + _HUGE_PAGE_BYTES, _PROT_NONE, flags, -1, 0)
        if reserved == _MAP_FAILED:
            error = _os_error(f"cannot reserve {size_bytes} bytes of addresses")
            self._release_once()
            raise error
        before = -reserved % _HUGE_PAGE_BYTES
        self.start: int = reserved + before
        self._size_bytes = size_bytes
        if before:
            _munmap(reserved, before)
        _munmap(self.start + size_bytes, _HUGE_PAGE_BYTES - before)
        _mapped.add(self)

    @property
    def leased_bytes(self) -> int:
        return self._size_bytes if self._release is not None else 0

    def unmap(self) -> None:
        size_bytes, self._size_bytes = self._size_bytes, 0
        if size_bytes:
            _munmap(self.start, size_bytes)
        self._release_once()

    def __del__(self) -> None:
        """What is left to do, if an exception of a signal handler broke off the finalizer that unmaps."""
        if not sys.is_finalizing():
            self.unmap()

    def revoke(self) -> None:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED | _MAP_NORESERVE
        if _mmap(self.start, self._size_bytes, protection, flags, -1, 0) != self.start:
            raise _os_error("cannot give slabs back")
        self._release_once()

    def _release_once(self) -> None:
        if self._release is not None:
            self._release()
            self._release = None


_mapped: weakref.WeakSet[_Addresses] = weakref.WeakSet()


def _map_slab(address: int, fd: int, size_bytes: int) -> None:
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    if (
        _mmap(address, size_bytes, protection, mmap.MAP_PRIVATE | _MAP_FIXED | _MAP_NORESERVE, fd, 0)
        != address
    ):
        raise _os_error("cannot map a slab")


def _check_slab(fd: int, slab_bytes: int) -> None:
    size_bytes = os.fstat(fd).st_size
    if size_bytes != slab_bytes:
        raise errors.broken(f"a slab has {size_bytes} bytes instead of {slab_bytes}")
    try:
        seals = fcntl.fcntl(fd, _F_GET_SEALS)
    except OSError as error:
        raise errors.broken("a slab is not a memfd") from error
    if seals & _SEALS != _SEALS:
        raise errors.broken(f"a slab is not sealed against change (seals {seals:#x})")


def _os_error(what: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(
        number,
        f"{what} ({os.strerror(number)}): load less at a time, or raise this process's limits of memory "
        "(`ulimit -v`) and of mappings (vm.max_map_count)",
    )
