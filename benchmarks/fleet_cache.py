"""nginx with the configuration docs/fleet-cache.conf, as a cache between a fleet and its store."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

from benchmarks.daemons import wait_until
from benchmarks.system import ROOT

CONFIGURATION = ROOT / "docs" / "fleet-cache.conf"
_AROUND = """
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
    include cache.conf;
}}
"""


def program() -> str | None:
    return shutil.which("nginx")


def adapted(text: str, *, port: int, directory: Path) -> str:
    """The configuration for this machine: that port and directory, and a store without TLS. Raises ValueError
    if the text lacks what is to be replaced."""
    for old, new in (
        ("listen 3128;", f"listen 127.0.0.1:{port};"),
        ("proxy_cache_path /var/cache/nginx/penstock ", f"proxy_cache_path {directory}/cache "),
        ("proxy_pass https://$host$request_uri;", "proxy_pass http://$http_host$request_uri;"),
        ("        proxy_ssl_trusted_certificate /etc/ssl/certs/ca-certificates.crt;\n", ""),
        ("        proxy_ssl_verify on;\n", ""),
    ):
        if text.count(old) != 1:
            raise ValueError(f"{CONFIGURATION}: {old.strip()!r} is not there once; correct it, or this list")
        text = text.replace(old, new)
    return text


class Cache:
    """Runs until the context ends; then what it kept is gone."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Cache:
        nginx = program()
        if nginx is None:
            raise RuntimeError("there is no nginx; install Debian's nginx-light")
        self._directory = Path(tempfile.mkdtemp(prefix="penstock-cache-"))
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        text = adapted(CONFIGURATION.read_text(), port=self._port, directory=self._directory)
        (self._directory / "cache.conf").write_text(text)
        around = _AROUND.format(user="user root;" if os.geteuid() == 0 else "", workers=os.cpu_count())
        (self._directory / "nginx.conf").write_text(around)
        command = [nginx, "-p", str(self._directory), "-c", "nginx.conf", "-e", "stderr"]
        self._process = subprocess.Popen(command, cwd=self._directory, stdin=subprocess.DEVNULL)
        try:
            wait_until(self._listens, "nginx to listen", timeout_seconds=20)
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        shutil.rmtree(self._directory)

    def _listens(self) -> bool:
        if self._process.poll() is not None:
            raise RuntimeError(f"nginx ended with {self._process.returncode}; read its messages above")
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=10).close()
        except OSError:
            return False
        return True
