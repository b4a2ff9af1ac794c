"""Open files, on a disk and on tmpfs."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.server.errors import CheckpointChangedError, SourceUnavailableError
from penstock.server.sources import Access
from penstock.server.sources.file.local_file import FileContext, LocalFile, open_file
from penstock.server.sources.file.mounts import MountTable
from penstock.server.sources.file.watches import Watches
from penstock.server.system import linux, statx

from ...support import MIB, ROOT, wait_for_tick

pytestmark = pytest.mark.usefixtures("no_descriptor_is_leaked")

CONTENT = random.Random(3).randbytes(MIB + 12_345)
SIZES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 12_345, 65_536, MIB, MIB + 12_345]


@pytest.fixture(params=["disk", "tmpfs"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where direct I/O works, as a rule, and where it may be refused."""
    if request.param == "disk":
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def context() -> Iterator[FileContext]:
    """As the daemon has it: the kernel tells of writes."""
    watches = Watches()
    yield FileContext(watches=watches)
    watches.close()


def write_cold(path: Path, content: bytes) -> Path:
    """A file of which nothing is in the page cache, where that can be arranged."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return path


def write_warm(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    assert path.read_bytes() == content
    return path


def aligned_buffer(size: int) -> memoryview:
    return memoryview(mmap.mmap(-1, max(size, 1)))[:size]


def read(file: LocalFile, start: int, end: int) -> bytes:
    """As the staging buffer reads: whole pages, into memory that is aligned as the file is."""
    begin, finish = start // 4096 * 4096, -(-end // 4096) * 4096
    buffer = aligned_buffer(finish - begin)
    half = (finish - begin) // 8192 * 4096
    file.read_into(begin, [buffer[:half], buffer[half:]])
    return bytes(buffer[start - begin : end - begin])


@pytest.mark.parametrize("write", [write_cold, write_warm])
@pytest.mark.parametrize("size", SIZES)
def test_a_whole_file_is_read_right(directory: Path, size: int, write: Callable[[Path, bytes], Path]) -> None:
    file = open_file(str(write(directory / "f", CONTENT[:size])), ROOT)
    try:
        assert file.size_bytes == size
        assert read(file, 0, size) == CONTENT[:size]
        file.check_unchanged()
    finally:
        file.close()


@given(st.integers(0, len(CONTENT)), st.integers(0, 300_000), st.booleans())
@settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_range_is_read_right(tmp_path: Path, start: int, count: int, cold: bool) -> None:
    path = tmp_path / "f"
    (write_cold if cold else write_warm)(path, CONTENT)
    file = open_file(str(path), ROOT)
    try:
        end = min(start + count, len(CONTENT))
        assert read(file, start, end) == CONTENT[start:end]
        assert read(file, len(CONTENT) - 1, len(CONTENT)) == CONTENT[-1:]
    finally:
        file.close()


@pytest.mark.parametrize("write", [write_cold, write_warm])
@pytest.mark.parametrize("offset", [1, 511, 512, 4095, 4097, 5000])
def test_reading_from_an_odd_offset_into_several_views_is_right(
    tmp_path: Path, offset: int, write: Callable[[Path, bytes], Path]
) -> None:
    file = open_file(str(write(tmp_path / "f", CONTENT)), ROOT)
    buffer = aligned_buffer(40_960)
    try:
        file.read_into(offset, [buffer[:4096], buffer[4096:8192], buffer[8192:]])
    finally:
        file.close()
    assert bytes(buffer) == CONTENT[offset : offset + 40_960]


def test_reading_into_memory_that_is_not_aligned_is_right(tmp_path: Path) -> None:
    file = open_file(str(write_cold(tmp_path / "f", CONTENT)), ROOT)
    buffer = aligned_buffer(40_961)
    try:
        file.read_into(4096, [buffer[1:]])
    finally:
        file.close()
    assert bytes(buffer[1:]) == CONTENT[4096 : 4096 + 40_960]


def test_what_lies_beyond_the_end_of_the_file_is_left_alone(directory: Path) -> None:
    file = open_file(str(write_warm(directory / "f", CONTENT[:5000])), ROOT)
    buffer = aligned_buffer(8192)
    buffer[:] = b"\xaa" * 8192
    try:
        file.read_into(0, [buffer])
    finally:
        file.close()
    assert bytes(buffer) == CONTENT[:5000] + b"\xaa" * 3192


def cached_pages(path: Path) -> int:
    """How many of the file's pages are in the page cache. Reading to find out would change it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    pages = (ctypes.c_ubyte * (-(-size // 4096)))()
    assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages) == 0
    libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return sum(page & 1 for page in pages)


