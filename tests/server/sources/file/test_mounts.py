"""Which mount a path is of, against the kernel's own word, what changes when something is mounted, and that a
mount which hangs holds up no other. Those that mount do so in a mount namespace of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.server.errors import SourceUnavailableError
from penstock.server.sources.file.mounts import MountTable, MountThreads
from penstock.server.sources.file.store import FileStore
from penstock.server.system import statx
from penstock.server.system.quota import Quota
from penstock.server.system.statx import Mount

ROOT_UID = 0


@pytest.fixture
def table() -> Iterator[MountTable]:
    table = MountTable()
    yield table
    table.close()


@pytest.mark.parametrize("path", ["/", "/dev/shm", "/dev/shm/a/b", "/proc/self/status", "/not/there"])
def test_a_path_is_of_the_innermost_mount_that_holds_it(path: str, table: MountTable) -> None:
    point = table.point(path).path
    assert os.path.ismount(point)
    assert Path(path).is_relative_to(point)
    inner = Path(path)
    while str(inner) != point:
        assert not os.path.ismount(inner)
        inner = inner.parent


@pytest.mark.parametrize(
    "path", ["//proc/self", "/proc//self", "/./proc/self", "/dev/../proc/self", "///proc/.", "/proc/"]
)
def test_a_path_is_of_the_same_mount_however_it_is_spelled(path: str, table: MountTable) -> None:
    assert table.point(path).path == "/proc"


def test_what_only_begins_like_a_mount_is_not_of_it(table: MountTable) -> None:
    assert table.point("/proc").path == "/proc"
    assert table.point("/proc").kind == "proc"
    assert table.point("/processes/a").path == "/"


def test_who_waits_for_a_mount_is_known_while_it_waits(table: MountTable) -> None:
    before = time.monotonic()
    with table.asking("/models"):
        ((mount, since),) = table.asked_since()
        assert mount == "/models"
        assert before <= since <= time.monotonic()
    assert table.asked_since() == []


def test_calls_that_hang_on_one_mount_hold_up_no_other(table: MountTable) -> None:
    threads, hung = MountThreads(2, "test", table), threading.Event()
    try:
        waiting = [threads.of("/proc/a").of(ROOT_UID).submit(hung.wait, 60) for _ in range(3)]
        other = threads.of("/dev/shm/b").of(ROOT_UID).submit(lambda: "done")
        assert other.result(timeout=60) == "done"
        assert not any(one.done() for one in waiting)
    finally:
        hung.set()
        threads.shutdown()
    with pytest.raises(RuntimeError, match="stopped"):
        threads.of("/proc/a").of(ROOT_UID).submit(print)


def test_only_so_many_mounts_have_threads_and_those_without_a_call_make_room(table: MountTable) -> None:
    threads, hung = MountThreads(1, "test", table, most_mounts=2), threading.Event()
    begun = threading.Event()

    def hang() -> None:
        begun.set()
        assert hung.wait(60)

    try:
        waiting = threads.submit("/a", ROOT_UID, hang)
        assert begun.wait(60)
        for mount in ("/b", "/c", "/d"):
            done = threads.submit(mount, ROOT_UID, lambda: "done")
            assert done.result(timeout=60) == "done"
            while not threads._executors[mount].idle:
                time.sleep(0)
        also = threads.submit("/e", ROOT_UID, hung.wait, 60)
        with pytest.raises(
            SourceUnavailableError, match=r"/f cannot be opened: threads wait for 2 other mounts"
        ):
            threads.submit("/f", ROOT_UID, print)
        hung.set()
        waiting.result(timeout=60)
        assert also.result(timeout=60)
    finally:
        hung.set()
        threads.shutdown()


def test_a_user_whose_mounts_all_hang_leaves_threads_to_another_s_mount(table: MountTable) -> None:
    threads, hung = MountThreads(1, "test", table, most_mounts=16), threading.Event()
    anne, bert = 70001, 70002
    waiting = []
    try:
        with contextlib.suppress(SourceUnavailableError):
            for number in range(16):
                waiting.append(threads.submit(f"/{number}", anne, hung.wait, 60))
        assert 8 < len(waiting) < 16
        assert threads.submit("/bert", bert, lambda: "done").result(timeout=60) == "done"
        assert threads.submit("/root", ROOT_UID, lambda: "done").result(timeout=60) == "done"
        hung.set()
        assert all(one.result(timeout=60) for one in waiting)
        for number in range(100):
            done = threads.submit(f"/again/{number}", anne, lambda: "done")
            assert done.result(timeout=60) == "done"
            while not threads._executors[f"/again/{number}"].idle:
                time.sleep(0)
    finally:
        hung.set()
        threads.shutdown()


def test_a_descriptor_that_is_closed_with_an_error_keeps_neither_others_open_nor_its_charge() -> None:
    store = FileStore(Namespace(concurrency=1, block_bytes=4096))  # type: ignore[arg-type]
    descriptors = Quota(64)
    store.charge_to(descriptors)
    read, write = os.pipe()
    try:
        assert store.context.close is not None
        store.context.close("/", 70001, [1 << 30, write])  # there is no such descriptor
        gives_up_at = time.monotonic() + 60
        while descriptors.used:
            assert time.monotonic() < gives_up_at
            time.sleep(0)
        assert os.read(read, 1) == b""  # the other end is closed
    finally:
        os.close(read)
        store.shutdown()
        store._mounts.close()


IN_A_NAMESPACE = """
import os, select, subprocess, sys
from penstock.server.sources.file.mounts import MountEvents, MountTable
from penstock.server.system.statx import Mount, file_status, is_mounted

