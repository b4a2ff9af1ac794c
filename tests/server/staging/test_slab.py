"""What the seals promise, tried from another process and through every other way to the same memory."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from penstock.server.staging.slab import Slab

from ..support import MIB, SLAB_BYTES, more_fds, open_fds

FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)


@pytest.fixture
def slab() -> Iterator[Slab]:
    slab = Slab(SLAB_BYTES)
    slab.view[:4] = b"real"
    yield slab
    slab.close()


def map_shared_writable(fd: int) -> None:
    mmap.mmap(fd, SLAB_BYTES, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)


def make_a_readable_mapping_writable(fd: int) -> None:
    address = _libc.mmap(None, SLAB_BYTES, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    assert address not in (None, ctypes.c_void_p(-1).value)
    try:
        if _libc.mprotect(ctypes.c_void_p(address), SLAB_BYTES, mmap.PROT_READ | mmap.PROT_WRITE):
            raise OSError(ctypes.get_errno(), "mprotect")
    finally:
        _libc.munmap(ctypes.c_void_p(address), SLAB_BYTES)


def punch_a_hole(fd: int) -> None:
    mode = FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
    if _libc.fallocate(fd, mode, ctypes.c_long(0), ctypes.c_long(4096)):
        raise OSError(ctypes.get_errno(), "fallocate")


def add_a_seal(fd: int) -> None:
    fcntl.fcntl(fd, 1033, 0x8)


ATTACKS: dict[str, Callable[[int], object]] = {
    "map shared and writable": map_shared_writable,
    "pwrite": lambda fd: os.pwrite(fd, b"evil", 0),
    "shrink": lambda fd: os.ftruncate(fd, 4096),
    "empty": lambda fd: os.ftruncate(fd, 0),
    "grow": lambda fd: os.ftruncate(fd, 2 * SLAB_BYTES),
    "punch a hole": punch_a_hole,
    "mprotect": make_a_readable_mapping_writable,
    "seal further": add_a_seal,
}


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_a_descriptor_cannot_change_the_slab(slab: Slab, attack: str) -> None:
    with pytest.raises(OSError):
        ATTACKS[attack](slab.fd)
    assert bytes(slab.view[:5]) == b"real\0"
    assert os.fstat(slab.fd).st_size == SLAB_BYTES


@pytest.mark.parametrize("attack", list(ATTACKS))
def test_reopening_the_descriptor_for_writing_does_not_help(slab: Slab, attack: str) -> None:
    try:
        fd = os.open(f"/proc/self/fd/{slab.fd}", os.O_RDWR)
    except PermissionError:
        return
    try:
        with pytest.raises(OSError):
            ATTACKS[attack](fd)
    finally:
        os.close(fd)
    assert bytes(slab.view[:5]) == b"real\0"


def test_another_process_can_read_but_neither_write_nor_resize(slab: Slab) -> None:
    """The child gets the descriptor by SCM_RIGHTS, and reopens it too."""
    child_code = """
import mmap, os, socket, sys
connection = socket.socket(fileno=int(sys.argv[1]))
_, fds, _, _ = socket.recv_fds(connection, 1, 1)
for fd in (fds[0], os.open(f"/proc/self/fd/{fds[0]}", os.O_RDWR)):
    for name, attack in {
        "mmap": lambda: mmap.mmap(fd, 4096, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE),
        "pwrite": lambda: os.pwrite(fd, b"evil", 0),
        "ftruncate": lambda: os.ftruncate(fd, 0),
        "fallocate": lambda: os.posix_fallocate(fd, 0, 1 << 22),
    }.items():
        try:
            attack()
        except OSError:
            continue
        sys.exit(f"{name} succeeded")
