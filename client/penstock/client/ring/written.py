"""Has this process written to a range of a private mapping? The kernel's page tables know.

A private mapping shows the slab's pages until the process writes to one, which gives it a copy of its own:
a page that belongs to no file. Linux 6.7 and later find such pages by one ioctl (PAGEMAP_SCAN, described in
its admin-guide/mm/pagemap), which takes a fraction of the time of dropping the range and mapping it again.
"""

from __future__ import annotations

import ctypes
import fcntl

_PAGE_IS_FILE = 1 << 2
_PAGE_IS_PRESENT = 1 << 3
_PAGE_IS_SWAPPED = 1 << 4


class _Region(ctypes.Structure):
    _fields_ = (("start", ctypes.c_uint64), ("end", ctypes.c_uint64), ("categories", ctypes.c_uint64))


class _Scan(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


_PAGEMAP_SCAN = (3 << 30) | (ctypes.sizeof(_Scan) << 16) | (ord("f") << 8) | 16


def may_be_written(start: int, end: int) -> bool:
    """True unless the kernel reports that no page between these page-aligned addresses is a private copy."""
    region = _Region()
    scan = _Scan(
        size=ctypes.sizeof(_Scan),
        start=start,
        end=end,
        vec=ctypes.addressof(region),
        vec_len=1,
        max_pages=1,
        category_inverted=_PAGE_IS_FILE,
        category_mask=_PAGE_IS_FILE,
        category_anyof_mask=_PAGE_IS_PRESENT | _PAGE_IS_SWAPPED,
        return_mask=_PAGE_IS_PRESENT,
    )
    try:
        # A file object closes itself, if an exception of a signal handler comes before the block begins.
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            return fcntl.ioctl(pagemap, _PAGEMAP_SCAN, scan) != 0  # type: ignore[no-any-return]
    except OSError:  # no /proc in this container, or one that hides it, or a kernel before 6.7
        return True
