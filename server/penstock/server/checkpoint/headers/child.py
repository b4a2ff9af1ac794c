"""Child processes that parse long or unusual headers, and may run out of memory or time without harm.

JSON decoders hold Python's interpreter lock, and hostile text may need a hundred times its size in memory. So
both happen outside the daemon. A child gets a memfd with all bytes as its standard input, so it never waits
for storage. It writes packed columns to its standard output.

A child has limits of address space and CPU time that grow with its input, and a lower CPU priority. When
memory runs out, the kernel ends it first. It cannot outlive its purpose: its parent kills it on every way
out. If the daemon itself dies, the child computes until its CPU limit at most, then finds its output closed,
and exits. (PR_SET_PDEATHSIG would not do: it fires when the *thread* that started the child ends.)
"""

from __future__ import annotations

import gc
import os
import resource
import select
import signal
import site
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ...errors import PenstockError
from .decode import parse_header
from .index import InvalidIndexError, parse_index
from .rules import InvalidHeaderError
from .table import PackedMetadata

HEADER, INDEX = "header", "index"

BASE_SECONDS = 5
SECONDS_PER_BYTE = 25 / 100_000_000
"""CPU time that a child may use. Measured for a header of 100 MB with a million tensors: 2.3 s for a plain
one, 8 s for one that must be read the odd way (see serde.py)."""

PATIENCE_FACTOR = 10
"""The time that a child may take, as a multiple of its CPU time: it may get little of the CPU."""

BASE_ADDRESS_BYTES = 128 << 20
ADDRESS_BYTES_PER_BYTE = 12
"""Address space of a child. Measured for a header of 100 MB with a million tensors: 400 MB for a plain one,
1060 MB for one that must be read the odd way; 24 MB for the interpreter."""

METADATA_BYTES = 1024 * 1024
"""Most `__metadata__` that is kept. A file may have 100 MB of it, which no load of tensors needs. The daemon
would hold several copies of it while it passes it on."""

_FRAME = struct.Struct("=cQQ")  # kind; bytes of the table and of the metadata, or of one thing and 0
_TABLES, _TABLES_ALONE, _INDEX, _INVALID = b"T", b"A", b"I", b"E"
_NICE = 5
_BOOT = (
    "import sys; sys.path[:] = sys.argv[4:]; "
    f"from {__name__} import child_main; "
    "child_main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))"
)


class TooCostlyError(Exception):
    """The child ran out of memory or time, or was killed."""


class RefusedError(Exception):
    """The child found the text invalid; the message says why."""


def limits(size_bytes: int) -> tuple[int, int]:
    """Address space in bytes and CPU time in seconds of a child that parses so many bytes."""
    return (
        BASE_ADDRESS_BYTES + ADDRESS_BYTES_PER_BYTE * size_bytes,
        BASE_SECONDS + round(SECONDS_PER_BYTE * size_bytes),
    )


def parse_in_child(
    mode: str, spool: int, size_bytes: int, file_bytes: int, reserve: Callable[[int], None]
) -> tuple[bool, list[bytearray]]:
    """Parses `size_bytes` of the memfd `spool`: a `HEADER` of a file of `file_bytes`, or an `INDEX`. Returns
    whether the result is complete, metadata included, and the packed parts. Blocks.

    `reserve` is called with the size of the result before it is read, and may raise. Raises TooCostlyError,
    RefusedError, OSError if no process can be started, and PenstockError if none ever can.
    """
    if not sys.executable:
        raise PenstockError(
            "penstockd cannot start a process to parse a header: its Python interpreter is unknown "
            "(sys.executable is empty); start it with the command penstockd"
        )
    os.lseek(spool, 0, os.SEEK_SET)
    # -I and -S alone would miss editable installs and PYTHONPATH, hence the paths; -S saves the child the
    # work of site-packages' .pth files.
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _BOOT, mode, str(size_bytes), str(file_bytes), *import_paths()],
        cwd="/",
        stdin=spool,
        stdout=subprocess.PIPE,
        bufsize=0,
        close_fds=True,
    )
    assert child.stdout is not None
    try:
        deadline = time.monotonic() + PATIENCE_FACTOR * limits(size_bytes)[1]
        return _read_result(child.stdout.fileno(), deadline, reserve)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def import_paths() -> list[str]:
    """The absolute paths from which this process imports, without its working directory.

    Files of strangers may lie in the working directory, and `python -m penstock.server` puts it on
    `sys.path`. It stays if it is a part of the installation, or if PYTHONPATH names it: the client's rule
    (`interpreter.py`).
    """
    own = str(Path(__file__).absolute().parents[__name__.count(".")])
    try:
        here = os.getcwd()
    except FileNotFoundError:  # removed meanwhile, so nothing can be imported from it
        here = ""
    named = "" if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "")
    wanted = {
        own,
        *(os.path.dirname(directory) for directory in sys.modules["penstock"].__path__),
        *site.getsitepackages(),
        site.getusersitepackages(),
        *sysconfig.get_paths().values(),
        *filter(os.path.isabs, named.split(os.pathsep)),
    }
    entries = [os.path.join(here, entry) for entry in sys.path if isinstance(entry, str) and entry]
    return [own, *(entry for entry in entries if entry in wanted or not here or not _same(entry, here))]


