"""Measures how long the daemon holds Python's interpreter lock (GIL) while it reads objects, over HTTP and
HTTPS. Computes what the lock would let one process read on more cores.

    python -m benchmarks.gil [--size 1GB] [--rounds 5] [--threads 1 2 4 8] [--cores 16] [--realtime]

nginx on the loopback serves a checkpoint. Daemons with different numbers of reader threads stage it in turns
(`prefetch`), into memory that was written to before. Their locks are sampled from outside
(`interpreter_lock.py`). In one row two daemons, with half of the most threads each, stage it at the same
time: two processes have two locks. Last, a daemon with the most threads reads over HTTPS from a server whose
connections are slower than a core decrypts, as those of distant storage are: then threads wait for bytes much
more often. CPU is the daemons', without the server's.

A process that holds its lock for s seconds a GB reads at most 1/s GB/s, however many cores there are. These
seconds include time in which the holder waits for a core, behind other threads, the server and the rest of
the machine. With `--realtime`, for root, they do not: all processes of the benchmark get `SCHED_FIFO`, under
which a thread that runs is never stopped for another. Meanwhile the rest of the machine hardly runs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import interpreter_lock, make_checkpoint, objects, report, system
from benchmarks.daemons import Daemon
from benchmarks.interpreter_lock import Place, Sampler, Watch
from benchmarks.runner import warm_up

SLOW_RATE_BYTES = 90_000_000
"""A second, of one connection to distant storage."""
RECORD_BYTES = 16 << 10
"""The most that a record of TLS has, and that one call of OpenSSL returns."""


@dataclass(frozen=True, slots=True)
class Readers:
    """Daemons that read at the same time, with as many threads each."""

    daemons: int
    threads: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"1 daemon, {threads}" if self.daemons == 1 else f"{self.daemons} daemons, {threads} each"


@dataclass(frozen=True, slots=True)
class Staged:
    """One round of some daemons together. Each staged the whole checkpoint."""

    size_bytes: int
    seconds: float
    share: float
    """Of the seconds in which a daemon held its lock."""
    lock_seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        """GB/s."""
        return self.size_bytes / self.seconds / 1e9

    @property
    def lock_seconds_a_gb(self) -> float:
        return self.lock_seconds / self.size_bytes * 1e9

    @property
    def cpu_seconds_a_gb(self) -> float:
        return self.cpu_seconds / self.size_bytes * 1e9


Rounds = dict[Readers, list[Staged]]


def ceiling(lock_seconds_a_gb: float, cpu_seconds_a_gb: float, cores: int) -> str:
    """What bounds one process on so many cores, as the end of a sentence."""
    lock, processor = 1 / lock_seconds_a_gb, cores / cpu_seconds_a_gb
    if processor <= lock:
        return (
            f"the cores: {cores} of them read {processor:.1f} GB/s, and the lock allows {lock:.1f}. Reader "
            "processes would not help"
        )
    return (
        f"the lock, at {lock:.1f} GB/s: {cores} cores could read {processor:.1f} GB/s, and "
        f"{cpu_seconds_a_gb / lock_seconds_a_gb:.1f} of them keep one lock busy. {-(-processor // lock):.0f} "
        "processes would use them all"
    )


def measure(server: objects.ObjectServer, path: Path, all_readers: Sequence[Readers], rounds: int) -> Rounds:
    place = interpreter_lock.find()
    staged: Rounds = {readers: [] for readers in all_readers}
    with contextlib.ExitStack() as stack:
        daemons = {
            readers: [stack.enter_context(_daemon(server, path, readers)) for _ in range(readers.daemons)]
            for readers in all_readers
        }
        for number in range(rounds):
            for readers in all_readers if number % 2 else reversed(all_readers):
                staged[readers].append(_stage(daemons[readers], server.uri(path), path, place))
                print(f"  {server.scheme} {readers}: {staged[readers][-1].rate:.2f} GB/s", file=sys.stderr)
    return staged


@contextlib.contextmanager
def _daemon(server: objects.ObjectServer, path: Path, readers: Readers) -> Iterator[Daemon]:
    limit_bytes = path.stat().st_size * 26 // 25 + (64 << 20)
    flags = ("--memory-limit", str(limit_bytes), "--object-concurrency", str(readers.threads))
    with Daemon(*flags, environment=server.environment()) as daemon:
        daemon.wait_until_populated()
        warm_up(daemon, server)
        yield daemon


def _stage(daemons: Sequence[Daemon], uri: str, path: Path, place: Place) -> Staged:
    together = threading.Barrier(len(daemons))

    def stage(daemon: Daemon) -> None:
        together.wait()
        daemon.prefetch(uri)

    with contextlib.ExitStack() as stack:
        watches = [stack.enter_context(contextlib.closing(Watch(daemon.pid, place))) for daemon in daemons]
        cpu_seconds = sum(daemon.cpu_seconds() for daemon in daemons)
        with ThreadPoolExecutor(len(daemons)) as threads, Sampler(watches) as sampler:
            began = time.perf_counter()
            list(threads.map(stage, daemons))
            seconds = time.perf_counter() - began
        cpu_seconds = sum(daemon.cpu_seconds() for daemon in daemons) - cpu_seconds
    for daemon in daemons:
        daemon.evict()
    return Staged(
        size_bytes=path.stat().st_size * len(daemons),
        seconds=seconds,
        share=sampler.share,
        lock_seconds=sampler.share * seconds * len(daemons),
        cpu_seconds=cpu_seconds,
    )


def table(staged: dict[str, Rounds]) -> list[str]:
    rows = [
        [
            f"{protocol}, {readers}",
            report.spread([each.rate for each in rounds]),
            report.spread([each.share for each in rounds]),
            report.spread([each.lock_seconds_a_gb for each in rounds], 3),
            report.spread([each.cpu_seconds_a_gb for each in rounds]),
        ]
        for protocol, measured in staged.items()
        for readers, rounds in measured.items()
    ]
    head = ["", "GB/s", "share of time with the lock", "seconds of the lock a GB", "CPU s a GB"]
    return report.markdown_table(head, rows)


def conclusions(staged: dict[str, Rounds], cores: int) -> list[str]:
    """Lines: what bounds one process, by the rows with the fewest and the most threads; what a record of TLS
    costs; and what two processes change here."""
    lines = []
    for protocol, measured in staged.items():
        alone = sorted((readers for readers in measured if readers.daemons == 1), key=lambda one: one.threads)
        for readers in dict.fromkeys((alone[0], alone[-1])):
            lock, cpu = _median_lock(measured[readers]), _median_cpu(measured[readers])
            lines.append(f"- {protocol}, by the row of {readers}: the limit is {ceiling(lock, cpu, cores)}.")
        for readers, rounds in measured.items():
            if readers.daemons > 1:
                one = measured[Readers(1, readers.daemons * readers.threads)]
                factors = [each.rate / other.rate for each, other in zip(rounds, one, strict=True)]
                lines.append(
                    f"- {protocol}: {readers}, read at {report.spread(factors)} times the rate of one daemon "
                    "with all the threads."
                )
    for readers in staged["HTTPS"]:
        if readers.daemons == 1:
            more = _median_lock(staged["HTTPS"][readers]) - _median_lock(staged["HTTP"][readers])
            each = f"{more * RECORD_BYTES / 1e3:.1f} µs"
            lines.append(
                f"- {readers}: for each record of 16 KiB, HTTPS holds the lock {each} longer than HTTP."
            )
    return lines


def _median_lock(rounds: Sequence[Staged]) -> float:
    return statistics.median(each.lock_seconds_a_gb for each in rounds)


def _median_cpu(rounds: Sequence[Staged]) -> float:
    return statistics.median(each.cpu_seconds_a_gb for each in rounds)


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=make_checkpoint.parse_size, default=10**9, help="bytes of the checkpoint (1GB)"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--threads", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="of a daemon (1 2 4 8)"
    )
    parser.add_argument(
        "--cores", type=int, default=16, metavar="N", help="for which the limit is computed (16)"
    )
    parser.add_argument(
        "--realtime", action="store_true", help="no thread waits for a core while it holds the lock; as root"
    )
    options = parser.parse_args(arguments)
    if options.realtime:
        try:  # the server and the daemons inherit it
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(interpreter_lock.PRIORITY))
        except PermissionError:
            parser.error("--realtime is not permitted to this user; run it as root, or without --realtime")
    all_readers = [Readers(1, threads) for threads in sorted(set(options.threads))]
    if all_readers[-1].threads % 2 == 0:
        all_readers.append(Readers(2, all_readers[-1].threads // 2))
    path = make_checkpoint.llama_checkpoint(options.size)
    system.fill_page_cache([os.fspath(path)])
    staged = {}
    for protocol, tls in (("HTTP", False), ("HTTPS", True)):
        with objects.Near(tls=tls) as server:
            staged[protocol] = measure(server, path, all_readers, options.rounds)
    with objects.Far(delay_seconds=0, rate_bytes=SLOW_RATE_BYTES, tls=True) as far:
        most = Readers(1, max(options.threads))
        protocol = f"HTTPS at {SLOW_RATE_BYTES // 10**6} MB/s a connection"
        staged[protocol] = measure(far, path, [most], options.rounds)
    print("\n".join([*system.describe(), "", *table(staged), "", *conclusions(staged, options.cores)]))


if __name__ == "__main__":
    main(sys.argv[1:])
