"""Writes all metrics out, as Prometheus reads them.

The logic's counters are in `counts.py`. Present values are passed in as `Gauges`, so that a scrape
needs nothing of the event loop. `metrics.py` declares the metrics.
"""

from __future__ import annotations

import itertools
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import prometheus_client
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from ..system.counts import TIER_COUNTS, Distribution, Totals
from ..system.limits import proc_sizes
from .metrics import BY_NAME, METRICS, PARTS, PREFIX, Metric

_Values = Mapping[tuple[str, ...], float]

# The creation times of all series would double the size of a scrape.
prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class Gauges:
    """The present values that the event loop knows."""

    limit_bytes: int = 0
    free_bytes: int = 0
    reading_bytes: int = 0
    leased_bytes: int = 0
    warm_bytes: int = 0
    peak_bytes: int = 0
    oldest_lease_seconds: float = 0.0
    loads_active: int = 0
    loads_waiting: int = 0
    readers: int = 0
    readers_busy: int = 0
    stuck_bytes: int = 0
    warm_set_entries: Mapping[str, int] = field(default_factory=dict)
    """By state."""
    warm_set_broken: bool = False
    tier_limit_bytes: int = 0
    tier_bytes: int = 0
    tier_versions: int = 0
    tier_off: int = 0


_OPENMETRICS = "application/openmetrics-text"


def content_type_for(accept: str) -> str:
    """The format that the header Accept asks for: one of two. Nothing else of the header counts. The library
    would write a version that the client made up into its content type, and could not compare it."""
    named = {kind.partition(";")[0].strip() for kind in accept.split(",")}
    return choose_encoder(_OPENMETRICS if _OPENMETRICS in named else "")[1]


class Exposition(Collector):
    """Writes all metrics out. Used by one thread at a time."""

    def __init__(self, totals: Totals, version: str) -> None:
        self._totals = totals
        self._version = version
        self._present: dict[str, _Values] = {}
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def render(
        self, content_type: str, gauges: Gauges, *, ready: bool, stalled: set[str], hung: Mapping[str, int]
    ) -> bytes:
        """The text, in a format of `content_type_for`. `hung` has, for each mount that hangs, how many
        threads wait for it."""
        self._present = {
            **_present(gauges),
            "ready": {(): float(ready)},
            "stalled": {(part,): float(part in stalled) for part in PARTS},
            "hung_mounts": {(): float(len(hung))},
            "hung_threads": {(): float(sum(hung.values()))},
            "resident_bytes": {(): float(proc_sizes(Path("/proc/self/status"))["RssAnon"])},
        }
        encode, _ = choose_encoder(content_type.partition(";")[0])
        return encode(self._registry)

    def describe(self) -> list[Family]:
        """Empty, as nothing is to be compared: all names are in `METRICS`."""
        return []

    def collect(self) -> Iterator[Family]:
        values = {**_counted(self._totals), **self._present}
        distributions = _distributions(self._totals)
        for metric in METRICS:
            family: GaugeMetricFamily | CounterMetricFamily
            if metric.kind == "gauge":
                family = GaugeMetricFamily(metric.full_name, metric.help, labels=list(metric.labels))
            elif metric.kind == "counter":
                family = CounterMetricFamily(metric.full_name, metric.help, labels=list(metric.labels))
            elif metric.kind == "histogram":
                yield _histogram(metric, distributions[metric.name])
                continue
            else:
                continue
            for key in itertools.product(*metric.labels.values()):
                family.add_metric(key, values[metric.name].get(key, 0))
            yield family
        build = {"version": self._version, "python": platform.python_version()}
        yield InfoMetricFamily(PREFIX + "build", BY_NAME["build_info"].help, value=build)


def _counted(totals: Totals) -> dict[str, _Values]:
    return {
        "loads_total": totals.loads,
        "read_bytes_total": {(source,): count for source, count in totals.source_bytes.items()},
        "read_retries_total": {
            (source, reason): count
            for source, retries in totals.retries.items()
            for reason, count in retries().items()
        },
        "delivered_bytes_total": {(): totals.delivered_bytes},
        "delivered_from_bytes_total": totals.delivered,
        "verified_bytes_total": {(): totals.verified_bytes},
        "fetches_total": totals.fetches,
        "fetched_bytes_total": {(source,): count for source, count in totals.fetched_bytes.items()},
        "stage_hits_total": {(): totals.stage_hits},
        "stage_misses_total": {(): totals.stage_misses},
        "evictions_total": {(): totals.evictions},
        "group_loads_total": totals.group_loads,
        "group_timeouts_total": {(): totals.group_timeouts},
        "connections_closed_total": {(reason,): count for reason, count in totals.connections_closed.items()},
        **{f"tier_{name}_total": {(): totals.tier[name]} for name in TIER_COUNTS},
        "tier_stale_loads_total": {(): totals.stale_loads},
        "rejected_total": {(reason,): count for reason, count in totals.rejected.items()},
    }


def _present(gauges: Gauges) -> dict[str, _Values]:
    states = BY_NAME["staging_bytes"].labels["state"]
    return {
        "staging_limit_bytes": {(): gauges.limit_bytes},
        "staging_bytes": {(state,): getattr(gauges, f"{state}_bytes") for state in states},
        "staging_peak_bytes": {(): gauges.peak_bytes},
        "oldest_lease_seconds": {(): gauges.oldest_lease_seconds},
        "loads_active": {(): gauges.loads_active},
        "loads_waiting": {(): gauges.loads_waiting},
        "readers": {(): gauges.readers},
        "readers_busy": {(): gauges.readers_busy},
        "stuck_bytes": {(): gauges.stuck_bytes},
        "warm_set_entries": {(state,): count for state, count in gauges.warm_set_entries.items()},
        "warm_set_broken": {(): float(gauges.warm_set_broken)},
        "tier_limit_bytes": {(): gauges.tier_limit_bytes},
        "tier_bytes": {(): gauges.tier_bytes},
        "tier_versions": {(): gauges.tier_versions},
        "tier_off": {(): gauges.tier_off},
    }


def _distributions(totals: Totals) -> dict[str, Mapping[tuple[str, ...], Distribution]]:
    return {
        "load_seconds": totals.load_seconds,
        "load_wait_seconds": {(): totals.load_wait_seconds},
        "group_wait_seconds": {(): totals.group_wait_seconds},
        "read_seconds": {(source,): seconds for source, seconds in totals.read_seconds.items()},
    }


def _histogram(metric: Metric, distributions: Mapping[tuple[str, ...], Distribution]) -> Family:
    family = HistogramMetricFamily(metric.full_name, metric.help, labels=list(metric.labels))
    for key in itertools.product(*metric.labels.values()):
        counts, total = distributions[key].cumulated()
        bounds = [*map(floatToGoString, distributions[key].bounds), "+Inf"]
        family.add_metric(key, list(zip(bounds, counts, strict=True)), total)
    return family