def _same(entry: str, directory: str) -> bool:
    try:
        return os.path.samefile(entry, directory)
    except OSError:
        return False


def _read_result(fd: int, deadline: float, reserve: Callable[[int], None]) -> tuple[bool, list[bytearray]]:
    kind, *sizes = _FRAME.unpack(_read(fd, _FRAME.size, deadline))
    reserve(sum(sizes))
    parts = [_read(fd, size, deadline) for size in sizes]
    if kind == _INVALID:
        raise RefusedError(str(parts[0], "utf-8", "replace"))
    return kind != _TABLES_ALONE, parts


def _read(fd: int, count: int, deadline: float) -> bytearray:
    buffer = bytearray(count)
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    with memoryview(buffer) as view:
        at = 0
        while at < count:
            if not poll.poll(max(0, deadline - time.monotonic()) * 1000):
                raise TooCostlyError
            got = os.readv(fd, [view[at:]])
            if not got:
                raise TooCostlyError
            at += got
    return buffer


# ---- in the child -------------------------------------------------------------------------------


def child_main(mode: str, size_bytes: int, file_bytes: int) -> None:
    """Reads a header or an index from standard input, writes a frame to standard output, and exits.

    Exits with nothing written if memory or time runs out, or if its parent is gone.
    """
    _limit_self(*limits(size_bytes))
    gc.disable()  # nothing here is cyclic, and walking millions of new objects would triple the time
    try:
        with open(1, "wb", buffering=0) as stdout:
            for part in _parsed(mode, _taken(size_bytes), file_bytes):
                _write_out(stdout, part)
    except (MemoryError, BrokenPipeError):
        # Not an orderly exit: with no memory left it could fail, and would report that on the daemon's
        # standard error.
        os._exit(1)


def _taken(size_bytes: int) -> bytearray:
    """Takes the bytes out of the spool, which is empty then: its memory counts as this process's."""
    raw = bytearray(size_bytes)
    with memoryview(raw) as view:
        at = 0
        while at < size_bytes:
            got = os.readv(0, [view[at:]])
            if not got:
                sys.exit(1)
            at += got
    os.ftruncate(0, 0)
    return raw


def _parsed(mode: str, raw: bytearray, file_bytes: int) -> tuple[bytes | memoryview, ...]:
    """The frame to write."""
    try:
        if mode == INDEX:
            packed = parse_index(raw).to_bytes()
            return _FRAME.pack(_INDEX, len(packed), 0), packed
        header = parse_header(raw, file_bytes=file_bytes)
    except (InvalidHeaderError, InvalidIndexError) as error:
        message = str(error).encode("utf-8", "replace")
        return _FRAME.pack(_INVALID, len(message), 0), message
    table, metadata = header.tensors.to_bytes(), header.metadata.to_bytes()
    kind = _TABLES
    if len(metadata) > METADATA_BYTES:
        kind, metadata = _TABLES_ALONE, PackedMetadata.pack({}).to_bytes()
    return _FRAME.pack(kind, len(table), len(metadata)), table, metadata


def _write_out(stdout: BinaryIO, part: bytes | memoryview) -> None:
    view = memoryview(part)
    while view:
        view = view[stdout.write(view) :]


def _limit_self(address_bytes: int, cpu_seconds: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the daemon, which then ends the child
    os.nice(_NICE)
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("1000")
    except OSError:
        pass  # no /proc, or not ours to write: the limits below still hold
    for limit, value in (
        (resource.RLIMIT_AS, address_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(limit)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(limit, (value, value))
