"""Several processes that load the same checkpoint at once, and the memory that they take."""

import json
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import IO

from benchmarks import measure, report, system
from benchmarks.contenders import CONTENDERS, NODE_PROCESSES
from benchmarks.daemons import Daemon, clean_environment
from benchmarks.measure import Measurement


@dataclass(frozen=True, slots=True)
class Setup:
    """A number of processes of one contender; `hold` says whether they keep their tensors."""

    contender: str
    processes: int
    hold: bool

    @property
    def label(self) -> str:
        return f"{self.processes} x {CONTENDERS[self.contender].label}{', kept' if self.hold else ''}"


_ONE, _ONE_WINDOW = Setup("penstock-full", 1, hold=True), Setup("penstock-1gb-views", 1, hold=False)
_ALL, WINDOW, _RUNAI, _RUNAI_1GB, _RUNAI_1GB_VIEWS, _LOAD_FILE = (
    Setup(contender, NODE_PROCESSES, hold=hold)
    for contender, hold in (
        ("penstock-full", True),
        ("penstock-1gb-group", False),
        ("runai-default", True),
        ("runai-1gb", False),
        ("runai-1gb-views", False),
        ("safetensors-load", True),
    )
)
SETUPS = [_ONE, _ALL, _ONE_WINDOW, WINDOW, _RUNAI, _RUNAI_1GB, _RUNAI_1GB_VIEWS, _LOAD_FILE]
# The target for the memory of each process beyond its imports, without the limit.
_PRIVATE_BYTES = 200_000_000


@dataclass(frozen=True, slots=True)
class CrowdRun:
    """One round of a setup. Memory is in PSS, taken while every process still holds what it keeps."""

    measurements: list[Measurement]
    # From the start of all processes to the last tensor of the last process.
    seconds: float
    # Of all client processes: after they imported torch and the loader, and at the end.
    imported_bytes: int
    clients_bytes: int
    # Of the daemon at the end, all its slabs included.
    daemon_bytes: int
    # While the processes loaded.
    daemon_cpu_seconds: float
    limit_bytes: int
    # That the daemon read from the files.
    read_bytes: int

    @property
    def beyond_import_bytes(self) -> int:
        return self.clients_bytes - self.imported_bytes + self.daemon_bytes


def run(setup: Setup, files: Sequence[str], daemon: Daemon | None) -> CrowdRun:
    with _Crowd(setup, files, daemon) as crowd:
        crowd.wait_until_ready()
        imported_bytes = crowd.pss_bytes()
        cpu_before = daemon.cpu_seconds() if daemon else 0.0
        read_before = daemon.status()["totals"]["read_bytes"] if daemon else 0
        started_at = time.monotonic()
        measurements = crowd.load()
        daemon_cpu_seconds = daemon.cpu_seconds() - cpu_before if daemon else 0.0
        status = daemon.status() if daemon else None
        return CrowdRun(
            measurements=measurements,
            seconds=max(m.finished_at for m in measurements) - started_at,
            imported_bytes=imported_bytes,
            clients_bytes=crowd.pss_bytes(),
            daemon_bytes=system.pss_bytes(daemon.pid) if daemon else 0,
            daemon_cpu_seconds=daemon_cpu_seconds,
            limit_bytes=status["staging"]["limit_bytes"] if status else 0,
            read_bytes=status["totals"]["read_bytes"] - read_before if status else 0,
        )


