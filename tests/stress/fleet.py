"""Worker processes, as their test sees them."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from ..e2e.forked import Forker

HERE = Path(__file__).parent


class Fleet(Forker):
    """Starts workers."""

    def __init__(self) -> None:
        super().__init__(HERE / "worker.py")

    def start(self, socket_dir: Path, *, uid: int, reconnect_timeout: float) -> WorkerProcess:
        return WorkerProcess(self, socket_dir, uid, reconnect_timeout)


class WorkerProcess:
    """One worker. It does one order at a time."""

    def __init__(self, fleet: Fleet, socket_dir: Path, uid: int, reconnect_timeout: float) -> None:
        self.uid = uid
        self.order: Any = None
        """What it works on; the test's affair."""
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        arguments = {"socket_dir": str(socket_dir), "reconnect_timeout": reconnect_timeout}
        their_input, self._input = os.pipe()
        self._output, their_output = os.pipe()
        try:
            fds = [their_input, their_output, self._errors.fileno()]
            self._process = fleet.fork("work", arguments, fds, uid=uid or None)
        finally:
            os.close(their_input)
            os.close(their_output)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fileno(self) -> int:
        return self._output

    def tell(self, operation: str, arguments: dict[str, Any]) -> None:
        os.write(self._input, json.dumps({"do": operation, "with": arguments}).encode() + b"\n")

    def hear(self, timeout: float) -> dict[str, Any] | None:
        """Its answer; None if it has not come by then. Raises EOFError when the process ended."""
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            if not select.select([self._output], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            data = os.read(self._output, 1 << 20)
            if not data:
                raise EOFError(self.errors())
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stacks(self) -> str:
        """Where its threads are now, and whatever else it wrote to standard error."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.3)
        return self.errors()

    def errors(self) -> str:
        return os.pread(self._errors.fileno(), 1 << 20, 0).decode(errors="replace")

    def kill(self) -> None:
        """SIGKILL; returns when it is gone."""
        self._process.kill()
        self._reap()
        self._errors.close()

    def end(self) -> None:
        """By the end of its input, as a program ends. Raises AssertionError unless it does so in peace."""
        os.close(self._input)
        self._input = -1
        code = self._reap()
        errors = self.errors()
        self._errors.close()
        assert code == 0, f"a worker ended with {code}: {errors}"

    def _reap(self) -> int:
        try:
            code = self._process.wait(60)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"worker {self.pid} does not end:\n{self.errors()}") from None
        for fd in (self._input, self._output):
            if fd >= 0:
                os.close(fd)
        self._input = self._output = -1
        return code
