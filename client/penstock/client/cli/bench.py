"""`penstock bench`: how fast a source can be read here, by connections and block size.

Each measurement starts a private daemon with its own flags, and one load, which ends when its share of the
seconds or of the bytes is used up. A private daemon reads with the rights and the credentials of the caller,
so nothing is read that the caller could not read.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .. import errors
from ..client import StreamerClient
from ..ring.progress import Bar
from ..system.sizes import show_bytes

MIB = 1 << 20
CONNECTIONS = (4, 16, 32, 64)
BLOCK_BYTES = (8 * MIB, 32 * MIB)
ENOUGH = 0.95
"""A setting that reaches so much of the fastest one is as good. The smallest such setting is advised."""
BUSY = 0.85
"""If so much of the cores is busy, the cores are the bound."""
STEP = 1.15
"""If the most connections are so much faster than fewer, even more connections would be faster still."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    connections: int
    block_bytes: int
    read_bytes: int
    seconds: float
    cpu_seconds: float
    """Cores that the daemon and this process kept busy."""

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.read_bytes / self.seconds if self.seconds > 0 else 0.0


def bench(
    sources: Sequence[str], *, seconds: float, most_bytes: int, memory_limit: int | str, progress: bool
) -> None:
    """Prints the table and the advice. Raises ValueError for bounds that leave nothing to measure, and
    PenstockError where the sources cannot be read."""
    if seconds <= 0 or most_bytes <= 0:
        raise ValueError("--seconds and --bytes leave nothing to measure: give both more than 0")
    settings = [(connections, size) for size in BLOCK_BYTES for connections in CONNECTIONS]
    bar = Bar("bench") if progress else None
    rows: list[Row] = []
    try:
        left_seconds, left_bytes = seconds, most_bytes
        for number, (connections, block_bytes) in enumerate(settings):
            share = len(settings) - number
            row = measure(
                sources,
                connections,
                block_bytes,
                seconds=left_seconds / share,
                most_bytes=left_bytes // share,
                memory_limit=memory_limit,
            )
            rows.append(row)
            left_seconds, left_bytes = left_seconds - row.seconds, left_bytes - row.read_bytes
            if bar is not None:
                bar.show(most_bytes - left_bytes, most_bytes)
    finally:
        if bar is not None:
            bar.close()
    print("\n".join(table(rows)))
    print(advice(rows, objects="://" in sources[0] and not sources[0].startswith("file://")))


def measure(
    sources: Sequence[str],
    connections: int,
    block_bytes: int,
    *,
    seconds: float,
    most_bytes: int,
    memory_limit: int | str,
) -> Row:
    """Reads from the beginning until the seconds or the bytes are used up, or all is read."""
    flags: dict[str, Any] = {
        "concurrency": connections,
        "block_size": block_bytes,
        "object_concurrency": connections,
        "object_block_size": block_bytes,
        "http_address": "none",
    }
    with StreamerClient.embedded(memory_limit, **flags) as client:
        status = client.status()
        deadline = time.monotonic() + seconds
        while status["staging"]["populating"] and time.monotonic() < deadline:
            time.sleep(0.05)  # fresh pages would be measured, and not the store
            status = client.status()
        began, cpu = time.monotonic(), _cpu_seconds(status["pid"])
        delivered = 0
        with client.load(list(sources), memory_limit=memory_limit, owned=False) as load:
            for _, tensor in load:
                delivered += tensor.nbytes
                if delivered >= most_bytes or time.monotonic() - began >= seconds:
                    break
        took = time.monotonic() - began
        return Row(connections, block_bytes, delivered, took, _cpu_seconds(status["pid"]) - cpu)


def _cpu_seconds(pid: int) -> float:
    """CPU time of that process and of this one. Raises DaemonUnavailableError."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError as error:
        raise errors.DaemonUnavailableError(
            f"the private daemon, pid {pid}, went away while it was measured ({error.strerror}); see its log"
        ) from error
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + time.process_time()


def table(rows: Sequence[Row]) -> list[str]:
    """Lines for a terminal."""
    lines = [f"{'connections':>11}  {'block':>9}  {'read':>10}  {'seconds':>8}  {'GB/s':>6}  {'cores':>5}"]
    for row in rows:
        cores = row.cpu_seconds / row.seconds if row.seconds > 0 else 0.0
        lines.append(
            f"{row.connections:>11}  {show_bytes(row.block_bytes):>9}  {show_bytes(row.read_bytes):>10}  "
            f"{row.seconds:>8.2f}  {row.rate / 1e9:>6.2f}  {cores:>5.1f}"
        )
    return lines


def advice(rows: Sequence[Row], *, objects: bool, cores: int | None = None) -> str:
    """The flags to use, and what bounds the speed. `cores` are those that this process may use."""
    cores = cores or len(os.sched_getaffinity(0))
    best = max(rows, key=lambda row: row.rate)
    good = [row for row in rows if row.rate >= ENOUGH * best.rate]
    chosen = min(good, key=lambda row: (row.connections, row.block_bytes))
    most = max(row.connections for row in rows)
    fewer = max((row.rate for row in rows if row.connections < most), default=0.0)
    if chosen.cpu_seconds >= BUSY * cores * chosen.seconds:
        bound = f"bound by the {cores} cores of this node"
    elif chosen.connections == most and best.rate >= STEP * fewer:
        bound = f"bound by the connections, at {chosen.rate / most / 1e6:.0f} MB/s each: try more of them"
    else:
        bound = "bound by the store or the way to it: more connections bring nothing"
    prefix = "--object-" if objects else "--"
    block = f"{chosen.block_bytes // MIB}MiB"
    return (
        f"use penstockd {prefix}concurrency {chosen.connections} {prefix}block-size {block}: "
        f"{chosen.rate / 1e9:.2f} GB/s, {bound}"
    )
