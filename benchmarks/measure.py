"""Measures one of the `contenders` once, in a process of its own.

    python -m benchmarks.measure CONTENDER PATH... [--socket-dir DIR]

It imports torch and the loader, starts the clock, loads, touches and drops every tensor as it arrives, and
prints one JSON object (`Measurement`). Touching reads one byte of every 4 KiB of every tensor and sums them.
That faults in lazily mapped pages, and the sums of all contenders must agree. A tensor counts when it was
touched. `--hold` keeps every tensor instead of dropping it. `--untouched` does not touch tensors. With
`--barrier` several processes can start at once (`crowd.py`): each prints "ready", waits for a line on
standard input before it starts the clock, and holds the tensors until standard input ends.
"""

import argparse
import ctypes
import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import bare_http
from benchmarks.contenders import CONTENDERS, Contender, Task

if TYPE_CHECKING:
    import torch

_PAGE_BYTES = 4096
_SMALL_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Measurement:
    contender: str
    tensors: int
    size_bytes: int
    checksum: int
    first_seconds: float
    last_seconds: float
    # Of all threads of this process while the clock ran.
    cpu_seconds: float
    # The cost of counting and touching as many tensors of the same shapes, with bytes in the CPU's cache.
    touch_cpu_seconds: float
    # The highest resident set while the clock ran, less the resident set when it started.
    peak_rss_bytes: int
    # When the last tensor arrived, on the clock that all processes of a machine share.
    finished_at: float


def command(contender: str, paths: Sequence[str], *flags: str) -> list[str]:
    """The command that runs this file as a program."""
    return [sys.executable, __file__, contender, *paths, *flags]


def run(contender: str, paths: Sequence[str], *flags: str, environment: Mapping[str, str]) -> Measurement:
    """Runs this file as a program in that environment, and returns its measurement."""
    finished = subprocess.run(
        command(contender, paths, *flags),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode:
        raise RuntimeError(f"{contender} failed with exit code {finished.returncode}")
    return Measurement(**json.loads(finished.stdout.splitlines()[-1]))


def measure(
    contender: Contender,
    task: Task,
    *,
    touched: bool = True,
    held: "list[torch.Tensor] | None" = None,
    barrier: Callable[[], None] = lambda: None,
) -> Measurement:
    """Runs the contender once. `held` gets all tensors. `barrier` returns when the clock may start."""
    if contender.has_checksum:
        import torch

        torch.set_num_threads(1)
    load = contender.prepare(task)
    first_seconds = 0.0
    tally = Tally(touched=touched)

    barrier()
    _reset_peak_rss()
    rss_before = _status_bytes("VmRSS")
    cpu_before = _cpu_seconds()
    start = time.perf_counter()
    for _, tensor in load():
        tally.take(tensor)
        if held is not None:
            held.append(tensor)
        if tally.tensors == 1:
            first_seconds = time.perf_counter() - start
    # A generator that ran to its end has released everything. The clock includes that.
    last_seconds = time.perf_counter() - start
    finished_at = time.monotonic()
    cpu_seconds = _cpu_seconds() - cpu_before
    peak_rss_bytes = _status_bytes("VmHWM") - rss_before

    return Measurement(
        contender=contender.name,
        tensors=tally.tensors,
        size_bytes=tally.size_bytes or sum(map(_stored_bytes, task.paths)),
        checksum=tally.checksum,
        first_seconds=first_seconds,
        last_seconds=last_seconds,
        cpu_seconds=cpu_seconds,
        touch_cpu_seconds=_touch_cpu_seconds(tally.shapes) if tally.tensors >= 1000 else 0.0,
        peak_rss_bytes=peak_rss_bytes,
        finished_at=finished_at,
    )


class Tally:
    """Counts, and if wanted touches, every tensor."""

    def __init__(self, *, touched: bool) -> None:
        self._touched = touched
        self.tensors = self.size_bytes = self.checksum = 0
        self.shapes: dict[tuple[torch.Size, torch.dtype], int] = {}

    def take(self, tensor: "torch.Tensor") -> None:
        if self._touched:
            self.checksum += touch(tensor)
        self.tensors += 1
        self.size_bytes += tensor.nbytes
        key = (tensor.shape, tensor.dtype)
        self.shapes[key] = self.shapes.get(key, 0) + 1


def touch(tensor: "torch.Tensor") -> int:
    """The sum of one byte of every page."""
    import torch

    if tensor.nbytes <= _SMALL_BYTES and tensor.is_cpu and tensor.is_contiguous():
        begin = tensor.data_ptr()  # this costs a fifth of the calls below
        pages = range(begin, begin + tensor.nbytes, _PAGE_BYTES)
        return sum([ctypes.c_ubyte.from_address(page).value for page in pages])
    return int(tensor.reshape(-1).view(torch.uint8).numpy()[::_PAGE_BYTES].sum(dtype="u8"))


def _touch_cpu_seconds(shapes: "dict[tuple[torch.Size, torch.dtype], int]") -> float:
    import torch

    seconds = 0.0
    for (shape, dtype), count in shapes.items():
        tensor = torch.zeros(shape, dtype=dtype)
        repeats = min(count, 20_000)
        tally = Tally(touched=True)
        before = time.thread_time()
        for _ in range(repeats):
            tally.take(tensor)
        seconds += (time.thread_time() - before) * count / repeats
    return seconds


def _stored_bytes(path: str) -> int:
    return bare_http.object_bytes(path) if path.startswith("s3://") else os.path.getsize(path)


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _reset_peak_rss() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _status_bytes(name: str) -> int:
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    raise LookupError(name)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("contender", choices=sorted(CONTENDERS))
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--socket-dir")
    parser.add_argument("--raw-threads", type=int, default=16)
    parser.add_argument("--raw-block-bytes", type=int, default=8 << 20)
    parser.add_argument("--hold", action="store_true", help="keep every tensor")
    parser.add_argument("--untouched", action="store_true", help="read no byte of any tensor")
    parser.add_argument(
        "--barrier", action="store_true", help="wait for a line before the clock starts, and for end of input"
    )
    options = parser.parse_args(arguments)
    task = Task(options.paths, options.socket_dir, options.raw_threads, options.raw_block_bytes)
    held: list[torch.Tensor] = []
    measurement = measure(
        CONTENDERS[options.contender],
        task,
        touched=not options.untouched,
        held=held if options.hold else None,
        barrier=_wait_for_line if options.barrier else lambda: None,
    )
    print(json.dumps(dataclasses.asdict(measurement)), flush=True)
    if options.barrier:
        sys.stdin.read()


def _wait_for_line() -> None:
    print("ready", flush=True)
    sys.stdin.readline()


if __name__ == "__main__":
    main(sys.argv[1:])
