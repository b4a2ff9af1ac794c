"""Compares the tier with the disk that it is on, and a restart of the daemon with the bytes in the store, on
the disk, and in memory. Measures what the tier costs a first load.

    python -m benchmarks.tier [--size 1GB] [--rounds N] [--directory DIR] [--disk-limit 1GB]

Each round has these steps. A daemon without a tier stages a checkpoint from nginx on the loopback. A daemon
with an empty tier does the same, and writes it to the disk. It is restarted, and stages the checkpoint from
the disk twice: at first, and after it evicted it from memory. After each time, as many threads as the tier
has read the same files with O_DIRECT. In the end the daemon stages the checkpoint that it has in memory. CPU
is the daemon's, for raw reads the benchmark's. Name a directory on the disk that is to be measured with
`--directory`.

A disk is not always equally fast. That of a virtual machine may also be twice as fast into some memory as
into other, so look at the single rounds. With `--disk-limit` it reads so many bytes a second and no more, and
comparisons are exact. That needs root.
"""

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import disk_limit, make_checkpoint, objects
from benchmarks.daemons import Daemon, wait_until
from penstock.server.tier.threads import READ_BYTES, READERS

NO_TIER = "from the store, no tier"
EMPTY_TIER = "from the store, an empty tier"
AFTER_A_RESTART = "from the tier, after a restart"
AGAIN = "from the tier, again"
RAW = "raw O_DIRECT"
_WARM_UP_BYTES = 50_000_000


