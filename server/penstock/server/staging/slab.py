"""One slab: a sealed memfd that the daemon can write and everyone else can only read."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os

from ..system import linux


class Slab:
    """Owns one memfd and the daemon's permanent mapping of it until `close`.

    After construction nobody, the daemon included, can resize the memfd, punch holes into it or map it shared
    and writable again. Only the mapping made here can still be written. A descriptor that was handed out
    cannot be taken back, so `owner_uid` never changes from one uid to another.
    """

    __slots__ = ("_address", "fd", "owner_uid", "populated", "size_bytes", "view")

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.owner_uid: int | None = None
        """uid of the only user that may ever hold this slab; None while no user has."""
        self.populated = False
        self.fd = _memfd("penstock")
        try:
            os.ftruncate(self.fd, size_bytes)
            self._address = linux.map_shared_aligned(self.fd, size_bytes)
            try:
                with contextlib.suppress(OSError):  # kernels without huge pages refuse the flag itself
                    linux.advise(self._address, size_bytes, linux.MADV_HUGEPAGE)
                fcntl.fcntl(
                    self.fd,
                    fcntl.F_ADD_SEALS,
                    linux.F_SEAL_SHRINK | linux.F_SEAL_GROW | linux.F_SEAL_FUTURE_WRITE | linux.F_SEAL_SEAL,
                )
                raw = (ctypes.c_char * size_bytes).from_address(self._address)
                self.view = memoryview(raw).cast("B")
            except BaseException:
                linux.unmap(self._address, size_bytes)
                raise
        except BaseException:
            os.close(self.fd)
            raise

    def populate(self) -> None:
        """Touches every page, so that reading into the slab never waits for a fresh page. Slow."""
        linux.advise(self._address, self.size_bytes, linux.MADV_POPULATE_WRITE)
        self.populated = True

    def close(self) -> None:
        """Unmaps and closes. No view may be in use: a write after this would crash the daemon."""
        self.view.release()
        try:
            linux.unmap(self._address, self.size_bytes)
        finally:
            os.close(self.fd)


def _memfd(name: str) -> int:
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | linux.MFD_NOEXEC_SEAL)
    except OSError as error:  # kernels before 6.3 do not know the flag
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)