shared = mmap.mmap(fds[0], 4096, mmap.MAP_SHARED, mmap.PROT_READ)
private = mmap.mmap(fds[0], 4096, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
private[:4] = b"mine"
assert shared[:4] == b"real" and private[:4] == b"mine"
connection.send(b"1")
connection.recv(1)
assert shared[4:8] == b"more", "a later write of the daemon is not seen"
connection.send(b"2")
"""
    here, there = socket.socketpair()
    with here, there:
        with subprocess.Popen(
            [sys.executable, "-I", "-c", child_code, str(there.fileno())], pass_fds=[there.fileno()]
        ) as child:
            there.close()
            socket.send_fds(here, [b"x"], [slab.fd])
            if here.recv(1) == b"1":
                assert bytes(slab.view[:4]) == b"real"
                slab.view[4:8] = b"more"
                here.send(b"x")
                assert here.recv(1) == b"2"
        assert child.returncode == 0


def test_a_private_mapping_can_be_written_and_nobody_else_sees_it(slab: Slab) -> None:
    with mmap.mmap(slab.fd, SLAB_BYTES, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as private:
        private[:4] = b"mine"
        assert bytes(slab.view[:4]) == b"real"


def test_the_daemons_view_covers_the_slab_and_its_writes_are_seen(slab: Slab) -> None:
    assert len(slab.view) == SLAB_BYTES
    with mmap.mmap(slab.fd, SLAB_BYTES, mmap.MAP_SHARED, mmap.PROT_READ) as other:
        slab.view[-3:] = b"end"
        assert other[-3:] == b"end"


def test_files_can_be_read_straight_into_the_view(slab: Slab) -> None:
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"bytes of a file")
        assert os.readv(read_end, [slab.view[100:105], slab.view[200:210]]) == 15
    finally:
        os.close(read_end)
        os.close(write_end)
    assert bytes(slab.view[100:105]) == b"bytes"
    assert bytes(slab.view[200:210]) == b" of a file"


def test_the_descriptor_is_not_inherited(slab: Slab) -> None:
    assert not os.get_inheritable(slab.fd)


def mapped_at(address: int) -> bool:
    with open("/proc/self/maps") as maps:
        ranges = [line.split()[0].split("-") for line in maps]
    return any(int(start, 16) <= address < int(end, 16) for start, end in ranges)


def test_close_gives_back_the_descriptor_and_the_mapping() -> None:
    before = open_fds()
    slab = Slab(SLAB_BYTES)
    address, inode = slab._address, str(os.fstat(slab.fd).st_ino)
    assert address % (2 * MIB) == 0
    assert mapped_at(address)
    assert mapped_at(address + SLAB_BYTES - 1)
    slab.close()
    assert not more_fds(before)
    with open("/proc/self/maps") as maps:  # loads of earlier tests may have others mapped
        assert not any("memfd:penstock" in line and inode in line.split() for line in maps)


def test_making_and_closing_slabs_leaves_no_mapping_behind() -> None:
    def mapped_bytes() -> int:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[0]) * mmap.PAGESIZE

    Slab(SLAB_BYTES).close()
    before = mapped_bytes()
    for _ in range(400):
        Slab(SLAB_BYTES).close()
    # A thread of somebody else's that starts meanwhile maps less than half of it.
    assert mapped_bytes() - before < 200 * SLAB_BYTES


def test_populating_makes_every_page_resident_and_changes_no_byte(slab: Slab) -> None:
    assert not slab.populated
    slab.populate()
    assert slab.populated
    assert os.fstat(slab.fd).st_blocks * 512 == SLAB_BYTES
    assert bytes(slab.view[:5]) == b"real\0"


def test_a_failed_slab_leaves_nothing_behind() -> None:
    before = open_fds()
    with pytest.raises(OSError):
        Slab(1 << 60)
    assert not more_fds(before)


def test_a_slab_can_be_written_while_others_read_it(slab: Slab) -> None:
    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2))
        other = stack.enter_context(mmap.mmap(slab.fd, SLAB_BYTES, mmap.MAP_SHARED, mmap.PROT_READ))

        def write(start: int) -> None:
            slab.view[start : start + MIB] = bytes([start % 255 + 1]) * MIB

        list(pool.map(write, range(0, SLAB_BYTES, MIB)))
        for start in range(0, SLAB_BYTES, MIB):
            assert other[start : start + MIB] == bytes([start % 255 + 1]) * MIB
