"""Reading headers through a `RangeReader`: few reads, the same answer inline and in a child, bounded cost."""

import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.server.checkpoint import InvalidHeaderError, parse_header
from penstock.server.header import INLINE_BYTES, SPECULATIVE_BYTES, read_header
from penstock.server.table import Header

from .support import more_fds, open_fds


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
    assert children() == before


def test_a_large_header_leaves_no_child_and_no_descriptor() -> None:
    before, fds = children(), open_fds()
    read_header(file_of(1_500_000))
    with pytest.raises(InvalidHeaderError):
        read_header(MemoryFile(b" " * 1_500_000))
    assert children() == before
    assert not more_fds(fds)


@pytest.mark.parametrize("at_read", [1, 2, 4])
def test_a_child_that_dies_makes_the_header_too_costly(at_read: int) -> None:
    before = children()

    def on_read(offset: int) -> None:
        if len(file.reads) == at_read + 1:
            (child,) = children() - before
            os.kill(child, signal.SIGKILL)

    raw = header_of(4_000_000)
    file = MemoryFile(raw, 40_000, on_read)
    with pytest.raises(InvalidHeaderError, match=f"too costly to read: {len(raw)} bytes"):
        read_header(file)
    assert len(file.reads) > at_read
    assert children() == before


def test_at_most_two_children_live_at_a_time() -> None:
    before = children()
    pair = threading.Barrier(2)
    counts: list[int] = []

    def on_read(offset: int) -> None:
        if offset == SPECULATIVE_BYTES:
            pair.wait(60)  # passes only where two headers are being fed at once
            counts.append(len(children() - before))
            pair.wait(60)

    raw = header_of(1_500_000)
    with ThreadPoolExecutor(6) as pool:
        headers = list(pool.map(lambda _: read_header(MemoryFile(raw, 15_000, on_read)), range(6)))
    assert [len(header.tensors) for header in headers] == [15_000] * 6
    assert counts == [2] * 6


def script(body: str, *arguments: object) -> "subprocess.Popen[str]":
    """A Python process that imports what this one can, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + body, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


PRELUDE = """
import os, re, struct, sys
from penstock.server.checkpoint import InvalidHeaderError
from penstock.server.header import read_header

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


def test_the_child_ends_when_its_parent_is_killed() -> None:
    with script(
        """
class Stuck(Repeated):
    def read_into(self, offset, views):
        super().read_into(offset, views)
        if offset > 1000000:
            print(open(f"/proc/self/task/{os.getpid()}/children").read(), flush=True)
            sys.stdin.read()
read_header(Stuck(b"{", b" ", 5000000, b"}"))
"""
    ) as parent:
        assert parent.stdout is not None
        pidfd = os.pidfd_open(int(parent.stdout.readline()))
        try:
            assert not select.select([pidfd], [], [], 0)[0]  # alive, and waiting for the rest
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
            """b'{"', b"n", 50_000_000, b'":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}}', 1""",
            "nnn'... (50000000 characters): offsets span 1 bytes, shape and dtype 4 bits",
            8 << 20,
        ),
        # A valid one: the table that comes back holds the name, and the test decodes it.
        (
            """b'{"', b"n", 50_000_000, b'":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1""",
            "read 1, its name has 50000000 characters",
            110 << 20,
        ),
        # Multiplied out this would make an integer of 3.7 million bits.
        (
            """b'{"":{"dtype":"U8","shape":[', b"99999999999,", 10**5, b'9],"data_offsets":[0,0]}}'""",
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
