"""The daemon's counters since its start, as plain numbers. `metrics.py` shows them."""

from __future__ import annotations

import itertools
import threading
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence

from ..errors import reasons

RESULTS = ("ok", "failed", "cancelled")
CACHES = ("hit", "miss")
WAITED = ("no", "yes")
CLOSED_REASONS = ("refused", "protocol", "flood", "memory", "idle")
"""Why the gate closes a connection."""
RETRY_REASONS = ("timeout", "connection", "throttled", "server_error", "short_body", "bad_response")
LOAD_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800)
TIER_COUNTS = ("read_bytes", "written_bytes", "failed_reads", "evictions")
"""The counters of the tier."""
READ_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Distribution:
    """How many values fell between certain bounds, and their sum. Every thread may use it."""

    def __init__(self, bounds: Sequence[float]) -> None:
        """`bounds` ascend. A value counts below the first bound that it does not exceed."""
        self.bounds = tuple(map(float, bounds))
        self._lock = threading.Lock()
        self._counts = [0] * (len(self.bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        index = bisect_left(self.bounds, value)
        with self._lock:
            self._counts[index] += 1
            self._sum += value

    def cumulated(self) -> tuple[list[int], float]:
        """How many values do not exceed each bound, last the number of all, and the sum of all."""
        with self._lock:
            return list(itertools.accumulate(self._counts)), self._sum


class Totals:
    """Changed on the event loop only, except for the distributions."""

    def __init__(self, sources: Sequence[str]) -> None:
        """`sources` are the kinds of storage."""
        self.loads: dict[tuple[str, ...], int] = dict.fromkeys(itertools.product(sources, RESULTS), 0)
        """By source and result."""
        self.fetches: dict[tuple[str, ...], int] = dict.fromkeys(itertools.product(sources, RESULTS), 0)
        """As `loads`."""
        self.fetched_bytes = dict.fromkeys(sources, 0)
        self.source_bytes = dict.fromkeys(sources, 0)
        self.retries: dict[str, Callable[[], Mapping[str, int]]] = {}
        """By source that repeats requests: how often it did, by reason."""
        self.tier: Mapping[str, int] = dict.fromkeys(TIER_COUNTS, 0)
        """By name of `TIER_COUNTS`. The tier replaces these by its own, if there is one."""
        self.rejected = dict.fromkeys(reasons(), 0)
        self.connections_closed = dict.fromkeys(CLOSED_REASONS, 0)
        self.delivered_bytes = 0
        self.verified_bytes = 0
        self.stage_hits = 0
        self.stage_misses = 0
        self.evictions = 0
        self.group_loads: dict[tuple[str, ...], int] = {(waited,): 0 for waited in WAITED}
        """Loads of groups, by whether other members kept them waiting."""
        self.group_timeouts = 0
        self.group_wait_seconds = Distribution(LOAD_SECONDS)
        self.load_seconds: dict[tuple[str, ...], Distribution] = {
            labels: Distribution(LOAD_SECONDS) for labels in itertools.product(sources, CACHES)
        }
        """By source and whether all was warm."""
        self.load_wait_seconds = Distribution(LOAD_SECONDS)
        self.read_seconds = {source: Distribution(READ_SECONDS) for source in sources}

    @property
    def read_bytes(self) -> int:
        return sum(self.source_bytes.values())

    def loads_that(self, result: str) -> int:
        """How many loads ended with this result."""
        return sum(count for (_, ended), count in self.loads.items() if ended == result)

    def summary(self) -> dict[str, int]:
        """The totals of `GetStatus`."""
        return {
            "loads_ok": self.loads_that("ok"),
            "loads_failed": self.loads_that("failed"),
            "loads_cancelled": self.loads_that("cancelled"),
            "read_bytes": self.read_bytes,
            "delivered_bytes": self.delivered_bytes,
            "verified_bytes": self.verified_bytes,
            "stage_hits": self.stage_hits,
            "stage_misses": self.stage_misses,
            "evictions": self.evictions,
        }

    def closed_connection(self, reason: str) -> None:
        """The gate closed a connection."""
        self.connections_closed[reason] += 1

    def observe_read(self, source: str, seconds: float) -> None:
        """One block has been read."""
        self.read_seconds[source].observe(seconds)
