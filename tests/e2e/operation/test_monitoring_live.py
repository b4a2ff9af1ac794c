"""A real Prometheus with the rules scrapes a real daemon: every query of the dashboard and the rules finds
something to say about it, and no alert fires where nothing is wrong.

All is waited for: a daemon that does not get to run for 200 ms misses a scrape, and until the next it is
down, with no series but `up`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest

from ..support import RawLoad, random_tensors, running_daemon, wait_until, write_checkpoint
from .monitoring import MONITORING, dashboard_queries, recorded
from .prometheus import running_prometheus

MIB = 1 << 20
RULES = MONITORING / "rules.yaml"
Ask = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def ask(require_tool: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ask]:
    """Answers PromQL about a daemon that loaded a checkpoint twice, and failed to load another."""
    program, top = require_tool("prometheus"), tmp_path_factory.mktemp("prometheus")
    path = write_checkpoint(top / "model.safetensors", random_tensors(8, MIB // 4))
    with (
        running_daemon("--memory-limit", "32MiB") as daemon,
        running_prometheus(program, top, daemon.http_address, rules=(RULES,)) as prometheus,
    ):
        # Rates compare scrapes before the loads with scrapes after them.
        wait_until(lambda: prometheus.ask("sum_over_time(up[1h]) >= 2"), "the first scrapes")
        with daemon.client() as client:
            for _ in range(2):
                assert client.load_state_dict(path)
        with RawLoad(daemon, top / "missing.safetensors") as missing, pytest.raises(grpc.RpcError):
            missing.next("manifest")
        for query in ("penstock:loads_failed:ratio_rate15m > 0", "penstock:load_seconds:p90_15m > 0"):
            wait_until(functools.partial(prometheus.ask, query), query)
        yield prometheus.ask


@pytest.mark.parametrize(("title", "query"), [panel[:2] for panel in dashboard_queries()])
def test_every_panel_shows_something(ask: Ask, title: str, query: str) -> None:
    wait_until(lambda: ask(query), f"{title} to show something")


@pytest.mark.parametrize("name", recorded())
def test_every_recorded_series_is_there(ask: Ask, name: str) -> None:
    wait_until(lambda: ask(name), name)


@pytest.mark.parametrize(
    ("query", "value"),
    [
        ("penstock:stage_hits:ratio_rate15m", 1 / 2),
        ("penstock:loads_failed:ratio_rate15m", 1 / 3),
        ("penstock:staging_held:ratio", 0),
    ],
)
def test_what_is_recorded_is_what_happened(ask: Ask, query: str, value: float) -> None:
    def said() -> bool:
        return [float(found["value"][1]) for found in ask(query)] == [pytest.approx(value)]

    wait_until(said, f"{query} to be {value}")


def test_a_healthy_daemon_alerts_nobody(ask: Ask) -> None:
    wait_until(lambda: ask("ALERTS") == [], "no alert, not even one that only might fire")
