"""Daemons for benchmarks: starts, watches and stops them."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any


def clean_environment() -> dict[str, str]:
    """The environment without variables that configure contenders: the benchmark alone configures them."""
    prefixes = ("PENSTOCK_", "RUNAI_", "FASTSAFETENSORS_", "SAFETENSORS_", "AWS_")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def wait_until(done: Callable[[], bool], what: str, *, timeout_seconds: float = 300) -> None:
    """Asks until it is done. Raises TimeoutError, which names `what` was waited for."""
    deadline = time.monotonic() + timeout_seconds
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {timeout_seconds:.0f} s for {what}; see what the daemons log")
        time.sleep(0.01)


class Daemon:
    """A penstockd with a socket directory of its own; both are gone when the context ends.

    `log` is a file for all events, as lines of JSON. Without it, warnings go to standard error.
    `environment` is added to the daemon's environment. `poll_seconds` is the pause between two questions
    whether it is ready, which take CPU from daemons that start beside it.
    """

    def __init__(
        self,
        *flags: str,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
        http_address: str = "none",
        poll_seconds: float = 0.002,
    ) -> None:
        self._flags = flags
        self._environment = dict(environment or {})
        self._log = log
        self._http_address = http_address
        self._poll_seconds = poll_seconds
        self.ready_seconds = 0.0

    def __enter__(self) -> "Daemon":
        # Short: the path of a Unix socket has 107 bytes.
        self.socket_dir = tempfile.mkdtemp(prefix="penstock-bench-")
        command = [sys.executable, "-m", "penstock.server", "--socket-dir", self.socket_dir, *self._flags]
        command += ["--http-address", self._http_address]
        with contextlib.ExitStack() as stack:
            stderr = None
            if self._log is None:
                command += ["--log-level", "warning"]
            else:
                command += ["--log-format", "json"]
                stderr = stack.enter_context(self._log.open("wb"))
            start = time.perf_counter()
            self._process = subprocess.Popen(
                command,
                env=clean_environment() | self._environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            self._wait_until_ready(start)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def status(self) -> dict[str, Any]:
        """The answer of `StreamerClient.status()`."""
        from penstock.client import StreamerClient

        return StreamerClient(self.socket_dir).status()

    def prefetch(self, path: Path | str) -> float:
        """Stages a checkpoint. Returns the seconds that this took."""
        from penstock.client import StreamerClient

        start = time.perf_counter()
        StreamerClient(self.socket_dir).prefetch(path)
        return time.perf_counter() - start

    def evict(self) -> None:
        """Evicts all checkpoints."""
        from penstock.client import StreamerClient

        StreamerClient(self.socket_dir).evict()

    def wait_until_populated(self, timeout_seconds: float = 60) -> None:
        """Waits until all slabs that the limit allows are populated and free."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            staging = self.status()["staging"]
            slabs = staging["limit_bytes"] // staging["slab_bytes"]
            if staging["free_bytes"] == slabs * staging["slab_bytes"]:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"the daemon did not populate its buffer: {staging}")
            time.sleep(0.02)

    def cpu_seconds(self) -> float:
        """Of all its threads since it started, by the kernel's CPU clock of the process. The ticks in /proc
        are too coarse for one load."""
        # The clock id of a pid, as clock_getcpuclockid(3) computes it.
        return time.clock_gettime((~self.pid << 3) | 2)

    def _wait_until_ready(self, start: float) -> None:
        from penstock.client import StreamerClient, errors

        deadline = start + 120
        while True:
            # A new client for every attempt: a gRPC channel that failed once waits for a second.
            try:
                StreamerClient(self.socket_dir).status()
            except errors.DaemonUnavailableError:
                if self._process.poll() is not None:
                    raise RuntimeError(f"penstockd exited with {self._process.returncode}") from None
                if time.perf_counter() > deadline:
                    raise
                time.sleep(self._poll_seconds)
            else:
                self.ready_seconds = time.perf_counter() - start
                return

    def _stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=40)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.socket_dir, ignore_errors=True)


@dataclass(slots=True)
class Peaks:
    """The highest values seen in /proc/PID/status."""

    # RssAnon + RssFile: the memory of the daemon without the staging buffer.
    private_bytes: int = 0
    # RssShmem: the staging buffer's pages.
    shared_bytes: int = 0


class MemoryWatch:
    """Samples a process's resident memory until the context ends."""

    def __init__(self, pid: int, interval_seconds: float = 0.05) -> None:
        self._pid = pid
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.peaks = Peaks()

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            sizes = {}
            with open(f"/proc/{self._pid}/status") as file:
                for line in file:
                    if line.startswith("Rss"):
                        name, size, _ = line.split()
                        sizes[name.rstrip(":")] = int(size) * 1024
            private_bytes = sizes["RssAnon"] + sizes["RssFile"]
            self.peaks.private_bytes = max(self.peaks.private_bytes, private_bytes)
            self.peaks.shared_bytes = max(self.peaks.shared_bytes, sizes["RssShmem"])
            if self._stop.wait(self._interval_seconds):
                return
