"""Reading headers through a `RangeReader`: few reads, the same answer inline and in a child, bounded cost."""

import contextlib
import functools
import itertools
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from penstock.server.checkpoint.headers import child
from penstock.server.checkpoint.headers.budget import Charge
from penstock.server.checkpoint.headers.decode import parse_header
from penstock.server.checkpoint.headers.keep import Keep, Kept, Parsed
from penstock.server.checkpoint.headers.parsers import CHILDREN, Parsers
from penstock.server.checkpoint.headers.reading import (
    INLINE_BYTES,
    INLINE_ODD_BYTES,
    SMALL_FIRST_BYTES,
    SPECULATIVE_BYTES,
    RangeReader,
    Reading,
)
from penstock.server.checkpoint.headers.reading import read_header as read_header_for
from penstock.server.checkpoint.headers.rules import InvalidHeaderError
from penstock.server.checkpoint.headers.spool import SPOOL_BYTES
from penstock.server.checkpoint.headers.table import Header
from penstock.server.errors import CheckpointInvalidError, PenstockError

from ...support import header_json, more_fds, open_fds

_T = TypeVar("_T")

ANNE, BERT = 1001, 1002
KEEP = Keep(1 << 30, 0)
VERSIONS = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def parsers() -> Iterator[Parsers]:
    global PARSERS
    PARSERS = Parsers()
    yield PARSERS
    PARSERS.shutdown()


PARSERS: Parsers


def reading_for(uid: int, keep: Keep = KEEP, version: str = "") -> Reading:
    return Reading(uid, version or str(next(VERSIONS)), keep, PARSERS)


def read_header(file: RangeReader, uid: int = 0) -> Header:
    return read_header_for(file, reading_for(uid)).header


class MemoryFile:
    """A RangeReader over a header followed by zeros; notes what was read, and calls `on_read` before each."""

    def __init__(
        self, header: bytes, data_bytes: int = 0, on_read: Callable[[int], None] = lambda offset: None
    ) -> None:
        self._held = struct.pack("<Q", len(header)) + header
        self.size_bytes = len(self._held) + data_bytes
        self.reads: list[tuple[int, int]] = []
        self._on_read = on_read

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        self.reads.append((offset, sum(map(len, views))))
        assert offset + self.reads[-1][1] <= self.size_bytes
        self._on_read(offset)
        for view in views:
            view[:] = self._held[offset : offset + len(view)].ljust(len(view), b"\0")
            offset += len(view)