def lines(runs: dict[Setup, list[CrowdRun]]) -> list[str]:
    """An explanation, a table, and comparisons."""
    rows = []
    for setup, rounds in runs.items():
        size_bytes = sum(m.size_bytes for m in rounds[0].measurements)
        seconds = [run.seconds for run in rounds]
        daemon = CONTENDERS[setup.contender].daemon is not None
        bound = rounds[0].limit_bytes + setup.processes * _PRIVATE_BYTES
        rows.append(
            [
                setup.label,
                report.spread(seconds),
                f"{size_bytes / statistics.median(seconds) / 1e9:.2f}",
                f"{statistics.median(sum(m.cpu_seconds for m in run.measurements) for run in rounds):.2f}",
                f"{statistics.median(run.daemon_cpu_seconds for run in rounds):.2f}" if daemon else "",
                times_read(rounds, size_bytes // setup.processes) if daemon else "",
                _megabytes([run.clients_bytes - run.imported_bytes for run in rounds]),
                _megabytes([run.daemon_bytes for run in rounds]) if daemon else "",
                _megabytes([run.beyond_import_bytes for run in rounds]),
                f"{bound / 1e6:.0f}" if daemon else "",
            ]
        )
    head = [
        *("processes", "seconds", "GB/s", "CPU s", "daemon CPU s", "file read"),
        *("clients MB", "daemon MB", "sum MB", "target MB"),
    ]
    return [
        "Seconds from the start of all processes to the last tensor of the last one. Memory is PSS (a page "
        "that n processes map counts as an n-th in each), taken when all have finished and still hold what "
        "they keep. For clients it is the growth since torch and the loader were imported, mapped pages of "
        "the page cache included. For the daemon it is everything, all slabs included. The target is the "
        "limit and 200 MB for each client.",
        "",
        *report.markdown_table(head, rows),
        "",
        *(
            f"- {ours.label}: {report.ratios(_seconds(runs[ours]), _seconds(runs[one]))} times as long as "
            f"{one.label} (target: at most 1.6)"
            for ours, one in ((_ALL, _ONE), (WINDOW, _ONE_WINDOW))
            if ours in runs and one in runs
        ),
        *(
            f"- {ours.label}: {report.ratios(_seconds(runs[other]), _seconds(runs[ours]))} times as fast as "
            f"{other.label}{' (target: at least 5)' if other != _LOAD_FILE else ''}"
            for ours, other in (
                (_ALL, _RUNAI),
                (_ALL, _LOAD_FILE),
                (WINDOW, _RUNAI_1GB),
                (WINDOW, _RUNAI_1GB_VIEWS),
            )
            if ours in runs and other in runs
        ),
    ]


def _seconds(rounds: list[CrowdRun]) -> list[float]:
    return [run.seconds for run in rounds]


def _megabytes(sizes: list[int]) -> str:
    return report.spread([size / 1e6 for size in sizes], 0)


def times_read(rounds: list[CrowdRun], size_bytes: int) -> str:
    """How often the bytes of the checkpoint's tensors were read."""
    read = {run.read_bytes for run in rounds}
    if read == {size_bytes}:
        return "once"
    return f"{min(read) / size_bytes:.6f}-{max(read) / size_bytes:.6f}"


class _Crowd:
    """The processes; they end with the context."""

    def __init__(self, setup: Setup, files: Sequence[str], daemon: Daemon | None) -> None:
        command = measure.command(setup.contender, files, "--barrier")
        command += ["--hold"] if setup.hold else []
        command += ["--socket-dir", daemon.socket_dir] if daemon else []
        self._name = setup.contender
        self._processes = [
            subprocess.Popen(
                command,
                env=clean_environment() | CONTENDERS[setup.contender].environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(setup.processes)
        ]

    def __enter__(self) -> "_Crowd":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._processes:
            if kind is not None:
                process.kill()
            process.communicate()

    def wait_until_ready(self) -> None:
        for process in self._processes:
            self._line(process, "ready")

    def load(self) -> list[Measurement]:
        for process in self._processes:
            _pipe(process.stdin).write("go\n")
            _pipe(process.stdin).flush()
        return [Measurement(**json.loads(self._line(process, "{"))) for process in self._processes]

    def pss_bytes(self) -> int:
        return sum(system.pss_bytes(process.pid) for process in self._processes)

    def _line(self, process: subprocess.Popen[str], start: str) -> str:
        """The next line that begins with `start`. Loaders print other lines too."""
        for line in _pipe(process.stdout):
            if line.startswith(start):
                return line
        raise RuntimeError(f"{self._name} failed with exit code {process.wait()}")


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
