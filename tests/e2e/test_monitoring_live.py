"""A real Prometheus with the rules scrapes a real daemon: every query of the dashboard and the rules finds
something to say about it, and no alert fires where nothing is wrong."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
import yaml

from .monitoring import MONITORING, dashboard_queries, recorded
from .support import RawLoad, random_tensors, running_daemon, wait_until, write_checkpoint

MIB = 1 << 20
Ask = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(require_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Answers PromQL about a daemon that loaded a checkpoint twice, and failed to load another."""
    prometheus, top = require_tool("prometheus"), tmp_path_factory.mktemp("prometheus")
    path = write_checkpoint(top / "model.safetensors", random_tensors(8, MIB // 4))
    with contextlib.ExitStack() as stack:
        daemon = stack.enter_context(running_daemon("--memory-limit", "32MiB"))
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(MONITORING / "rules.yaml")],
            "scrape_configs": [
                {"job_name": "penstock", "static_configs": [{"targets": [daemon.http_address]}]}
            ],
        }
        (top / "prometheus.yaml").write_text(yaml.safe_dump(config))
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        with (top / "log").open("wb") as log:
            process = subprocess.Popen(
                [
                    prometheus,
                    f"--config.file={top / 'prometheus.yaml'}",
                    f"--storage.tsdb.path={top / 'data'}",
                    f"--web.listen-address={address}",
                ],
                stdout=log,
                stderr=log,
            )
        stack.callback(process.wait)
        stack.callback(process.terminate)

        def query(text: str) -> list[dict[str, Any]]:
            url = f"http://{address}/api/v1/query?" + urllib.parse.urlencode({"query": text})
            with urllib.request.urlopen(url, timeout=30) as response:
                result: list[dict[str, Any]] = json.load(response)["data"]["result"]
            return result

        def scraped(count: int) -> bool:
            assert process.poll() is None, (top / "log").read_text()
            with contextlib.suppress(OSError):
                found = query('sum_over_time(up{job="penstock"}[1h])')
                return bool(found) and float(found[0]["value"][1]) >= count
            return False

        # Rates compare scrapes before the loads with scrapes after them.
        wait_until(lambda: scraped(2), "the first scrapes")
        with daemon.client() as client:
            for _ in range(2):
                assert client.load_state_dict(path)
        with RawLoad(daemon, top / "missing.safetensors") as missing, pytest.raises(grpc.RpcError):
            missing.next("manifest")
        wait_until(
            lambda: query('increase(penstock_loads_total{result="ok"}[1m]) > 0'), "a scrape after the loads"
        )
        wait_until(lambda: query("penstock:load_seconds:p90_15m > 0"), "the rules to see it")
        yield query


@pytest.mark.parametrize(("title", "query"), [panel[:2] for panel in dashboard_queries()])
def test_every_panel_shows_something(ask: Ask, title: str, query: str) -> None:
    assert ask(query), title


@pytest.mark.parametrize("name", recorded())
def test_every_recorded_series_is_there(ask: Ask, name: str) -> None:
    assert ask(name)


def test_what_is_recorded_is_what_happened(ask: Ask) -> None:
    def number(query: str) -> float:
        [found] = ask(query)
        return float(found["value"][1])

    assert number("penstock:stage_hits:ratio_rate15m") == pytest.approx(1 / 2)
    assert number("penstock:loads_failed:ratio_rate15m") == pytest.approx(1 / 3)
    assert number("penstock:staging_held:ratio") == 0


def test_a_healthy_daemon_alerts_nobody(ask: Ask) -> None:
    assert ask("ALERTS") == []