def header_of(header_bytes: int, **more: object) -> bytes:
    """A valid header of about so many bytes, each of its tensors one byte long."""
    entries: dict[str, object] = dict(more)
    for i in range(header_bytes // 100):
        entries[f"layers.{i:030d}.weight"] = {"dtype": "U8", "shape": [1, 1], "data_offsets": [i, i + 1]}
    return json.dumps(entries).encode()


def file_of(header_bytes: int, **more: object) -> MemoryFile:
    return MemoryFile(header_of(header_bytes, **more), header_bytes // 100)


def rows(header: Header) -> list[tuple[str, str, tuple[int, ...], int, int]]:
    t = header.tensors
    return [(t.name(i), t.dtype(i), t.shape(i), t.start(i), t.end(i)) for i in range(len(t))]


def children() -> set[int]:
    """The living child processes of this one."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.add(int(stat.parent.name))
    return found


def new_children(before: set[int]) -> set[int]:
    """Those that were not there before. That some are gone means nothing: earlier tests of this process left
    them."""
    return children() - before


def test_a_small_header_takes_one_read() -> None:
    file = file_of(50_000)
    assert len(read_header(file).tensors) == 500
    assert len(file.reads) == 1


def test_the_one_read_stays_within_the_file_and_within_the_bound() -> None:
    tiny = MemoryFile(b"{}")
    read_header(tiny)
    large = MemoryFile(
        b'{"a":{"dtype":"U8","shape":[1000000000000],"data_offsets":[0,1000000000000]}}', 10**12
    )
    read_header(large)
    assert (tiny.reads, large.reads) == ([(0, 10)], [(0, SPECULATIVE_BYTES)])


def test_first_reads_are_charged_to_their_user_and_short_where_there_is_no_memory() -> None:
    """As a thousand threads may be at one: some for each mount and store."""
    keep = Keep(4 * SPECULATIVE_BYTES, 0)
    large = {"dtype": "U8", "shape": [500_000], "data_offsets": [1000, 501_000]}
    file = MemoryFile(header_of(100_000, large=large), 501_000)
    before = keep.budget.charge(ANNE, keep.budget.most_bytes(ANNE) - SPECULATIVE_BYTES)
    assert len(read_header_for(file, reading_for(ANNE, keep)).header.tensors) == 1001
    assert file.reads == [(0, SPECULATIVE_BYTES)]
    before.resize(before.size_bytes + SPECULATIVE_BYTES // 2)
    file.reads.clear()
    again = read_header_for(file, reading_for(ANNE, keep)).header
    assert len(again.tensors) == 1001
    assert file.reads[0] == (0, SMALL_FIRST_BYTES)
    del again
    before.resize(0)
    assert keep.budget.used_bytes == 0


@pytest.mark.parametrize("size_bytes", range(8))
def test_a_file_too_short_is_refused(size_bytes: int) -> None:
    file = MemoryFile(b"")
    file.size_bytes = size_bytes
    with pytest.raises(InvalidHeaderError, match=f"{size_bytes} bytes"):
        read_header(file)


def test_a_length_beyond_the_file_is_refused_without_reading_on() -> None:
    file = file_of(2_000_000)
    file.size_bytes = 1_500_000
    with pytest.raises(InvalidHeaderError, match="in a file of 1500000"):
        read_header(file)
    assert len(file.reads) == 1


def test_a_middling_header_takes_a_second_read_for_the_rest() -> None:
    file = file_of(600_000)
    read_header(file)
    end = file.size_bytes - 6_000
    assert file.reads == [(0, SPECULATIVE_BYTES), (SPECULATIVE_BYTES, end - SPECULATIVE_BYTES)]


@pytest.mark.parametrize("header_bytes", [50_000, 600_000, 1_500_000, 4_000_000])
def test_reads_the_same_whatever_the_size(header_bytes: int) -> None:
    metadata = {"format": "pt", "é": '\U0001f600"\\'}
    raw = header_of(header_bytes, __metadata__=metadata)
    file = MemoryFile(raw, header_bytes // 100)
    assert (len(raw) > INLINE_BYTES) == (header_bytes > 1_000_000)
    found, expected = read_header(file), parse_header(raw, file_bytes=file.size_bytes)
    assert rows(found) == rows(expected)
    assert len(found.tensors) == header_bytes // 100
    assert found.metadata == metadata
    assert found.data_start == expected.data_start == 8 + len(raw)


def test_a_large_header_is_held_in_pieces() -> None:
    file = file_of(4_000_000)
    read_header(file)
    assert max(size for _, size in file.reads) <= 1024 * 1024
    header_end = file.size_bytes - 40_000
    assert file.reads[-1][0] + file.reads[-1][1] == header_end
    assert [offset for offset, _ in file.reads[1:]] == list(range(SPECULATIVE_BYTES, header_end, 1024 * 1024))


@pytest.mark.parametrize("header_bytes", [50_000, 600_000, 1_500_000])
def test_says_what_is_wrong_whatever_the_size(header_bytes: int) -> None:
    raw = header_of(header_bytes, bad={"dtype": "Q4", "shape": [], "data_offsets": [0, 0]})
    with pytest.raises(InvalidHeaderError, match="tensor 'bad': unknown dtype 'Q4'"):
        read_header(MemoryFile(raw, header_bytes // 100))


@pytest.mark.parametrize("failing_read", [0, 1, 2, 3])
def test_an_error_of_the_source_comes_through_and_leaves_no_child(failing_read: int) -> None:
    def on_read(offset: int) -> None:
        if len(file.reads) > failing_read:
            raise OSError("the disk is gone")

    raw = header_of(4_000_000)
    file = MemoryFile(raw, 40_000, on_read)
    before = children()
    with pytest.raises(OSError, match="the disk is gone"):
        read_header(file)
    assert len(file.reads) == failing_read + 1
    assert not new_children(before)


def test_a_large_header_leaves_no_child_and_no_descriptor() -> None:
    before, fds = children(), open_fds()
    read_header(file_of(1_500_000))
    with pytest.raises(InvalidHeaderError):
        read_header(MemoryFile(b" " * 1_500_000))
    assert not new_children(before)
    assert not more_fds(fds)


@functools.cache
def costly_header(seconds: int) -> bytes:
    entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
    # The name with an escaped quote takes the header to the odd way, which takes longer.
    return b'{"\\"":' + entry[5:] + b"," + b",".join([entry % n for n in range(150_000 * seconds)]) + b"}"


def costly(seconds: int = 3) -> MemoryFile:
    """A header that takes a child about so many seconds, and is valid."""
    return MemoryFile(costly_header(seconds))


def wait_for_child(before: set[int]) -> int:
    """The pid of the one child that was not there before."""
    (pid,) = until(lambda: new_children(before))
    return pid


def is_gone(pid: int) -> bool:
    return pid not in children()


def until(condition: Callable[[], _T]) -> _T:
    """The first true value of `condition`."""
    deadline = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return value


def end_children(readings: Sequence[Future[Header]], before: set[int]) -> None:
    """Until all are read, though none as it should be. There never are more than `CHILDREN`."""

    def ended() -> bool:
        living = new_children(before)
        assert len(living) <= CHILDREN
        for pid in living:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return all(reading.done() for reading in readings)

    until(ended)


def test_a_child_that_dies_makes_the_header_too_costly() -> None:
    file, before = costly(), children()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_header, file)
        os.kill(wait_for_child(before), signal.SIGKILL)
        with pytest.raises(InvalidHeaderError, match=r"too costly to read: \d+ bytes did not parse within"):
            reading.result(60)
    assert not new_children(before)
    assert PARSERS.spools.used_bytes == 0


def test_a_child_that_is_stopped_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """However late: the limit of CPU time does not end it."""
    monkeypatch.setattr(child, "PATIENCE_FACTOR", 0)
    before = children()
    with pytest.raises(InvalidHeaderError, match="too costly to read"):
        read_header(costly(1))
    assert not new_children(before)


def test_one_user_has_one_child_at_a_time_and_all_users_have_a_few() -> None:
    file, before = costly(), children()
    with ThreadPoolExecutor(9) as pool:
        mine = [pool.submit(read_header, file, ANNE) for _ in range(3)]
        for _ in mine:
            pid = wait_for_child(before)
            assert len(new_children(before)) == 1
            os.kill(pid, signal.SIGKILL)
            until(functools.partial(is_gone, pid))
        others = [pool.submit(read_header, file, uid) for uid in (0, 0, 0, ANNE, BERT, 1003)]
        end_children(others, before)
    assert all(isinstance(reading.exception(), InvalidHeaderError) for reading in mine + others)


def test_a_user_s_costly_headers_do_not_delay_another_s() -> None:
    large, before = file_of(1_500_000), children()
    with ThreadPoolExecutor(8) as pool:
        first = [pool.submit(read_header, costly(), ANNE) for _ in range(6)]
        wait_for_child(before)
        found = read_header(large, BERT)
        waiting = sum(not reading.done() for reading in first)
        end_children(first, before)
    assert len(found.tensors) == 15_000
    assert waiting >= 5


def hanging(header: bytes, go_on: threading.Event, reached: threading.Semaphore) -> MemoryFile:
    """A file that gives its first 300,000 bytes, and then nothing until `go_on`."""

    def on_read(offset: int) -> None:
        if offset > 300_000:
            reached.release()
            assert go_on.wait(60)

    return MemoryFile(header, 40_000, on_read)


def test_headers_whose_bytes_do_not_come_hold_no_child() -> None:
    raw, go_on, reached, before = header_of(4_000_000), threading.Event(), threading.Semaphore(0), children()
    with ThreadPoolExecutor(6) as pool:
        stuck = [pool.submit(read_header, hanging(raw, go_on, reached), ANNE) for _ in range(6)]
        for _ in stuck:
            assert reached.acquire(timeout=60)
        assert not new_children(before)
        for uid in (ANNE, BERT, 0):
            assert len(read_header(file_of(1_500_000), uid).tensors) == 15_000
        assert not any(reading.done() for reading in stuck)
        go_on.set()
        assert [len(reading.result(60).tensors) for reading in stuck] == [40_000] * 6


def test_spools_are_bounded_in_bytes_and_a_user_who_fills_them_delays_another_by_one_header() -> None:
    """Anne's headers of 90 MB fill what she may have; Bert's of 50 MB is next, though she came first."""
    go_on, reached = threading.Event(), threading.Semaphore(0)
    order: list[int] = []
    lock = threading.Lock()

    class Large:
        def __init__(self, uid: int, header_bytes: int) -> None:
            self.uid, self.header_bytes, self.size_bytes = uid, header_bytes, 8 + header_bytes

        def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
            if offset == 0:
                views[0][:8] = struct.pack("<Q", self.header_bytes)
                return
            if offset < 2 * SPECULATIVE_BYTES:
                with lock:
                    order.append(self.uid)
                assert PARSERS.spools.used_bytes <= SPOOL_BYTES
                reached.release()
                assert go_on.wait(60)
            raise OSError("that is all")

    def read(uid: int, header_bytes: int) -> BaseException | None:
        with pytest.raises(OSError, match="that is all"):
            read_header(Large(uid, header_bytes), uid)
        return None

    with ThreadPoolExecutor(6) as pool:
        readings: list[Future[BaseException | None]] = [pool.submit(read, ANNE, 90_000_000)]
        assert reached.acquire(timeout=60)
        readings += [pool.submit(read, ANNE, 90_000_000) for _ in range(3)]
        until(lambda: len(PARSERS.spools._waiting) == 3)
        readings.append(pool.submit(read, BERT, 50_000_000))
        until(lambda: len(PARSERS.spools._waiting) == 4)
        go_on.set()
        for reading in readings:
            reading.result(60)
    assert order[:2] == [ANNE, BERT]
    assert PARSERS.spools.used_bytes == 0


class WatchedKeep(Keep):
    """Notes on which threads it is asked."""

    def __init__(self) -> None:
        super().__init__(1 << 30, 0)
        self.asked: list[str] = []
        self.added = 0

    def find(self, uid: int, version: str) -> Kept | None:
        self.asked.append(threading.current_thread().name.rpartition("-")[0])
        return super().find(uid, version)

    def add(self, uid: int, version: str, parsed: Parsed, charge: Charge) -> Kept:
        self.added += 1
        return super().add(uid, version, parsed, charge)


def test_no_interpreter_is_an_error_that_says_how_to_start_penstockd(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = header_json([1] * 40_000)
    assert len(raw) > INLINE_BYTES
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", "")
        with pytest.raises(PenstockError, match="start it with the command penstockd"):
            read_header(MemoryFile(raw, 40_000))
    assert len(read_header(MemoryFile(raw, 40_000)).tensors) == 40_000


def test_an_odd_header_of_some_size_is_judged_in_a_child() -> None:
    keep, before = WatchedKeep(), children()

    def read(tensors: int) -> Header:
        entry = b'"%d":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
        raw = b'{"\\"":' + entry[5:] + b"," + b",".join([entry % n for n in range(tensors)]) + b"}"
        assert len(raw) < INLINE_BYTES
        assert (len(raw) > INLINE_ODD_BYTES) == (tensors > 1000)
        return read_header_for(MemoryFile(raw), reading_for(0, keep)).header

    assert len(read(100).tensors) == 101
    assert keep.asked == ["parser"]
    assert len(read(10_000).tensors) == 10_001
    assert keep.asked == ["parser", "parser", "parser-child"]
    assert not new_children(before)


@pytest.mark.parametrize("size_bytes", [50_000, 1_500_000])
def test_a_version_that_many_read_at_once_is_parsed_and_charged_once(size_bytes: int) -> None:
    keep = WatchedKeep()
    together = threading.Barrier(4)
    raw = header_of(size_bytes)

    def meet(_: int) -> None:
        together.wait(60)

    def read(_: int) -> Kept:
        file = MemoryFile(raw, size_bytes // 100, meet)
        return read_header_for(file, reading_for(ANNE, keep, "one"))

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(read, range(4)))
    assert all(one is found[0] for one in found)
    assert keep.added == 1
    assert keep.budget.used_bytes == found[0].header.size_bytes
    found.clear()
    assert keep.budget.used_bytes == 0


def test_what_comes_back_from_a_child_must_fit_the_budget() -> None:
    keep = Keep(300_000, 0)
    with pytest.raises(CheckpointInvalidError, match=r"than the 300\.0 kB that one user may have"):
        read_header_for(file_of(1_500_000), reading_for(0, keep))
    assert keep.budget.used_bytes == 0


@pytest.mark.parametrize("size_bytes", [50_000, 600_000, 1_500_000])
def test_a_header_that_is_refused_leaves_no_charge(size_bytes: int) -> None:
    keep = Keep(1 << 30, 0)
    raw = header_of(size_bytes, bad={"dtype": "Q4", "shape": [], "data_offsets": [0, 0]})
    with pytest.raises(InvalidHeaderError) as caught:
        read_header_for(MemoryFile(raw, size_bytes // 100), reading_for(0, keep))
    assert caught.traceback  # which would hold the charge
    assert keep.budget.used_bytes == 0


def script(body: str, *arguments: object) -> "subprocess.Popen[str]":
    """A Python process that imports what this one can, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_child_looks_first_where_the_daemon_is_installed() -> None:
    assert (Path(child.import_paths()[0]) / "penstock/server/checkpoint/headers").is_dir()


PRELUDE = """
import os, re, struct, sys
from penstock.server.checkpoint.headers.rules import InvalidHeaderError
from penstock.server.checkpoint.headers.keep import Keep
from penstock.server.checkpoint.headers.reading import Reading
from penstock.server.checkpoint.headers.reading import read_header as read_header_for
from penstock.server.checkpoint.headers.parsers import Parsers

parsers, keep = Parsers(), Keep(cached_bytes=0)

def read_header(file):
    return read_header_for(file, Reading(0, "version", keep, parsers)).header

def status(field):
    return int(re.search(field + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

class Repeated:
    '''A file whose header is a start, a filler so many times, and an end; its data is zeros.'''
    def __init__(self, start, filler, times, end, data_bytes=0):
        header_bytes = len(start) + len(filler) * times + len(end)
        self.start, self.filler, self.end = struct.pack("<Q", header_bytes) + start, filler, end
        self.end_at, self.size_bytes = 8 + header_bytes - len(end), 8 + header_bytes + data_bytes
    def read_into(self, offset, views):
        for view in views:
            size = len(view)
            repeats = self.filler * (size // len(self.filler) + 2)
            skip = (offset - len(self.start)) % len(self.filler)
            view[:] = repeats[skip : skip + size]
            if offset < len(self.start):
                part = self.start[offset : offset + size]
                view[: len(part)] = part
            if offset + size > self.end_at:
                tail = (self.end + bytes(size))[max(0, offset - self.end_at) :]
                at = max(0, self.end_at - offset)
                view[at:] = tail[: size - at]
            offset += size

def peak_growth(file):
    '''Bytes by which reading the header of file raised this process's peak, and what came of it.'''
    before = status("VmRSS")
    try:
        header = read_header(file)
    except InvalidHeaderError as error:
        header = error
    return status("VmHWM") - before, header
"""


def test_the_child_ends_after_its_parent_is_killed() -> None:
    with script(
        """
import threading, time
def tell():
    while not (found := open(f"/proc/self/task/{os.getpid()}/children").read()):
        found = [open(f"/proc/self/task/{t}/children").read() for t in os.listdir("/proc/self/task")]
        found = "".join(found)
        if found:
            break
    print(found, flush=True)
threading.Thread(target=tell, daemon=True).start()
read_header(Repeated(b'{"a":{"x":[', b"1e1,", 3_000_000, b"1]},}"))
"""
    ) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            parent.kill()
            assert select.select([pidfd], [], [], 60)[0]
        finally:
            os.close(pidfd)


@pytest.mark.parametrize(
    ("file", "outcome", "allowed_bytes"),
    [
        ('b"", b"[", 10**8, b""', "nests deeper", 8 << 20),
        ("""b'{"a":', b"[", 99_000_000, b"" """, "nests deeper", 8 << 20),
        ("""b'{"a":', b'{"a":', 19_000_000, b"" """, "nests deeper", 8 << 20),
        # Thirty million empty arrays: some GB for any JSON parser.
        ("""b'{"a":{"x":[', b"[],", 33_000_000, b"[]]}}" """, "too costly to read: 99000016 bytes", 8 << 20),
        (
            """b'{"', b"n", 50_000_000, b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1""",
            "nnn'... (50000000 characters): its name has more than 16384 bytes",
            8 << 20,
        ),
        (
            """b'{"a":{"dtype":"U8","shape":[', b"1,", 9_000_000, b'1],"data_offsets":[0,1]}}', 1""",
            "tensor 'a': it has 9000001 dimensions, more than 64",
            8 << 20,
        ),
        # Each dimension is fine by itself.
        (
            """b'{"":{"dtype":"U8","shape":[', b"99999999999,", 50, b'9],"data_offsets":[0,0]}}'""",
            "overflows",
            8 << 20,
        ),
    ],
)
def test_a_hostile_header_costs_the_caller_little_memory(file: str, outcome: str, allowed_bytes: int) -> None:
    with script(
        f"""
growth, header = peak_growth(Repeated({file}))
if isinstance(header, Exception):
    print(growth, header)
else:
    print(growth, f"read {{len(header.tensors)}}, its name has {{len(header.tensors.name(0))}} characters")
"""
    ) as process:
        growth, _, found = process.communicate()[0].partition(" ")
    assert process.returncode == 0
    assert outcome in found
    assert len(found) < 1000
    assert int(growth) < allowed_bytes


def test_a_million_tensors_cost_the_caller_their_table(tmp_path: Path) -> None:
    count = 1_000_000
    path = tmp_path / "million.safetensors"
    entry = '"model.layers.%07d.w":{"dtype":"BF16","shape":[64,16],"data_offsets":[%d,%d]}'
    header = b"{" + ",".join([entry % (i, i * 2048, i * 2048 + 2048) for i in range(count)]).encode() + b"}"
    assert 95_000_000 < len(header) < 100_000_000
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)))
        file.write(header)
        file.truncate(8 + len(header) + count * 2048)
    with script(
        """
class File:
    def __init__(self, path):
        self.fd, self.size_bytes = os.open(path, os.O_RDONLY), os.stat(path).st_size
    def read_into(self, offset, views):
        assert os.preadv(self.fd, views, offset) == sum(map(len, views))
growth, header = peak_growth(File(sys.argv[1]))
t = header.tensors
print(growth, len(t), t.name(999999), t.dtype(999999), t.shape(999999), t.end(999999) - header.data_start)
""",
        path,
    ) as process:
        growth, _, found = process.communicate()[0].partition(" ")
    assert found == f"{count} model.layers.0999999.w BF16 (64, 16) {count * 2048}\n"
    assert int(growth) < 80 << 20
