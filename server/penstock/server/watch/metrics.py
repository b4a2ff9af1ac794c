"""Declares every metric, with name, unit, labels and meaning. `exposition.py` writes their values out.

No label takes a model's name, a path or a client's id. `docs/metrics.md` is made from `METRICS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..errors import reasons
from ..loads.warm.standing import STATES
from ..sources.stores import KINDS
from ..system.counts import (
    CACHES,
    CLOSED_REASONS,
    LOAD_SECONDS,
    ORIGINS,
    READ_SECONDS,
    RESULTS,
    RETRY_REASONS,
    WAITED,
)

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
BY_NAME = {metric.name: metric for metric in METRICS}
