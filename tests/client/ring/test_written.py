from __future__ import annotations

import mmap
import os
import platform
from collections.abc import Iterator

import numpy as np
import pytest

from penstock.client.ring.written import may_be_written

PAGES = 64
SIZE = PAGES * mmap.PAGESIZE

knows = pytest.mark.skipif(
    tuple(map(int, platform.release().split("-")[0].split(".")[:2])) < (6, 7),
    reason="this kernel has no PAGEMAP_SCAN",
)


@pytest.fixture
def mapping() -> Iterator[np.ndarray[tuple[int], np.dtype[np.uint8]]]:
    """A private writable mapping of a memfd, as clients map slabs."""
    fd = os.memfd_create("test")
    os.write(fd, bytes(SIZE))
    memory = mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    os.close(fd)
    array = np.frombuffer(memory, dtype=np.uint8)
    yield array
    del array


def written(mapping: np.ndarray[tuple[int], np.dtype[np.uint8]], first: int = 0, last: int = PAGES) -> bool:
    start = mapping.ctypes.data
    return may_be_written(start + first * mmap.PAGESIZE, start + last * mmap.PAGESIZE)


@knows
def test_pages_that_were_only_read_are_not_written(
    mapping: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> None:
    assert not written(mapping)
    assert mapping.sum() == 0
    assert not written(mapping)


@knows
@pytest.mark.parametrize("page", [0, 17, PAGES - 1])
def test_one_written_byte_is_found(page: int, mapping: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    mapping[page * mmap.PAGESIZE + 5] = 1
    assert written(mapping)
    assert written(mapping, page, page + 1)
    if page:
        assert not written(mapping, 0, page)
    if page + 1 < PAGES:
        assert not written(mapping, page + 1, PAGES)


def test_a_range_that_cannot_be_asked_about_counts_as_written() -> None:
    assert may_be_written(1, 2)