def test_reading_a_cold_file_leaves_the_page_cache_alone(tmp_path: Path) -> None:
    path = write_cold(tmp_path / "f", CONTENT[:MIB])
    if cached_pages(path):
        pytest.skip("this file system does not drop pages from the cache")
    file = open_file(str(path), ROOT)
    try:
        if file._direct_fd is None:
            pytest.skip("this file system has no direct I/O")
        if linux.page_is_cached(file._fd, 0) is None:
            pytest.skip("this kernel does not say what is cached (cachestat)")
        for start in range(0, MIB, 128 << 10):
            assert read(file, start, start + (128 << 10)) == CONTENT[start : start + (128 << 10)]
    finally:
        file.close()
    assert cached_pages(path) == 0


def test_the_status_of_a_file_is_asked_of_its_server(tmp_path: Path) -> None:
    """What a network file system makes of that only such a one could show; here it is what fstat says."""
    path = write_cold(tmp_path / "f", CONTENT)
    fd = os.open(path, os.O_RDONLY)
    try:
        said, known = statx.file_status(fd), os.fstat(fd)
        assert (said.mode, said.links, said.uid, said.gid) == (
            known.st_mode,
            known.st_nlink,
            known.st_uid,
            known.st_gid,
        )
        assert os.makedev(*said.device) == known.st_dev
        assert (said.inode, said.size_bytes) == (known.st_ino, known.st_size)
        assert (said.mtime_ns, said.ctime_ns) == (known.st_mtime_ns, known.st_ctime_ns)
        assert said.mount.id
        path.write_bytes(b"shorter")
        assert statx.file_status(fd).size_bytes == 7
    finally:
        os.close(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        statx.file_status(fd)


READ_FROM_AN_OVERLAY = """
import mmap, os, resource, subprocess, sys
from penstock.server.sources import Access
from penstock.server.sources.file.local_file import LocalFile
top, state = sys.argv[1:]
layers = f"lowerdir={top}/a,upperdir={top}/b,workdir={top}/c"
subprocess.run(["mount", "-t", "overlay", "penstock", "-o", layers, f"{top}/d"], check=True)
path = f"{top}/d/f"
fd = os.open(path, os.O_RDONLY)
if state == "warm":
    os.read(fd, 1 << 30)
else:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
before = resource.getrusage(resource.RUSAGE_SELF).ru_inblock
file = LocalFile(path, fd)
buffer = memoryview(mmap.mmap(-1, file.size_bytes))
file.read_into(0, [buffer])
print(resource.getrusage(resource.RUSAGE_SELF).ru_inblock - before)
sys.stdout.flush()
sys.stdout.buffer.write(buffer)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount")
@pytest.mark.parametrize("state", ["cold", "warm"])
def test_an_overlay_is_read_right_and_from_the_page_cache_if_it_is_there(tmp_path: Path, state: str) -> None:
    for name in "abcd":
        (tmp_path / name).mkdir()
    write_cold(tmp_path / "a" / "f", CONTENT)
    child = ["unshare", "--mount", sys.executable, "-c", READ_FROM_AN_OVERLAY, str(tmp_path), state]
    done = subprocess.run(child, capture_output=True, timeout=60, check=False)
    if b"mount" in done.stderr:
        pytest.skip(f"no overlay can be mounted here: {done.stderr.decode()}")
    blocks, _, content = done.stdout.partition(b"\n")
    assert content == CONTENT
    assert (int(blocks) > 0) == (state == "cold")


READ_AS_ANOTHER_USER = """
import mmap, os, sys
from penstock.server.sources import Access
from penstock.server.sources.file.local_file import LocalFile
os.setresuid(65534, 65534, 65534)
file = LocalFile(sys.argv[2], int(sys.argv[1]))
buffer = memoryview(mmap.mmap(-1, file.size_bytes))
file.read_into(0, [buffer])
sys.stdout.buffer.write(buffer)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize("write", [write_cold, write_warm])
def test_a_file_of_another_user_is_read_right(tmp_path: Path, write: Callable[[Path, bytes], Path]) -> None:
    """Of whose pages the kernel does not say whether they are cached."""
    path = write(tmp_path / "f", CONTENT)
    path.chmod(0o644)
    fd = os.open(path, os.O_RDONLY)
    try:
        child = [sys.executable, "-c", READ_AS_ANOTHER_USER, str(fd), str(path)]
        done = subprocess.run(child, pass_fds=[fd], stdout=subprocess.PIPE, timeout=60)
    finally:
        os.close(fd)
    assert done.returncode == 0
    assert done.stdout == CONTENT


@pytest.mark.parametrize("left", [0, 1, 4096, 5000, 9999])
def test_a_file_that_is_cut_short_while_it_is_read_has_changed(directory: Path, left: int) -> None:
    path = write_cold(directory / "f", CONTENT[:10_000])
    file = open_file(str(path), ROOT)
    try:
        os.truncate(path, left)
        with pytest.raises(CheckpointChangedError, match=re.escape(str(path))):
            read(file, 0, 10_000)
    finally:
        file.close()


def test_a_file_that_grows_has_changed(directory: Path) -> None:
    path = write_warm(directory / "f", CONTENT[:5000])
    file = open_file(str(path), ROOT)
    try:
        with open(path, "ab") as other:
            other.write(b"more")
        assert read(file, 0, 5000) == CONTENT[:5000]
        with pytest.raises(CheckpointChangedError):
            file.check_unchanged()
    finally:
        file.close()


def test_a_file_that_is_written_to_has_changed(directory: Path) -> None:
    path = write_warm(directory / "f", CONTENT[:5000])
    os.utime(path, ns=(1, 1))
    file = open_file(str(path), ROOT)
    try:
        with open(path, "r+b") as other:
            other.write(b"X")
        with pytest.raises(CheckpointChangedError):
            file.check_unchanged()
    finally:
        file.close()


@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.chmod(0o600),
        lambda path: path.rename(path.with_name("renamed")),
        lambda path: path.unlink(),
        lambda path: os.replace(write_warm(path.with_name("new"), b"other bytes"), path),
        lambda path: os.link(path, path.with_name("linked")),
    ],
    ids=["chmod", "rename", "unlink", "replace", "link"],
)
def test_what_does_not_touch_the_bytes_does_not_disturb_a_read(
    directory: Path, change: Callable[[Path], object], context: FileContext
) -> None:
    path = write_cold(directory / "f", CONTENT)
    file = open_file(str(path), ROOT, context)
    try:
        assert read(file, 0, 100_000) == CONTENT[:100_000]
        change(path)
        assert read(file, 100_000, len(CONTENT)) == CONTENT[100_000:]
        file.check_unchanged()
    finally:
        file.close()


