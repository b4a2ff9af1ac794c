"""Tells from outside how long Python processes hold their interpreter locks (GIL), without their help.

    a child that waits with the lock, or without it --> the word of its memory that differs
    another process of the same Python --> the same word there, read at random times --> a share of time

CPython has this flag in `_PyRuntime`, at a place that depends on its version. So the place is found by trial:
one word there is 1 whenever the child holds the lock, and 0 whenever it does not. Reading it neither stops
the process nor takes the lock. The kernel lets a process read its children, and root read all.

As a program, this file is a sampler (`Sampler`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

MEAN_SECONDS = 0.0005
"""Between two samples. A sample takes some 10 µs of a core."""
PRIORITY = 1
"""Of what is watched with `SCHED_FIFO`; a sampler has the next higher one."""
_RUNTIME_BYTES = 1 << 20
"""More than any version's `_PyRuntime` has."""
_TURNS = 8
_WORD_BYTES = 4
_CHILD = """
import ctypes, os, threading
reads = {b"-": ctypes.CDLL(None).read, b"+": ctypes.PyDLL(None).read}
buffer = ctypes.create_string_buffer(b"-", 1)
runtime = ctypes.addressof(ctypes.c_char.in_dll(ctypes.pythonapi, "_PyRuntime"))
def wait():
    os.write(1, b"%d\\n" % runtime)
    while True:
        os.write(1, b".")
        if not reads[buffer.raw](0, buffer, 1):
            break
threading.Thread(target=wait).start()
"""
"""Waits for a byte: without the lock at first, then as the last byte said. `PyDLL` keeps the lock. Not on the
main thread, since `_PyRuntime` has that thread's own state too, which looks the same."""


class LockNotFoundError(Exception):
    """This Python has no lock, or none that can be found."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the flag is in every process of one Python."""

    path: str
    """The program or library that has `_PyRuntime`."""
    offset: int
    """From the first byte at which that file is mapped."""


class Child:
    """A Python process that waits with its interpreter lock or without, as it is told."""

    def __init__(self) -> None:
        """Raises LockNotFoundError."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._orders, self._answers = self._process.stdin, self._process.stdout
        self.pid = self._process.pid
        line = self._answers.readline()
        if not line:
            self.close()
            raise LockNotFoundError(f"{sys.executable} has no _PyRuntime; use CPython 3.10 to 3.13")
        self.runtime = int(line)
        """The address of `_PyRuntime`."""
        self._wait_until_it_waits()

    def hold(self, held: bool) -> None:
        """Returns when it waits like that."""
        self._orders.write(b"+" if held else b"-")
        self._orders.flush()
        self._wait_until_it_waits()

    def close(self) -> None:
        self._orders.close()
        self._process.wait()
        self._answers.close()

    def _wait_until_it_waits(self) -> None:
        self._answers.read(1)  # it is about to
        tasks = Path(f"/proc/{self.pid}/task")
        while any(path.read_text().rpartition(")")[2].split()[0] != "S" for path in tasks.glob("*/stat")):
            time.sleep(0.001)


def find() -> Place:
    """Raises LockNotFoundError, and OSError if the kernel does not let this process read its children."""
    with contextlib.closing(Child()) as child:
        mappings = _mappings(child.pid)
        path = next(path for begin, end, path in mappings if begin <= child.runtime < end)
        runtime_bytes = _following_bytes(mappings, child.runtime)
        candidates = set(range(0, runtime_bytes, _WORD_BYTES))
        for turn in range(_TURNS):
            held = turn % 2
            child.hold(bool(held))
            with open(f"/proc/{child.pid}/mem", "rb", buffering=0) as memory:
                memory.seek(child.runtime)
                words = memoryview(memory.read(runtime_bytes)).cast("i")
            candidates = {at for at in candidates if words[at // _WORD_BYTES] == held}
    if len(candidates) != 1:
        raise LockNotFoundError(
            f"{len(candidates)} words of {path} look like the flag of its lock; use CPython 3.10 to 3.13 "
            "that was built with a lock"
        )
    return Place(path, child.runtime + candidates.pop() - _base(mappings, path))


class Watch:
    """Reads the flag of one process."""

    def __init__(self, pid: int, place: Place) -> None:
        """Raises OSError if the kernel does not let this process read that one."""
        self.address = _base(_mappings(pid), place.path) + place.offset
        self.fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        """What was opened once may be read by children too."""

    def is_held(self) -> bool:
        return is_held(self.fd, self.address)

    def close(self) -> None:
        os.close(self.fd)


def is_held(fd: int, address: int) -> bool:
    return any(os.pread(fd, _WORD_BYTES, address))


class Sampler:
    """Reads the flags at random times until the context ends. It is a process of its own, so that it waits
    for no other thread of this one."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches
        self.count = 0
        self.held = 0
        """In how many samples a lock was held, of each process."""

    def __enter__(self) -> Sampler:
        fds = [watch.fd for watch in self._watches]
        where = [f"{watch.fd}:{watch.address}" for watch in self._watches]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *where],
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        self._process.stdout.readline()  # it has begun
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        answer, _ = self._process.communicate()
        self.count, self.held = map(int, answer.split())

    @property
    def share(self) -> float:
        """Of the time in which a process held its lock, on average."""
        return self.held / self.count / len(self._watches)


def main(arguments: Sequence[str]) -> None:
    """The process of `Sampler`: samples until its input ends. An argument is a descriptor and an address."""
    with contextlib.suppress(PermissionError):
        # Else it would run when the watched threads wait, and see what they do then.
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(PRIORITY + 1))
    places = [(int(fd), int(address)) for fd, _, address in (each.partition(":") for each in arguments)]
    count = held = 0
    print("begun", flush=True)
    while not select.select([sys.stdin], [], [], random.expovariate(1 / MEAN_SECONDS))[0] or not count:
        count += 1
        held += sum(is_held(*place) for place in places)
    print(count, held)


_Mapping = tuple[int, int, str]
"""Begin, end and path."""


def _mappings(pid: int) -> list[_Mapping]:
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        begin, _, end = fields[0].partition("-")
        found.append((int(begin, 16), int(end, 16), fields[5] if len(fields) > 5 else ""))
    return found


def _base(mappings: Sequence[_Mapping], path: str) -> int:
    return min(begin for begin, _, mapped in mappings if mapped == path)


def _following_bytes(mappings: Sequence[_Mapping], address: int) -> int:
    """How many bytes of memory follow without a gap, at most `_RUNTIME_BYTES`."""
    reached = address
    for begin, end, _ in mappings:
        if begin <= reached < end:
            reached = end
    return min(reached - address, _RUNTIME_BYTES) // mmap.PAGESIZE * mmap.PAGESIZE


if __name__ == "__main__":
    main(sys.argv[1:])
