from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from penstock.client.errors import ProtocolError
from penstock.client.ring.mapping import Mapping, keep_from_children, map_anonymous, populate, unmap

from ...e2e.support import open_fds
from .. import fake_daemon
from ..fake_daemon import FUTURE_WRITE, GROW, SHRINK, SLAB_BYTES


class Released:
    """Counts how often a mapping gave its lease back."""

    count = 0

    def __call__(self) -> None:
        self.count += 1


make_slab = partial(fake_daemon.make_slab, name="mapped-slab")
NO_SLAB = os.path.realpath("/proc/self/exe")


def slab_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:mapped-slab")


def slab_fds() -> int:
    """What this file makes and no other: gRPC closes sockets of earlier tests when it likes."""
    return sum("memfd:mapped-slab" in name or name == NO_SLAB for name in open_fds(os.getpid()))


def map_slabs(contents: list[bytes], mirrored: bool, release: Callable[[], None]) -> Mapping:
    """Slabs that each start and end with the given byte; only the mapping refers to them afterwards."""
    fds = []
    for content in contents:
        fd, memory = make_slab()
        memory[:] = content * SLAB_BYTES
        memory.close()
        fds.append(fd)
    return Mapping(
        iter([fds[:1], fds[1:]] if len(fds) > 1 else [fds]),
        slab_count=len(contents),
        slab_bytes=SLAB_BYTES,
        mirrored=mirrored,
        release=release,
    )


def test_full_ring_is_contiguous_and_aligned_for_huge_pages() -> None:
    mapping = map_slabs([b"a", b"b", b"c"], False, Released())
    assert mapping.mapped_bytes == mapping.capacity_bytes == 3 * SLAB_BYTES
    assert mapping.address % (2 * 1024 * 1024) == 0
    border = torch.frombuffer(mapping.array, dtype=torch.uint8, offset=SLAB_BYTES - 2, count=4)
    assert bytes(border.tolist()) == b"aabb"


def test_mirrored_ring_continues_from_its_end_to_its_start() -> None:
    mapping = map_slabs([b"a", b"b"], True, Released())
    assert mapping.mapped_bytes == 2 * mapping.capacity_bytes
    wrapped = torch.frombuffer(mapping.array, dtype=torch.uint8, offset=2 * SLAB_BYTES - 3, count=6)
    assert bytes(wrapped.tolist()) == b"bbbaaa"


@pytest.mark.parametrize("mirrored", [False, True])
def test_memory_and_lease_end_with_the_last_tensor(mirrored: bool) -> None:
    fds, maps = slab_fds(), slab_mappings()
    released = Released()
    mapping = map_slabs([b"a", b"b"], mirrored, released)
    assert slab_fds() == fds
    assert slab_mappings() > maps
    first = torch.frombuffer(mapping.array, dtype=torch.uint8, count=8)
    second = first.view(2, 4)[1]
    del mapping, first
    assert released.count == 0
    assert second.tolist() == [97, 97, 97, 97]
    del second
    gc.collect()
    assert released.count == 1
    assert slab_mappings() == maps


def test_writing_changes_neither_the_slab_nor_the_mirror_and_discard_forgets_it() -> None:
    fd, memory = make_slab()
    memory[:3] = b"xyz"
    mapping = Mapping([[fd]], slab_count=1, slab_bytes=SLAB_BYTES, mirrored=True, release=Released())
    tensor = torch.frombuffer(mapping.array, dtype=torch.uint8, count=3)
    mirror = torch.frombuffer(mapping.array, dtype=torch.uint8, count=3, offset=SLAB_BYTES)
    tensor.fill_(0)
    assert memory[:3] == b"xyz"
    assert bytes(mirror.tolist()) == b"xyz"
    memory[:3] = b"new"
    assert bytes(tensor.tolist()) == b"\0\0\0"
    mapping.discard(1, 1)
    assert bytes(tensor.tolist()) == b"new"