def through_a_mapping(path: Path) -> None:
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapping:
        mapping[100] ^= 1


def punch_a_hole(path: Path) -> None:
    subprocess.run(["fallocate", "--punch-hole", "-o", "0", "-l", "4096", path], check=True)


def write_in_place(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"X")


def cut_and_extend(path: Path) -> None:
    size = path.stat().st_size
    os.truncate(path, 1)
    os.truncate(path, size)


def copy_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(CONTENT[::-1])
    other.chmod(0o600)  # which the copy gets too
    os.utime(other, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    subprocess.run(["cp", "-p", other, path], check=True)


WRITES = [write_in_place, punch_a_hole, cut_and_extend, through_a_mapping, copy_over]


@pytest.mark.parametrize("watched", [True, False])
@pytest.mark.parametrize("write", WRITES)
def test_a_write_whose_time_is_put_back_is_a_change(
    directory: Path, write: Callable[[Path], None], watched: bool, context: FileContext
) -> None:
    path = write_warm(directory / "f", CONTENT)
    wait_for_tick(directory)
    file = open_file(str(path), ROOT, context if watched else None)
    try:
        file.check_unchanged()
        before = path.stat()
        write(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(CheckpointChangedError, match=re.escape(str(path))):
            file.check_unchanged()
        with pytest.raises(CheckpointChangedError):
            file.check_unchanged()
    finally:
        file.close()


@pytest.mark.parametrize(
    "cover",
    [lambda path: os.link(path, f"{path}-linked"), lambda path: path.chmod(0o600)],
    ids=["link", "chmod"],
)
@pytest.mark.parametrize("write", [write_in_place, punch_a_hole, cut_and_extend])
def test_a_write_is_a_change_though_a_link_or_a_chmod_would_explain_its_ctime(
    directory: Path,
    write: Callable[[Path], None],
    cover: Callable[[Path], object],
    context: FileContext,
) -> None:
    path = write_warm(directory / "f", CONTENT)
    file = open_file(str(path), ROOT, context)
    try:
        before = path.stat()
        write(path)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        cover(path)
        with pytest.raises(CheckpointChangedError, match="was written to"):
            file.check_unchanged()
    finally:
        file.close()


def test_a_reflink_onto_a_file_is_a_change(tmp_path: Path, context: FileContext) -> None:
    path, other = write_warm(tmp_path / "f", CONTENT), write_warm(tmp_path / "other", CONTENT[::-1])
    file = open_file(str(path), ROOT, context)
    try:
        before = path.stat()
        done = subprocess.run(["cp", "--reflink=always", other, path], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"this file system shares no blocks: {done.stderr}")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        with pytest.raises(CheckpointChangedError):
            file.check_unchanged()
    finally:
        file.close()


def test_a_chmod_that_nobody_watched_counts_as_a_change(directory: Path) -> None:
    """`cp -p` onto the file looks the same."""
    path = write_warm(directory / "f", CONTENT)
    wait_for_tick(directory)
    file = open_file(str(path), ROOT)
    try:
        path.chmod(0o600)
        with pytest.raises(CheckpointChangedError, match="its change time moved"):
            file.check_unchanged()
    finally:
        file.close()


@pytest.mark.parametrize("mapped", ["before", "after"])
def test_a_write_through_a_mapping_is_a_change_if_its_page_is_on_the_disk(
    tmp_path: Path, context: FileContext, mapped: str
) -> None:
    """Whenever the mapping was made. design.md names the writes of which nothing tells: to pages that wait to
    be written to the disk, and all on tmpfs."""
    path = write_warm(tmp_path / "f", CONTENT)
    with contextlib.ExitStack() as held:
        writing = held.enter_context(open(path, "r+b"))
        if mapped == "before":
            mapping = held.enter_context(mmap.mmap(writing.fileno(), 0))
            mapping[100:101] = b"W"
        os.fsync(writing.fileno())
        file = held.enter_context(contextlib.closing(open_file(str(path), ROOT, context)))
        if mapped == "after":
            mapping = held.enter_context(mmap.mmap(writing.fileno(), 0))
            assert mapping[100:101] == CONTENT[100:101]
        read(file, 0, len(CONTENT))
        file.check_unchanged()
        mapping[100:101] = b"X"
        with pytest.raises(CheckpointChangedError, match="its modification time changed"):
            file.check_unchanged()


def test_versions_differ_after_any_change_even_with_the_old_mtime(tmp_path: Path) -> None:
    path = write_warm(tmp_path / "f", b"old bytes")
    versions = set()
    for change in (
        lambda: None,
        lambda: path.write_bytes(b"new bytes"),
        lambda: path.write_bytes(b"more bytes"),
        lambda: os.replace(write_warm(tmp_path / "g", b"more bytes"), path),
    ):
        wait_for_tick(tmp_path)
        change()
        os.utime(path, ns=(1, 1))
        file = open_file(str(path), ROOT)
        versions.add(file.version)
        file.close()
    assert len(versions) == 4


def test_versions_are_equal_while_nothing_changes(tmp_path: Path) -> None:
    path = str(write_warm(tmp_path / "f", b"bytes"))
    first, second = open_file(path, ROOT), open_file(path, ROOT)
    first.close()
    second.close()
    assert first.version == second.version


def test_a_failing_disk_is_a_source_that_is_unavailable() -> None:
    """Reading /proc/self/mem at an address that is not mapped gives EIO."""
    file = LocalFile("/proc/self/mem", os.open("/proc/self/mem", os.O_RDONLY))
    file.size_bytes = 8192
    try:
        with pytest.raises(SourceUnavailableError, match=r"/proc/self/mem: reading at byte 0 failed"):
            file.read_into(0, [aligned_buffer(8192)])
    finally:
        file.close()


@pytest.mark.parametrize("how", ["with its name", "without a name"])
def test_a_file_without_a_name_is_closed_on_a_thread_for_that(how: str) -> None:
    """That frees the file's blocks, for as long as it takes. With a name it is closed at once, so that its
    mount can be unmounted."""
    later: list[tuple[str, int, Sequence[int]]] = []
    mounts = MountTable()
    context = FileContext(mounts, close=lambda mount, uid, fds: later.append((mount, uid, fds)))
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        path = write_warm(Path(directory) / "f", b"bytes")
        file = open_file(str(path), Access(uid=1000, privileged=True, prefixes=()), context)
        if how == "without a name":
            path.unlink()
        file.close()
        file.close()
    mounts.close()
    for mount, uid, fds in later:
        assert mount == file.mount_point
        assert uid == 1000
        for fd in fds:
            os.close(fd)
    assert len(later) == (how == "without a name")


def test_closing_twice_is_closing_once(tmp_path: Path) -> None:
    file = open_file(str(write_warm(tmp_path / "f", b"bytes")), ROOT)
    file.close()
    file.close()
    with pytest.raises(SourceUnavailableError):
        file.read_into(0, [aligned_buffer(5)])
