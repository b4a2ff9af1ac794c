"""The daemons of `fleet.py`, their store, and what was counted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks import fleet_formulas, fleet_store, make_checkpoint
from benchmarks.daemons import Daemon, wait_until
from benchmarks.fleet_formulas import Checkpoint, Count
from benchmarks.fleet_store import FleetStore, Request
from benchmarks.objects import BUCKET


@dataclass(frozen=True, slots=True)
class Fleet:
    """Daemons that read one checkpoint from one store."""

    store: FleetStore
    nodes: int
    directory: Path
    """Of the checkpoint, below `make_checkpoint.DATA_DIR`."""
    checkpoint: Checkpoint
    block_bytes: int
    rate_bytes: float
    temporary: Path
    rows: list[list[str]] = field(default_factory=list)
    """Of the table."""
    broken: list[str] = field(default_factory=list)
    """The formulas that did not hold."""

    @property
    def uri(self) -> str:
        return f"s3://{BUCKET}/{self.directory.relative_to(make_checkpoint.DATA_DIR)}/"

    @property
    def total_bytes(self) -> int:
        return sum(file.size_bytes for file in self.checkpoint.files)

    @contextlib.contextmanager
    def started(
        self, *flags: str, proxy: str = "", tiers: bool = False, warmed_up: bool = True
    ) -> Iterator[list[Daemon]]:
        """A daemon for each node. They load a small checkpoint, as they import boto3 for that; afterwards the
        store forgets what was asked."""
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(self.nodes) as threads:

            def start(node: int) -> Daemon:
                daemon = self._daemon(node, *flags, proxy=proxy, tiers=tiers)
                daemon.__enter__()
                stack.push(daemon)
                if warmed_up:
                    daemon.wait_until_populated()
                    daemon.prefetch(f"s3://{BUCKET}/{_small().name}")
                    daemon.evict()
                return daemon

            daemons = list(threads.map(start, range(self.nodes)))
            if warmed_up:
                self.store.reset()
            yield daemons

    def load(self, daemons: Sequence[Daemon]) -> float:
        """All daemons stage the checkpoint at the same moment. Returns the seconds until all have it."""
        together = threading.Barrier(len(daemons))

        def prefetch(daemon: Daemon) -> None:
            together.wait()
            daemon.prefetch(self.uri)

        begin = time.perf_counter()
        with ThreadPoolExecutor(len(daemons)) as threads:
            list(threads.map(prefetch, daemons))
        return time.perf_counter() - begin

    def wait_until_kept(self, daemons: Sequence[Daemon]) -> None:
        """Until the tiers, which were empty, have everything."""
        all_bytes = self.total_bytes + self.checkpoint.index_bytes + _small().stat().st_size

        def kept() -> bool:
            return all(daemon.status()["tier"]["written_bytes"] >= all_bytes for daemon in daemons)

        wait_until(kept, "the tiers to be written")

    def wait_until_served(self, body_bytes: int, what: str) -> None:
        """Until the store has sent so many bytes of objects since it was reset."""
        wait_until(lambda: fleet_store.count(self.store.requests()).body_bytes >= body_bytes, what)

    def compare(
        self,
        what: str,
        formula: Count,
        requests: Sequence[Request],
        seconds: float | None = None,
        *,
        fewer_bytes: int = 0,
    ) -> None:
        """Adds a row. Notes it if the formula does not hold, of which the bytes may be so many fewer.
        `seconds` is the time in which all nodes had everything."""
        counted = fleet_store.count(requests)
        least = fleet_formulas.least_seconds(counted.body_bytes, self.rate_bytes)
        self.rows.append(
            [
                what,
                *(f"{count.lists} / {count.heads} / {count.gets}" for count in (formula, counted)),
                *(f"{count.body_bytes / 1e6:.1f}" for count in (formula, counted)),
                "" if seconds is None else f"{least:.1f}",
                "" if seconds is None else f"{seconds:.1f}",
            ]
        )
        missing = formula.body_bytes - counted.body_bytes
        self.expect(
            replace(counted, body_bytes=formula.body_bytes) == formula and 0 <= missing <= fewer_bytes,
            f"{what}: {formula} by the formula, {counted} counted",
        )
        if seconds is not None:
            self.expect(seconds >= least, f"{what}: {seconds:.2f} s, and the store alone needs {least:.2f} s")

    def expect(self, holds: bool, what: str) -> None:
        if not holds:
            self.broken.append(what)

    def _daemon(self, node: int, *flags: str, proxy: str, tiers: bool) -> Daemon:
        limit = ("--memory-limit", str(self.total_bytes * 5 // 4 + (64 << 20)))
        block = ("--object-block-size", str(self.block_bytes))
        if tiers:
            flags += ("--tier-dir", str(self.temporary / f"tier-{node}"))
            flags += ("--tier-limit", str(4 * self.total_bytes))
        environment = self.store.environment(node, proxy)
        return Daemon(*limit, *block, *flags, environment=environment, poll_seconds=0.1)


def _small() -> Path:
    return make_checkpoint.small_checkpoint(10)


Scenario = Callable[[Fleet], None]
