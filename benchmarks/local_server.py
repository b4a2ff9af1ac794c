"""Servers on the loopback that a benchmark starts and stops, and how nginx is one of them."""

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from benchmarks.daemons import wait_until

_S = TypeVar("_S", bound="LocalServer")

LISTENING_SECONDS = 20

_NGINX = """
daemon off;
{user}
worker_processes {workers};
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    {http}
}}
"""


class LocalServer:
    """A process on a free port, with a directory of its own. Both are gone when the context ends."""

    def __init__(self) -> None:
        self.port = 0

    def __enter__(self: _S) -> _S:
        self._directory = Path(tempfile.mkdtemp(prefix="penstock-server-"))
        # nginx cannot choose a free port itself.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        try:
            self._process = subprocess.Popen(self._command(), cwd=self._directory, stdin=subprocess.DEVNULL)
        except BaseException:
            shutil.rmtree(self._directory)
            raise
        try:
            wait_until(self._listens, f"{self._process.args!r} to listen", timeout_seconds=LISTENING_SECONDS)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _command(self) -> list[str]:
        """The command that serves on `port`. It runs in the directory."""
        raise NotImplementedError

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        shutil.rmtree(self._directory)

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(
                f"{self._process.args!r} ended with {self._process.returncode}; read its messages above"
            )
        try:
            socket.create_connection(("127.0.0.1", self.port), timeout=10).close()
        except OSError:
            return False
        return True


def nginx() -> str | None:
    """The program, if there is one."""
    return shutil.which("nginx")


def nginx_command(directory: Path, http: str) -> list[str]:
    """Writes a configuration to the directory, with `http` in the block of that name. Returns the command
    that runs nginx there. Raises RuntimeError if there is no nginx."""
    program = nginx()
    if program is None:
        raise RuntimeError("there is no nginx; install Debian's nginx-light")
    user = "user root;" if os.geteuid() == 0 else ""
    (directory / "nginx.conf").write_text(_NGINX.format(user=user, workers=os.cpu_count(), http=http))
    return [program, "-p", str(directory), "-c", "nginx.conf", "-e", "stderr"]
