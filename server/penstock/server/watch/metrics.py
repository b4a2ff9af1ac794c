"""Declares every metric, with name, unit, labels and meaning, and writes the counts out.

The logic's counters are in `counts.py`. Present values are passed in as `Gauges`, so that a scrape
needs nothing of the event loop. No label takes a model's name, a path or a client's id. `docs/metrics.md` is
made from `METRICS`.
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

from ..errors import reasons
from ..loads.warm.keeper import STATES
from ..sources.stores import KINDS
from ..system.counts import (
    CACHES,
    CLOSED_REASONS,
    LOAD_SECONDS,
    ORIGINS,
    READ_SECONDS,
    RESULTS,
    RETRY_REASONS,
    TIER_COUNTS,
    WAITED,
    Distribution,
    Totals,
)
from ..system.limits import proc_sizes

PREFIX = "penstock_"
PARTS = ("loop", "readers")


@dataclass(frozen=True, slots=True)
class Metric:
    """`name` is without the prefix. `labels` has, for each label, all values that it can ever have."""

    name: str
    kind: str
    help: str
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    buckets: tuple[float, ...] = ()

    @property
    def full_name(self) -> str:
        return PREFIX + self.name


METRICS = (
    Metric(
        "staging_limit_bytes",
        "gauge",
        "Most bytes of the staging buffer. Without a limit, the memory of the machine or the container.",
    ),
    Metric(
        "staging_bytes",
        "gauge",
        "Bytes of the staging buffer: free in the pool, being read into, held by clients, or full and idle.",
        {"state": ("free", "reading", "leased", "warm")},
    ),
    Metric("staging_peak_bytes", "gauge", "Peak of the staging buffer's bytes since the start."),
    Metric("oldest_lease_seconds", "gauge", "For how long the oldest holder of staging memory has held it."),
    Metric("loads_active", "gauge", "Loads, prefetches and fetches that run or wait."),
    Metric("loads_waiting", "gauge", "Checkpoints that wait for memory, each for one load or more."),
    Metric(
        "loads_total",
        "counter",
        "Loads and prefetches that ended. A load is cancelled if its client goes away.",
        {"source": KINDS, "result": RESULTS},
    ),
    Metric(
        "load_seconds",
        "histogram",
        "Time from request to last segment of loads that succeeded. A hit was already whole in the buffer.",
        {"source": KINDS, "cache": CACHES},
        LOAD_SECONDS,
    ),
    Metric(
        "load_wait_seconds",
        "histogram",
        "Time that loads and prefetches waited for staging memory.",
        buckets=LOAD_SECONDS,
    ),
    Metric(
        "group_loads_total",
        "counter",
        "Loads of groups that had their memory, by whether other members kept them waiting.",
        {"waited": WAITED},
    ),
    Metric(
        "group_wait_seconds",
        "histogram",
        "How long loads of groups waited for other members to join, or to release what they had.",
        buckets=LOAD_SECONDS,
    ),
    Metric(
        "group_timeouts_total",
        "counter",
        "Groups of which not all members joined within --group-timeout.",
    ),
    Metric(
        "read_bytes_total",
        "counter",
        "Checkpoint bytes read from storage into the staging buffer.",
        {"source": KINDS},
    ),
    Metric(
        "read_seconds",
        "histogram",
        "Time to read one block.",
        {"source": KINDS},
        READ_SECONDS,
    ),
    Metric(
        "read_retries_total",
        "counter",
        "Reads that were repeated, by the reason.",
        {"source": KINDS, "reason": RETRY_REASONS},
    ),
    Metric("delivered_bytes_total", "counter", "Checkpoint bytes made available to clients."),
    Metric(
        "delivered_from_bytes_total",
        "counter",
        "The same, by where they came from: they were in the staging buffer when the load came, or were read "
        "from the local disk of --tier-dir, or from storage.",
        {"origin": ORIGINS},
    ),
    Metric(
        "verified_bytes_total",
        "counter",
        "Bytes of files that were read whole and match a checksum of their store or user.",
    ),
    Metric(
        "fetches_total",
        "counter",
        "Fetches of files beside the weights that ended. A fetch is cancelled if its client goes away.",
        {"source": KINDS, "result": RESULTS},
    ),
    Metric(
        "fetched_bytes_total",
        "counter",
        "Bytes of files beside the weights sent to clients.",
        {"source": KINDS},
    ),
    Metric("stage_hits_total", "counter", "Loads and prefetches that joined an entry of the buffer."),
    Metric(
        "stage_misses_total", "counter", "Loads and prefetches for which a new entry of the buffer was made."
    ),
    Metric(
        "evictions_total",
        "counter",
        "Idle checkpoints evicted for their memory, on request, or because they changed in storage.",
    ),
    Metric(
        "warm_set_entries",
        "gauge",
        "Checkpoints of --warm-set: waiting to be read, being read, warm, failed, or too large for the "
        "memory that is left, with all of it on the local disk of --tier-dir or not.",
        {"state": STATES},
    ),
    Metric(
        "warm_set_broken",
        "gauge",
        "1 while the latest version of the file of --warm-set has a fault, and the one before is in force.",
    ),
    Metric("readers", "gauge", "Reader threads. A store starts its own with the first load from it."),
    Metric("readers_busy", "gauge", "Reader threads that are reading."),
    Metric(
        "hung_mounts",
        "gauge",
        "Mounts for which threads have waited longer than --stall-timeout. /status names them.",
    ),
    Metric("hung_threads", "gauge", "Threads that have waited for a mount longer than --stall-timeout."),
    Metric(
        "stuck_bytes",
        "gauge",
        "The part of the bytes being read into that belongs to evicted checkpoints whose reads hang.",
    ),
    Metric("tier_limit_bytes", "gauge", "The most that --tier-dir may take of its disk; 0: no tier."),
    Metric("tier_bytes", "gauge", "What --tier-dir takes of its disk."),
    Metric("tier_versions", "gauge", "Versions of objects of which --tier-dir keeps something."),
    Metric("tier_off", "gauge", "1 when the disk of the tier is full, failing or read-only."),
    Metric(
        "tier_read_bytes_total",
        "counter",
        "Bytes that were read from --tier-dir and not from their store. read_bytes_total counts them too.",
    ),
    Metric("tier_written_bytes_total", "counter", "Bytes that were written to --tier-dir, and synced."),
    Metric(
        "tier_failed_reads_total",
        "counter",
        "Reads of --tier-dir that failed, or gave other bytes than were written: the store gave them.",
    ),
    Metric("tier_evictions_total", "counter", "Versions of objects that went from --tier-dir for others."),
    Metric(
        "tier_stale_loads_total",
        "counter",
        "Loads and prefetches of checkpoints whose store could not be asked (--tier-stale).",
    ),
    Metric(
        "rejected_total",
        "counter",
        "Requests and connections that were answered with an error, by its reason.",
        {"reason": reasons()},
    ),
    Metric(
        "connections_closed_total",
        "counter",
        "Connections to penstock.sock that the daemon closed: too many of one user, broken HTTP/2, "
        "a flood of frames, no memory left for the user, or no call with a session for a minute.",
        {"reason": CLOSED_REASONS},
    ),
    Metric("ready", "gauge", "1 while the daemon is ready, as /readyz says."),
    Metric(
        "stalled",
        "gauge",
        "1 while the event loop, or all readers, made no progress for --stall-timeout.",
        {"part": PARTS},
    ),
    Metric("resident_bytes", "gauge", "Private memory of the daemon, without the staging buffer."),
    Metric(
        "build_info",
        "info",
        "Always 1. The labels have the versions of Penstock and Python.",
        {"version": (), "python": ()},
    ),
)
_BY_NAME = {metric.name: metric for metric in METRICS}
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
        yield InfoMetricFamily(PREFIX + "build", _BY_NAME["build_info"].help, value=build)


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
    states = _BY_NAME["staging_bytes"].labels["state"]
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
