"""Measures a machine with a GPU, many cores and a local NVMe disk, in less than ten minutes.

    python -m benchmarks.gpu_node --directory /mnt/nvme
    python -m benchmarks.gpu_node --only https tier --size 200MB --daemons 1 2

Prints tables for docs/benchmarks.md. There are three parts:

    https  one daemon, and several at once, stage a checkpoint from nginx on the loopback, over HTTP and
           HTTPS, beside a bare loop of one Python process. A line says what bounds the rate
    tier   the steps of `tier.py`: the tier in --directory beside raw O_DIRECT reads of the same files
    gpu    the loaders of `gpu.py` that need no other package: the raw copy, and Penstock

No round begins that would probably end after --minutes. Parts that the machine cannot run are left out, and
the reason is printed. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import make_checkpoint, measure, objects, report, system, tier
from benchmarks.daemons import Daemon, clean_environment
from benchmarks.runner import warm_up

_STAT = Path("/proc/stat")
_BARE = "raw-http"
_CONNECTIONS, _BLOCK_BYTES = 32, 32 << 20
"""Of the bare loop: the daemon's defaults."""
_GPU_LOADERS = ("raw", "raw-setup", "warm", "cached")
_SATURATED = 0.9
"""Part of the cores from which on the machine counts as busy."""
_FASTER = 1.25
"""Several daemons together are faster than one from this ratio on; less may be chance."""


class Clock:
    """The time that is left for all parts."""

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds

    @property
    def left_seconds(self) -> float:
        return max(0.0, self._ends_at - time.monotonic())

    def allows(self, seconds: float) -> bool:
        return self.left_seconds > seconds


@dataclass(slots=True)
class Rates:
    """Rounds of one number of daemons."""

    rates: list[float] = field(default_factory=list)
    """Bytes a second, of all daemons together."""
    own_cores: list[float] = field(default_factory=list)
    """Cores that the daemons kept busy."""
    all_cores: list[float] = field(default_factory=list)
    """Cores that the whole machine kept busy."""


def bound(rates: Mapping[int, float], busy_cores: Mapping[int, float], cores: int, what: str) -> str:
    """What bounds one daemon, as the end of a sentence. `rates` in bytes a second and the machine's
    `busy_cores` are by the number of daemons, 1 included; `what` is the protocol."""
    best = max(rates, key=lambda count: rates[count])
    idle = f"{cores - busy_cores[best]:.1f} of {cores} cores are idle"
    if busy_cores[1] >= _SATURATED * cores:
        return f"{what} is the cores: {busy_cores[1]:.1f} of {cores} are busy while one daemon reads"
    if rates[best] >= _FASTER * rates[1]:
        return (
            f"{what} is one process: {best} daemons read {rates[best] / rates[1]:.1f} times as fast as one, "
            f"with which {cores - busy_cores[1]:.1f} of {cores} cores are idle. The threads of one process "
            "take turns at Python's interpreter lock"
        )
    if len(rates) == 1:
        return f"{what} is not known: {idle}, and only one daemon was measured"
    return (
        f"{what} is neither the cores nor one process: more daemons are not faster, and {idle}. It may be "
        "the server or the memory"
    )


