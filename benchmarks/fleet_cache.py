"""nginx with the configuration docs/fleet-cache.conf, as a cache between a fleet and its store."""

from __future__ import annotations

from pathlib import Path

from benchmarks.local_server import LocalServer, nginx_command
from benchmarks.system import ROOT

CONFIGURATION = ROOT / "docs" / "fleet-cache.conf"


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


class Cache(LocalServer):
    """Runs until the context ends; then what it kept is gone."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _command(self) -> list[str]:
        text = adapted(CONFIGURATION.read_text(), port=self.port, directory=self._directory)
        (self._directory / "cache.conf").write_text(text)
        return nginx_command(self._directory, "include cache.conf;")
