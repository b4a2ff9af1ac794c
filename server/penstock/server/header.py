"""Reading a file's safetensors header, with bounded memory and time whatever the file says.

One speculative read gets the whole header of almost every file. Then:

- up to `INLINE_BYTES` the header is parsed here, in some milliseconds;
- a larger one goes, piece by piece, to a child process of its own, which gives back packed tables. JSON
  decoders hold the GIL, and a hostile header may need a hundred times its bytes: both stay out of the
  daemon. The child lives under an address-space and a CPU limit, and is the kernel's first choice when
  memory runs out.

A child cannot outlive its purpose. Its parent kills it on every way out. If the daemon itself dies, the
child sees its standard input end early, or its output pipe close, and exits; in between it only computes,
for which RLIMIT_CPU allows 30 s. (PR_SET_PDEATHSIG would not do: it fires when the *thread* ends that
started the child, and here that is a worker.)
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Protocol

from .checkpoint import InvalidHeaderError, parse_header, parse_header_length
from .table import Header, PackedMetadata, TensorTable

SPECULATIVE_BYTES = 256 * 1024
"""What the first read asks for: the headers of all but a few files are shorter."""

INLINE_BYTES = 1024 * 1024
"""Longest header that is parsed in this process."""

CHILD_SECONDS = 30
"""CPU time a child may use, and the longest it may keep this process waiting."""

CHILD_ADDRESS_BYTES = 1280 * 1024 * 1024
"""Address space of a child. Measured for a header of 100 MB with a million tensors: 400 MB where it is plain,
1060 MB where it must be read the odd way (see checkpoint.py)."""

RESULT_BYTES = 256 * 1024 * 1024
"""Most that a child may give back. A header of 100 MB with a million tensors gives 60 MB."""

METADATA_BYTES = 1024 * 1024
"""Most `__metadata__` that is kept. A file may have 100 MB of it, which nobody needs to load tensors; the
daemon would hold it several times over while it passes it on."""

_CHUNK_BYTES = 1024 * 1024
_FRAME = struct.Struct("=cQQ")  # kind; bytes of the table and of the metadata, or of the message and 0
_TABLES, _TABLES_ALONE, _INVALID = b"T", b"A", b"E"
_BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from penstock.server.header import child_main; child_main(int(sys.argv[1]), int(sys.argv[2]))"
)

# Process-wide, since so are memory and cores. One inline parse at a time: under the GIL more would not be
# faster, only larger.
_inline = threading.Lock()
_children = threading.BoundedSemaphore(2)


class RangeReader(Protocol):
    """A file of known size, local or remote, read at offsets. Blocking."""

    @property
    def size_bytes(self) -> int:
        """The file's size."""

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        """Fills the views, one after the other, with the file's bytes from `offset` on, or raises."""


class _TooCostlyError(Exception):
    """The child died, stalled, or gave back too much."""


def read_header(file: RangeReader) -> Header:
    """Reads and parses the header of `file`. Blocks: call it on a worker thread.

    Raises InvalidHeaderError, also for a header too costly to read, and whatever `file.read_into` raises.
    """
    file_bytes = file.size_bytes
    first = bytearray(min(file_bytes, SPECULATIVE_BYTES))
    if first:
        file.read_into(0, [memoryview(first)])
    header_bytes = parse_header_length(bytes(first[:8]), file_bytes=file_bytes)
    if header_bytes > INLINE_BYTES:
        with _children:
            return _parse_in_child(file, memoryview(first)[8:], header_bytes, file_bytes)
    raw = first[8 : 8 + header_bytes]
    if len(raw) < header_bytes:
        held = len(raw)
        raw.extend(bytes(header_bytes - held))
        with memoryview(raw) as view:
            file.read_into(8 + held, [view[held:]])
    with _inline:
        return parse_header(raw, file_bytes=file_bytes)


