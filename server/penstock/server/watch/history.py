"""The last minutes, for people: throughput, rates, errors. All of it bounded."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass

from ..errors import PenstockError
from ..loads.running import Running
from ..system.shown import cut, encodable, shown_sources

INTERVAL_SECONDS = 1.0
SAMPLES = 300
RATE_SAMPLES = 5
"""Intervals of a rate: the rate of one interval changes too fast to be read."""
ERRORS = 50


@dataclass(frozen=True, slots=True)
class Failure:
    """One request that was answered with an error. The time is of the monotonic clock."""

    when: float
    load_id: str
    reason: str
    message: str
    uid: int
    pid: int
    sources: tuple[str, ...]


class History:
    """Used on the event loop; `keep` samples for ever."""

    def __init__(self) -> None:
        self.read_bytes: deque[int] = deque(maxlen=SAMPLES)
        self.delivered_bytes: deque[int] = deque(maxlen=SAMPLES)
        self.failures: deque[Failure] = deque(maxlen=ERRORS)
        self._last = (0, 0)
        self._delivered: dict[Running, deque[int]] = {}

    def sample(self, read_bytes: int, delivered_bytes: int, loads: Collection[Running]) -> None:
        """To be called once an interval, with the totals since the start and the loads that run."""
        self.read_bytes.append(read_bytes - self._last[0])
        self.delivered_bytes.append(delivered_bytes - self._last[1])
        self._last = read_bytes, delivered_bytes
        fresh: deque[int] = deque(maxlen=RATE_SAMPLES + 1)
        self._delivered = {load: self._delivered.get(load, fresh.copy()) for load in loads}
        for load, samples in self._delivered.items():
            samples.append(load.delivered_bytes)

    def read_rate(self) -> float:
        """Bytes a second from storage."""
        latest = list(self.read_bytes)[-RATE_SAMPLES:]
        return sum(latest) / (len(latest) * INTERVAL_SECONDS) if latest else 0.0

    def load_rate(self, load: Running) -> float:
        """Bytes a second that a load delivered in the last intervals, or since it began."""
        samples = self._delivered.get(load)
        if samples is None or len(samples) <= RATE_SAMPLES:
            age = asyncio.get_running_loop().time() - load.began
            return load.delivered_bytes / age if age > 0 else 0.0
        return (samples[-1] - samples[0]) / (RATE_SAMPLES * INTERVAL_SECONDS)

    def failed(
        self, error: PenstockError, *, uid: int, pid: int, load_id: str = "", sources: tuple[str, ...] = ()
    ) -> None:
        self.failures.appendleft(
            Failure(
                time.monotonic(),
                load_id,
                error.reason,
                cut(encodable(error.message)),
                uid,
                pid,
                tuple(shown_sources(sources)),
            )
        )