def busy_seconds(stat: str) -> float:
    """CPU seconds of the whole machine since it started, by the text of /proc/stat: all but idle, iowait, and
    guests, whose time is in user and nice."""
    fields = [int(field) for field in stat.splitlines()[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def https(options: argparse.Namespace, clock: Clock) -> list[str]:
    path = make_checkpoint.llama_checkpoint(options.size)
    system.fill_page_cache([str(path)])
    rows, verdicts = [], []
    for what, tls in (("HTTP", False), ("HTTPS", True)):
        with objects.Near(tls=tls) as server:
            rows.append([what, "bare loop", *_bare(server, path)])
            measured = {}
            for count in sorted({1, *options.daemons}):
                label = f"{count} daemons" if count > 1 else "1 daemon"
                needed_bytes = count * (options.size * 5 // 4 + 500_000_000)
                if needed_bytes > system.available_bytes():
                    _leave_out(f"{what}, {label}", f"it needs {needed_bytes / 1e9:.1f} GB of memory")
                    continue
                rounds = _stage(server, path, count, options, clock)
                if not rounds.rates:
                    _leave_out(f"{what}, {label}", "the time is used up")
                    continue
                measured[count] = rounds
                rows.append([what, label, *_cells(rounds)])
        if 1 in measured:
            rates = {count: max(each.rates) for count, each in measured.items()}
            busy = {count: max(each.all_cores) for count, each in measured.items()}
            verdicts.append(f"- The bound of {bound(rates, busy, os.cpu_count() or 1, what)}.")
    head = ["", "readers", "GB/s", "CPU s a GB", "cores of the readers", "busy cores, all"]
    return [*report.markdown_table(head, rows), "", *verdicts]


def _cells(rounds: Rates) -> list[str]:
    a_gb = [cores / rate * 1e9 for cores, rate in zip(rounds.own_cores, rounds.rates, strict=True)]
    return [
        report.spread([rate / 1e9 for rate in rounds.rates]),
        report.spread(a_gb),
        report.spread(rounds.own_cores, 1),
        report.spread(rounds.all_cores, 1),
    ]


def _bare(server: objects.ObjectServer, path: Path) -> list[str]:
    flags = ("--raw-threads", str(_CONNECTIONS), "--raw-block-bytes", str(_BLOCK_BYTES))
    environment = clean_environment() | server.environment()
    read = measure.run(_BARE, [server.uri(path)], *flags, environment=environment)
    rate = read.size_bytes / read.last_seconds
    cores = read.cpu_seconds / read.last_seconds
    return [f"{rate / 1e9:.2f}", f"{read.cpu_seconds / read.size_bytes * 1e9:.2f}", f"{cores:.1f}", ""]


def _stage(
    server: objects.ObjectServer, path: Path, count: int, options: argparse.Namespace, clock: Clock
) -> Rates:
    """So many daemons stage the checkpoint at the same moment, each into its own memory."""
    found, longest = Rates(), 0.0
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(count) as threads:
            starts = [
                threads.submit(stack.enter_context, _daemon(server, options.size)) for _ in range(count)
            ]
        daemons = [start.result() for start in starts]
        for daemon in daemons:
            warm_up(daemon, server)
        for number in range(options.rounds):
            if not clock.allows(2 * longest):
                break
            seconds, own_seconds, all_seconds = _round(daemons, server.uri(path))
            longest = max(longest, seconds)
            found.rates.append(count * path.stat().st_size / seconds)
            found.own_cores.append(own_seconds / seconds)
            found.all_cores.append(all_seconds / seconds)
            print(f"  {server.scheme}, {count} daemons, round {number + 1}: {seconds:.2f} s", file=sys.stderr)
    return found


@contextlib.contextmanager
def _daemon(server: objects.ObjectServer, size_bytes: int) -> Iterator[Daemon]:
    limit = str(size_bytes * 5 // 4 + (64 << 20))
    with Daemon("--memory-limit", limit, environment=server.environment(), poll_seconds=0.1) as daemon:
        daemon.wait_until_populated()
        yield daemon


def _round(daemons: Sequence[Daemon], uri: str) -> tuple[float, float, float]:
    """Seconds until all have it; CPU seconds of the daemons; CPU seconds of the machine."""
    together = threading.Barrier(len(daemons))

    def stage(daemon: Daemon) -> None:
        together.wait()
        daemon.prefetch(uri)

    own = sum(daemon.cpu_seconds() for daemon in daemons)
    everything, begin = busy_seconds(_STAT.read_text()), time.perf_counter()
    with ThreadPoolExecutor(len(daemons)) as threads:
        list(threads.map(stage, daemons))
    seconds = time.perf_counter() - begin
    everything = busy_seconds(_STAT.read_text()) - everything
    own = sum(daemon.cpu_seconds() for daemon in daemons) - own
    for daemon in daemons:
        daemon.evict()
    return seconds, own, everything


def on_disk(options: argparse.Namespace, clock: Clock) -> list[str]:
    began = clock.left_seconds
    rounds = 0

    def goes_on() -> bool:
        nonlocal rounds
        rounds += 1
        return clock.allows(1.5 * (began - clock.left_seconds) / rounds)

    results = tier.compare(options.size, options.rounds, options.directory, goes_on=goes_on)
    return [f"The tier is in {_mount(options.directory)}.", "", *tier.lines(results, options.size)]


def _mount(directory: Path) -> str:
    """Kind and device of the file system, as `findmnt` says them."""
    done = subprocess.run(
        ["findmnt", "--noheadings", "--output", "FSTYPE,SOURCE", "--target", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    return " on ".join(done.stdout.split()[:2]) or "a file system that findmnt does not know"


def to_gpu(options: argparse.Namespace, clock: Clock) -> list[str]:
    import torch

    if not torch.cuda.is_available():
        _leave_out("gpu", f"torch {torch.__version__} finds no CUDA device")
        return []
    command = [sys.executable, str(Path(__file__).with_name("gpu.py")), "--only", *_GPU_LOADERS]
    command += ["--size", str(options.size), "--rounds", str(options.rounds)]
    try:
        done = subprocess.run(
            command,
            env=clean_environment(),
            stdout=subprocess.PIPE,
            text=True,
            check=False,
            timeout=clock.left_seconds,
        )
    except subprocess.TimeoutExpired:
        _leave_out("gpu", "the time is used up; lower --size or --rounds")
        return []
    if done.returncode:
        raise RuntimeError(f"gpu.py failed with exit code {done.returncode}; read its messages above")
    return done.stdout.splitlines()


def _leave_out(what: str, why: str) -> None:
    print(f"  {what} is left out: {why}", file=sys.stderr)


PARTS = {
    "https": ("HTTPS with one and several daemons", https),
    "tier": ("The tier on a local disk", on_disk),
    "gpu": ("To the GPU", to_gpu),
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument(
        "--size", type=make_checkpoint.parse_size, default=4 * 10**9, help="bytes of the checkpoint (4GB)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--daemons", nargs="+", type=int, default=[1, 2, 4, 8], metavar="N", help="daemons at once (1 2 4 8)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the tier is written: on the local disk that is to be measured",
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="for all parts together (9)")
    options = parser.parse_args(arguments)
    # SIGTERM runs the clean-up of every `with`: daemons, nginx, temporary directories.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    clock = Clock(options.minutes * 60)
    print("\n".join(system.describe()), flush=True)
    for name in options.only:
        title, part = PARTS[name]
        print(f"{name} ...", file=sys.stderr)
        lines = part(options, clock)
        if lines:
            print("\n".join(["", f"## {title}", "", *lines]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