def _parse_in_child(file: RangeReader, first: memoryview, header_bytes: int, file_bytes: int) -> Header:
    """`parse_header` in a child, fed with `first` and then with the rest of the header from `file`."""
    # The child gets the path this process imports from: -I and -S alone would miss editable installs and
    # PYTHONPATH, and -S saves it the work of site-packages' .pth files.
    paths = [str(Path(__file__).absolute().parents[2]), *filter(None, sys.path)]
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOOT, str(header_bytes), str(file_bytes), *paths],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=0,
        close_fds=True,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        with child.stdin as stdin:
            for chunk in _chunks(file, first, header_bytes):
                _write(stdin.fileno(), chunk)
        return _read_result(child.stdout.fileno(), header_bytes)
    except (_TooCostlyError, BrokenPipeError):
        raise InvalidHeaderError(
            f"the header is too costly to read: {header_bytes} bytes did not parse within "
            f"{CHILD_ADDRESS_BYTES} bytes of memory and {CHILD_SECONDS} seconds"
        ) from None
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def _chunks(file: RangeReader, first: memoryview, header_bytes: int) -> Iterator[memoryview]:
    """The header in pieces of at most `_CHUNK_BYTES`, of which only one is ever held."""
    yield first
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    for at in range(len(first), header_bytes, _CHUNK_BYTES):
        chunk = buffer[: min(_CHUNK_BYTES, header_bytes - at)]
        file.read_into(8 + at, [chunk])
        yield chunk


def _write(fd: int, data: memoryview) -> None:
    """Writes all of `data` to the child; BrokenPipeError if it is gone, _TooCostlyError if it stalls."""
    os.set_blocking(fd, False)
    deadline = time.monotonic() + CHILD_SECONDS
    while data:
        _wait(fd, select.POLLOUT, deadline)
        data = data[os.write(fd, data) :]


def _read_result(fd: int, header_bytes: int) -> Header:
    """What the child sends: a Header, or InvalidHeaderError with its message."""
    deadline = time.monotonic() + CHILD_SECONDS
    kind, first_bytes, second_bytes = _FRAME.unpack(_read(fd, _FRAME.size, deadline))
    if first_bytes + second_bytes > RESULT_BYTES:
        raise _TooCostlyError
    first = _read(fd, first_bytes, deadline)
    if kind == _INVALID:
        raise InvalidHeaderError(str(first, "utf-8", "replace"))
    metadata = PackedMetadata.from_bytes(_read(fd, second_bytes, deadline))
    return Header(
        TensorTable.from_bytes(first), metadata, 8 + header_bytes, metadata_omitted=kind == _TABLES_ALONE
    )


def _read(fd: int, count: int, deadline: float) -> bytearray:
    buffer = bytearray(count)
    with memoryview(buffer) as view:
        at = 0
        while at < count:
            _wait(fd, select.POLLIN, deadline)
            got = os.readv(fd, [view[at:]])
            if not got:
                raise _TooCostlyError
            at += got
    return buffer


def _wait(fd: int, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
        raise _TooCostlyError


def child_main(header_bytes: int, file_bytes: int) -> None:
    """The child: reads a header from standard input, writes a frame to standard output, exits.

    Exits with nothing written where memory or time runs out, or where its parent is gone.
    """
    _limit_self()
    gc.disable()  # nothing here is cyclic, and walking millions of new objects would triple the time
    try:
        raw = bytearray(header_bytes)
        with open(0, "rb", buffering=0) as stdin, memoryview(raw) as view:
            at = 0
            while at < header_bytes:
                got = stdin.readinto(view[at:])
                if not got:
                    sys.exit(1)
                at += got
        try:
            header = parse_header(raw, file_bytes=file_bytes)
        except InvalidHeaderError as error:
            message = str(error).encode("utf-8", "replace")
            parts: tuple[bytes | memoryview, ...] = (_FRAME.pack(_INVALID, len(message), 0), message)
        else:
            assert isinstance(header.metadata, PackedMetadata)
            table, metadata = header.tensors.to_bytes(), header.metadata.to_bytes()
            kind = _TABLES
            if len(metadata) > METADATA_BYTES:
                kind, metadata = _TABLES_ALONE, PackedMetadata.pack({}).to_bytes()
            parts = (_FRAME.pack(kind, len(table), len(metadata)), table, metadata)
        with open(1, "wb", buffering=0) as stdout:
            for part in parts:
                _write_out(stdout, part)
    except (MemoryError, BrokenPipeError):
        # Not an orderly exit: with no memory left it could fail, and say so on the daemon's standard error.
        os._exit(1)


def _write_out(stdout: BinaryIO, part: bytes | memoryview) -> None:
    view = memoryview(part)
    while view:
        view = view[stdout.write(view) :]


def _limit_self() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then ends the child
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
    except OSError:
        pass  # no /proc, or not ours to write: the limits below still hold
    for limit, value in (
        (resource.RLIMIT_AS, CHILD_ADDRESS_BYTES),
        (resource.RLIMIT_CPU, CHILD_SECONDS),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(limit, (value, value))
