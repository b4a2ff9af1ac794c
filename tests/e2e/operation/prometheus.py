"""A real Prometheus with a database of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ports import free_port
from ..support import DEADLINE_SECONDS, wait_until

CONFIGURATION = """
global: {{scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms}}
rule_files: {rules}
scrape_configs:
  - job_name: penstock
    static_configs: [{{targets: ["{target}"]}}]
"""


class Prometheus:
    """A server that scrapes one target as job penstock."""

    def __init__(self, program: str, directory: Path, target: str, rules: list[str]) -> None:
        configuration = directory / "prometheus.yml"
        configuration.write_text(CONFIGURATION.format(target=target, rules=json.dumps(rules)))
        self._port = free_port()
        self._log = directory / "prometheus.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={configuration}",
                    f"--storage.tsdb.path={directory / 'data'}",
                    f"--web.listen-address=127.0.0.1:{self._port}",
                ],
                stdout=log,
                stderr=log,
            )

    def ask(self, query: str) -> list[dict[str, Any]]:
        """The series that a query gives now; none while the server starts."""
        assert self._process.poll() is None, self._log.read_text()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=DEADLINE_SECONDS)
        with contextlib.closing(connection):
            try:
                connection.request("GET", "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
            except ConnectionRefusedError:
                return []
            response = connection.getresponse()
            body = response.read()
        if response.status == 503:
            return []
        assert response.status == 200, body
        results: list[dict[str, Any]] = json.loads(body)["data"]["result"]
        return results

    def value(self, query: str) -> float | None:
        """Of a query with one result; None without any."""
        results = self.ask(query)
        assert len(results) <= 1, results
        return float(results[0]["value"][1]) if results else None

    def comes_to_say(self, query: str, value: float) -> None:
        wait_until(lambda: self.value(query) == value, f"{query} to be {value}")

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def running_prometheus(
    program: str, directory: Path, target: str, *, rules: tuple[Path, ...] = ()
) -> Iterator[Prometheus]:
    prometheus = Prometheus(program, directory, target, [str(path) for path in rules])
    try:
        yield prometheus
    finally:
        prometheus.stop()
