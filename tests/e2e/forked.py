"""Processes forked from one that has their imports already: to start one takes milliseconds, not seconds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
PATIENCE_SECONDS = 120.0
STDOUT = 1
DIRECTORY = os.getcwd()
ENVIRONMENT: dict[str, str] = {}
"""Of processes that fork others, which outlive the test that starts them. `tests/conftest.py` fills it before
the first test, as tests change theirs."""


class Forker:
    """Starts processes that run a function of a module, without waiting for its imports; see `nursery.py`."""

    def __init__(self, programs: Path) -> None:
        self._asking = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "nursery.py"), str(theirs.fileno()), str(programs)],
                pass_fds=[theirs.fileno()],
                env=ENVIRONMENT or None,
                cwd=DIRECTORY,
            )

    def ask(self, request: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """From any thread."""
        with self._asking:
            socket.send_fds(self._socket, [json.dumps(request).encode()], fds)
            return json.loads(self._socket.recv(1 << 16))

    def fork(
        self,
        program: str,
        arguments: Mapping[str, Any],
        fds: Sequence[int],
        *,
        uid: int | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> ForkedProcess:
        """A process that runs a function, with these as standard input, output and error. Its environment is
        its parent's, or the one that is given, which comes too late for what is read at an import."""
        request = {
            "program": program,
            "uid": uid,
            "arguments": dict(arguments),
            "environment": None if environment is None else dict(environment),
        }
        return ForkedProcess(self, self.ask(request, fds))

    def children(self) -> list[int]:
        """Processes that exist, zombies included."""
        pid = self._process.pid
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def close(self) -> None:
        self._socket.close()
        self._process.wait(PATIENCE_SECONDS)


class ForkedProcess:
    """What tests need of `subprocess.Popen`. Its pid stays its own until it was found to have ended."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        """None while it runs, or nobody asked; -9 for SIGKILL."""
        self._forker = forker

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._forker.ask({"poll": self.pid})
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            pidfd = os.pidfd_open(self.pid)
            try:
                ready, _, _ = select.select([pidfd], [], [], timeout)
            finally:
                os.close(pidfd)
            if not ready:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        code = self.poll()
        assert code is not None
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def _daemons() -> Forker:
    """One for all tests of this process; it ends with it."""
    forker = Forker(HERE / "penstockd.py")
    atexit.register(forker.close)
    return forker


def fork_daemon(flags: Sequence[str], environment: Mapping[str, str], log: IO[bytes]) -> ForkedProcess:
    """penstockd with these flags, this environment alone, and the log as standard error."""
    return fork_daemon_by("serve", {"flags": list(flags), "directory": os.getcwd()}, environment, log)


def fork_daemon_by(
    program: str, arguments: Mapping[str, Any], environment: Mapping[str, str], log: IO[bytes]
) -> ForkedProcess:
    """penstockd as a function starts it: one of `penstockd.py`, or `package.module:function`."""
    with open(os.devnull, "rb") as nothing:
        fds = [nothing.fileno(), STDOUT, log.fileno()]
        return _daemons().fork(program, arguments, fds, environment=environment)