def mount():
    subprocess.run(["mount", "-t", "tmpfs", "penstock", sys.argv[1]], check=True)
    fd = os.open(sys.argv[1], os.O_RDONLY)
    status = file_status(fd)
    os.close(fd)
    return status.mount

def heard():
    told = bool(select.select([events], [], [], 60)[0])
    events.clear()
    return told

table, events = MountTable(), MountEvents()
reused = Mount(7, unique=False)
"""

needs_mounts = pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")


def in_a_namespace(directory: Path, program: str) -> list[str]:
    """The lines that it printed."""
    child = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c"]
    done = subprocess.run(
        [*child, IN_A_NAMESPACE + program, str(directory)], capture_output=True, text=True, timeout=60
    )
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"nothing can be mounted here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@needs_mounts
def test_two_mounts_in_one_place_differ_and_the_first_is_known_to_be_gone(tmp_path: Path) -> None:
    program = """
first = mount()
known = table.identity(first)
print(heard(), table.point(sys.argv[1] + "/a").path == sys.argv[1], table.is_gone(first, known))
subprocess.run(["umount", sys.argv[1]], check=True)
print(heard(), table.is_gone(first, known), table.point(sys.argv[1]).path == sys.argv[1])
second = mount()
print(table.identity(second) != known, table.is_gone(first, known))
"""
    assert in_a_namespace(tmp_path, program) == ["True True False", "True True False", "True True"]


@needs_mounts
def test_where_ids_are_reused_any_change_of_what_is_mounted_counts(tmp_path: Path) -> None:
    program = """
before = table.identity(reused)
print(table.identity(reused) == before, table.is_gone(reused, before))
mount()
subprocess.run(["umount", sys.argv[1]], check=True)
print(table.identity(reused) == before, table.is_gone(reused, before))
"""
    assert in_a_namespace(tmp_path, program) == ["True False", "False True"]


def test_an_old_kernel_gives_the_ids_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        known = statx.file_status(fd)
        monkeypatch.setattr(statx, "_STATX_MNT_ID_UNIQUE", 0x4000_0000)  # a bit that no kernel knows
        old = statx.file_status(fd)
        monkeypatch.setattr(statx, "_statx", None)
        older = statx.file_status(fd)
    finally:
        os.close(fd)
    assert old.mount == older.mount != Mount(0, False)
    assert not old.mount.unique
    assert (known.device, known.inode, known.ctime_ns) == (older.device, older.inode, older.ctime_ns)