@dataclass
class Results:
    """Seconds and the daemon's CPU seconds of each round, by step."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    cpu_seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, what: str, seconds: float, cpu_seconds: float) -> None:
        self.seconds.setdefault(what, []).append(seconds)
        self.cpu_seconds.setdefault(what, []).append(cpu_seconds)
        print(f"  {what}: {seconds:.3f} s, CPU {cpu_seconds:.2f} s", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--size", type=make_checkpoint.parse_size, default=1_000_000_000, help="bytes of the checkpoint"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--directory", type=Path, default=Path(tempfile.gettempdir()), help="where the tier is written"
    )
    parser.add_argument(
        "--disk-limit",
        type=make_checkpoint.parse_size,
        metavar="SIZE",
        help="bytes that the disk reads a second",
    )
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        if options.disk_limit:
            try:
                stack.enter_context(disk_limit.reads_limited_to(options.disk_limit, options.directory))
            except disk_limit.DiskLimitError as error:
                parser.error(f"--disk-limit: {error}")
        results = compare(options.size, options.rounds, options.directory)
    print("\n".join(lines(results, options.size)))


def compare(
    size_bytes: int, rounds: int, directory: Path, *, goes_on: Callable[[], bool] = lambda: True
) -> Results:
    """At most so many rounds. `goes_on` is asked before each round but the first."""
    path = make_checkpoint.llama_checkpoint(size_bytes)
    small = make_checkpoint.llama_checkpoint(_WARM_UP_BYTES)
    results = Results()
    top = Path(tempfile.mkdtemp(prefix="penstock-tier-", dir=directory))
    try:
        with objects.Near() as server:
            for number in range(rounds):
                if number and not goes_on():
                    break
                print(f"round {number + 1}", file=sys.stderr)
                _round(server, server.uri(path), server.uri(small), size_bytes, top / str(number), results)
                shutil.rmtree(top / str(number))
    finally:
        shutil.rmtree(top)
    return results


def _round(
    server: objects.ObjectServer, uri: str, small: str, size_bytes: int, directory: Path, results: Results
) -> None:
    limit = ("--memory-limit", str(size_bytes * 5 // 4 + (64 << 20)))
    tier = ("--tier-dir", str(directory), "--tier-limit", str(4 * size_bytes))

    def stage(daemon: Daemon, what: str) -> None:
        cpu = daemon.cpu_seconds()
        seconds = daemon.prefetch(uri)
        results.add(what, seconds, daemon.cpu_seconds() - cpu)

    def read_raw(when: str) -> None:
        begin, own = time.perf_counter(), time.process_time()
        _read_raw(directory)
        results.add(f"{RAW}, {when}", time.perf_counter() - begin, time.process_time() - own)

    with Daemon(*limit, environment=server.environment()) as daemon:
        _warm_up(daemon, small)
        stage(daemon, NO_TIER)
    with Daemon(*limit, *tier, environment=server.environment()) as daemon:
        _warm_up(daemon, small)
        stage(daemon, EMPTY_TIER)
        begin, cpu = time.perf_counter(), daemon.cpu_seconds()
        wait_until(lambda: daemon.status()["tier"]["written_bytes"] >= size_bytes, "the tier to be written")
        results.add("written after that", time.perf_counter() - begin, daemon.cpu_seconds() - cpu)
    with Daemon(*limit, *tier, environment=server.environment()) as daemon:
        _warm_up(daemon, small)
        stage(daemon, AFTER_A_RESTART)
        read_raw("first")
        daemon.evict()
        stage(daemon, AGAIN)
        read_raw("second")
        stage(daemon, "from memory")


def _warm_up(daemon: Daemon, small: str) -> None:
    """Has the daemon make its buffer and load a small checkpoint: it imports boto3 at its first load."""
    daemon.wait_until_populated()
    daemon.prefetch(small)
    daemon.evict()
    # Otherwise the first load would find the tier's writers busy.
    wait_until(
        lambda: "tier" not in daemon.status() or daemon.status()["staging"]["warm_bytes"] == 0,
        "the small checkpoint to be gone",
    )


def _read_raw(directory: Path) -> None:
    """Reads all blocks that the tier keeps. Each thread has its own populated buffer."""
    own = threading.local()

    def read(part: tuple[int, int]) -> None:
        if not hasattr(own, "buffer"):
            own.buffer = memoryview(mmap(-1, READ_BYTES))
        os.preadv(part[0], [own.buffer], part[1])

    files = [os.open(file, os.O_RDONLY | os.O_DIRECT) for file in directory.glob("*.blocks")]
    try:
        parts = [(fd, at) for fd in files for at in range(0, os.fstat(fd).st_size, READ_BYTES)]
        with ThreadPoolExecutor(READERS) as threads:
            list(threads.map(read, parts))
    finally:
        for fd in files:
            os.close(fd)


def lines(results: Results, size_bytes: int) -> list[str]:
    """A table of the steps, and comparisons within rounds."""
    gigabytes = size_bytes / 1e9
    shown = ["| what | GB/s (median) | seconds of each round | CPU s a GB |", "|---|---|---|---|"]
    for what, seconds in results.seconds.items():
        rounds = ", ".join(f"{one:.2f}" for one in seconds)
        cpu = statistics.median(results.cpu_seconds[what]) / gigabytes
        shown.append(f"| {what} | {gigabytes / statistics.median(seconds):.2f} | {rounds} | {cpu:.2f} |")
    of = results.seconds
    first, second = (of[f"{RAW}, {when}"] for when in ("first", "second"))
    shown += [
        "",
        f"- {AFTER_A_RESTART}: speed for each of {RAW} right after it {_ratios(first, of[AFTER_A_RESTART])}",
        f"- {AGAIN}: speed for each of {RAW} right before and after it "
        f"{_ratios(_means(first, second), of[AGAIN])}",
        f"- {EMPTY_TIER}: seconds for each without {_ratios(of[EMPTY_TIER], of[NO_TIER])}",
    ]
    return shown


def _means(some: list[float], others: list[float]) -> list[float]:
    return [(one + other) / 2 for one, other in zip(some, others, strict=True)]


def _ratios(above: list[float], below: list[float]) -> str:
    """The median and the range of the rounds' quotients."""
    ratios = [one / other for one, other in zip(above, below, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


if __name__ == "__main__":
    main()
