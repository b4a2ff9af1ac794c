"""A private penstockd, which ends with this process or its client.

The daemon ends when its standard input does. This process has the other end of that pipe, so the daemon ends
with it, however it ends. The sockets lie in a directory of their own, which only this user can enter and
which is removed at the end.
"""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from . import errors
from .ring.socket_dir import MAX_SOCKET_PATH_BYTES, socket_path
from .system import descriptors
from .system.interpreter import start_module

_PREFIX = "penstock-"
_LONGEST_SOCKET_NAME = "penstock.sock"
_SHORT_DIRECTORIES = ("/tmp", "/var/tmp", "/dev/shm")
# Imports alone take tenths of a second; a loaded machine needs more.
_START_SECONDS = 60.0
# After its standard input ended, a daemon has nothing left to wait for but its own threads.
_STOP_SECONDS = 10.0
_POLL_SECONDS = 0.01
_STDERR_BYTES = 4000
# Flags of penstockd that an embedded daemon does not take, and why.
_REFUSED = {
    "socket_dir": "the daemon has a directory of its own, which the client's socket_dir names; leave it out",
    "exit_with_stdin": "the daemon ends with the client in any case; leave it out",
    "memory_limit": "give it as the argument memory_limit",
    "help": "it shows a text and starts nothing: run `penstockd --help`",
    "version": "it shows a text and starts nothing: run `penstockd --version`",
}


class EmbeddedDaemon:
    """A running daemon. It ends by `close()`, when the object is dropped, or when this process ends."""

    def __init__(
        self,
        *,
        memory_limit: int | str | None,
        flags: Mapping[str, Any],
        environment: Mapping[str, str | None] | None = None,
    ) -> None:
        """Returns when the daemon accepts clients. It gets this process's environment with the changes of
        `environment`; None as a value removes a variable.

        Raises DaemonUnavailableError, with the daemon's own words, if the daemon ends instead, and ValueError
        for flags that it does not take.
        """
        for name in flags:
            if why := _REFUSED.get(name.replace("-", "_")):
                raise ValueError(f"an embedded daemon takes no {name}: {why}")
        descriptors.require()
        self.socket_dir = _make_socket_dir()
        # A file without a name: it is read if the start fails, and needs no removal.
        stderr = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            process = start_module(
                "penstock.server",
                _arguments(self.socket_dir, memory_limit, flags),
                stderr=stderr,
                environment=_environment(environment or {}),
            )
        except BaseException:
            stderr.close()
            shutil.rmtree(self.socket_dir, ignore_errors=True)
            raise
        self._finalizer = weakref.finalize(self, _stop, process, self.socket_dir, stderr, os.getpid())
        self.pid = process.pid
        try:
            _await_start(process, self.socket_dir, stderr)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Returns when the process has ended and its directory is gone. May be called again."""
        self._finalizer()


def _make_socket_dir() -> Path:
    """A new directory with mode 0700 in the directory of temporary files, or elsewhere if a socket's path
    would be too long there. Raises OSError if none can be made."""
    refused: OSError | None = None
    for parent in (tempfile.gettempdir(), os.environ.get("XDG_RUNTIME_DIR", ""), *_SHORT_DIRECTORIES):
        example = os.path.join(parent, _PREFIX + 8 * "x", _LONGEST_SOCKET_NAME)
        if not os.path.isabs(parent) or len(os.fsencode(example)) > MAX_SOCKET_PATH_BYTES:
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        except OSError as error:
            refused = error
    raise OSError(
        errno.ENAMETOOLONG if refused is None else refused.errno,
        "no directory for the sockets of a private penstock daemon: none can be made in "
        f"{tempfile.gettempdir()} with a path of at most {MAX_SOCKET_PATH_BYTES} bytes, nor in "
        f"{', '.join(_SHORT_DIRECTORIES)}: set TMPDIR to a short path that this user may write to",
    )


def _arguments(socket_dir: Path, memory_limit: int | str | None, flags: Mapping[str, Any]) -> list[str]:
    arguments = [f"--socket-dir={socket_dir}", "--exit-with-stdin"]
    arguments.append(f"--memory-limit={-1 if memory_limit is None else memory_limit}")
    arguments.append("--http-address=none")  # a flag given by the caller comes later and wins
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            arguments.append(flag)
        elif value is not False and value is not None:
            values = value if isinstance(value, (list, tuple, set, frozenset)) else [value]
            arguments.extend(f"{flag}={one}" for one in values)
    return arguments


def _environment(changes: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in {**os.environ, **changes}.items() if value is not None}


def _await_start(process: subprocess.Popen[bytes], socket_dir: Path, stderr: IO[bytes]) -> None:
    path = socket_path(socket_dir, "handoff.sock")  # bound last
    deadline = time.monotonic() + _START_SECONDS
    while process.poll() is None:
        if accepts(path):
            return
        if time.monotonic() > deadline:
            raise errors.DaemonUnavailableError(
                f"the embedded daemon was not ready within {_START_SECONDS:.0f} s; try again when the "
                f"machine is less busy, and see what it said: {_last_words(stderr)}"
            )
        time.sleep(_POLL_SECONDS)
    raise errors.DaemonUnavailableError(
        f"the embedded daemon ended with exit code {process.returncode} instead of starting; see what it "
        f"said: {_last_words(stderr)}"
    )


def accepts(path: str) -> bool:
    """Whether somebody listens on this handoff socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC) as connection:
        try:
            connection.connect(path)
        except OSError:
            return False
        return True


def _last_words(stderr: IO[bytes]) -> str:
    stderr.seek(max(0, os.fstat(stderr.fileno()).st_size - _STDERR_BYTES))
    words = stderr.read().decode(errors="replace").strip()
    if "No module named penstock.server" in words or "No module named 'penstock" in words:
        words += " (in a checkout of Penstock: pip install '.[server]')"
    return words or "it said nothing"


def _stop(process: subprocess.Popen[bytes], socket_dir: Path, stderr: IO[bytes], owner_pid: int) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if owner_pid != os.getpid():  # a forked child that ends: the daemon belongs to its parent
        stderr.close()
        return
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    finally:
        stderr.close()
        shutil.rmtree(socket_dir, ignore_errors=True)
