"""Several processes that load the same checkpoint at once, and the memory they take."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import system
from contenders import CONTENDERS, Measurement
from daemons import Daemon, clean_environment

_CONTENDERS_SCRIPT = str(Path(__file__).with_name("contenders.py"))


@dataclass(frozen=True, slots=True)
class Setup:
    """How many processes of which contender, and whether they keep their tensors."""

    contender: str
    processes: int
    hold: bool

    @property
    def label(self) -> str:
        return f"{self.processes} x {CONTENDERS[self.contender].label}{', kept' if self.hold else ''}"


@dataclass(frozen=True, slots=True)
class CrowdRun:
    """One round of a setup. Memory is in PSS, taken while every process still has what it keeps."""

    measurements: list[Measurement]
    # From the start of all to the last tensor of the last.
    seconds: float
    # Of all client processes when torch and the loader were imported, and at the end.
    imported_bytes: int
    clients_bytes: int
    # Of the daemon at the end, all slabs that it has included.
    daemon_bytes: int
    # What the daemon read from the files.
    read_bytes: int

    @property
    def beyond_import_bytes(self) -> int:
        return self.clients_bytes - self.imported_bytes + self.daemon_bytes


def run(setup: Setup, files: list[str], daemon: Daemon | None) -> CrowdRun:
    with _Crowd(setup, files, daemon) as crowd:
        crowd.wait_until_ready()
        imported_bytes = crowd.pss_bytes()
        started_at = time.monotonic()
        measurements = crowd.load()
        return CrowdRun(
            measurements=measurements,
            seconds=max(m.finished_at for m in measurements) - started_at,
            imported_bytes=imported_bytes,
            clients_bytes=crowd.pss_bytes(),
            daemon_bytes=system.pss_bytes(daemon.pid) if daemon else 0,
            read_bytes=daemon.status()["totals"]["read_bytes"] if daemon else 0,
        )


class _Crowd:
    """The processes; they end with the context."""

    def __init__(self, setup: Setup, files: list[str], daemon: Daemon | None) -> None:
        command = [sys.executable, _CONTENDERS_SCRIPT, setup.contender, *files, "--barrier"]
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
        """The next line that starts so: loaders print lines of their own."""
        for line in _pipe(process.stdout):
            if line.startswith(start):
                return line
        raise RuntimeError(f"{self._name} failed with exit code {process.wait()}")


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