def not_a_memfd() -> int:
    fd = os.open(NO_SLAB, os.O_RDONLY)
    assert os.fstat(fd).st_size != SLAB_BYTES
    return fd


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_slab(SLAB_BYTES // 2)[0], "instead of"),
        (lambda: make_slab(seals=GROW | FUTURE_WRITE)[0], "not sealed"),
        (lambda: make_slab(seals=SHRINK | FUTURE_WRITE)[0], "not sealed"),
        (lambda: make_slab(seals=SHRINK | GROW)[0], "not sealed"),
        (not_a_memfd, "instead of"),
    ],
)
def test_slabs_that_could_change_underneath_are_refused(make: Callable[[], int], message: str) -> None:
    fds, maps = slab_fds(), slab_mappings()
    released = Released()
    good, memory = make_slab()
    memory.close()
    with pytest.raises(ProtocolError, match=message):
        Mapping([[good, make()]], slab_count=2, slab_bytes=SLAB_BYTES, mirrored=False, release=released)
    gc.collect()
    assert released.count == 1
    assert (slab_fds(), slab_mappings()) == (fds, maps)


def test_a_file_of_the_right_size_is_no_slab(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\0" * SLAB_BYTES)
    fd = os.open(path, os.O_RDWR)
    with pytest.raises(ProtocolError):
        Mapping([[fd]], slab_count=1, slab_bytes=SLAB_BYTES, mirrored=False, release=Released())


@pytest.mark.parametrize("count", [1, 3])
def test_the_wrong_number_of_slabs_is_refused(count: int) -> None:
    released = Released()
    packets = [[make_slab()[0]] for _ in range(count)]
    with pytest.raises(ProtocolError, match="slabs were sent"):
        Mapping(packets, slab_count=2, slab_bytes=SLAB_BYTES, mirrored=False, release=released)
    assert released.count == 1


@pytest.mark.parametrize(("slab_count", "slab_bytes"), [(0, SLAB_BYTES), (1, 0), (1, 1000)])
def test_impossible_rings_are_refused(slab_count: int, slab_bytes: int) -> None:
    released = Released()
    with pytest.raises(ProtocolError, match="cannot be mapped"):
        Mapping([], slab_count=slab_count, slab_bytes=slab_bytes, mirrored=False, release=released)
    assert released.count == 1


def test_more_addresses_than_there_are_raise_and_release() -> None:
    released = Released()
    with pytest.raises(OSError, match="cannot reserve"):
        Mapping([], slab_count=1 << 30, slab_bytes=1 << 30, mirrored=False, release=released)
    assert released.count == 1


def test_a_failure_while_slabs_come_unmaps_what_was_mapped() -> None:
    maps = slab_mappings()
    released = Released()

    def packets() -> Iterator[list[int]]:
        yield [make_slab()[0]]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Mapping(packets(), slab_count=2, slab_bytes=SLAB_BYTES, mirrored=False, release=released)
    gc.collect()
    assert released.count == 1
    assert slab_mappings() == maps


def test_the_array_type_has_the_length_of_the_mapping() -> None:
    mapping = map_slabs([b"a"], False, Released())
    assert ctypes.sizeof(mapping.array) == SLAB_BYTES


def test_pages_of_a_buffer_are_taken_at_once_and_stay_with_this_process() -> None:
    size_bytes = 4 << 20
    address = map_anonymous(size_bytes)
    try:
        populate(address, size_bytes)
        keep_from_children(address, size_bytes)
        area = memory_area(address)
        assert area["Rss"] == f"{size_bytes >> 10} kB"
        assert "dc" in area["VmFlags"].split()  # not copied by fork
    finally:
        unmap(address, size_bytes)


def memory_area(address: int) -> dict[str, str]:
    """What the kernel says of the area that starts there."""
    _, _, after = Path("/proc/self/smaps").read_text().partition(f"\n{address:x}-")
    lines = after.splitlines()[1:]
    end = next(i for i, line in enumerate([*lines, "0-0"]) if "-" in line.split()[0])
    return {name: value.strip() for name, value in (line.split(":", 1) for line in lines[:end])}
