"""Measures the cost of comparing bytes with checksums: `--verify off`, `--verify auto`, and a SHA-256 of the
caller, in turns.

    python -m benchmarks.verification [--size-mb 512] [--rounds 5] [--store gcs]

The servers are those of `benchmarks.stores`, and keep CRC32C (GCS) and CRC64NVME (S3). A daemon only stages
(`prefetch`), into memory that was written to before. CPU seconds are the daemon's, from /proc.

Each store is measured twice. First its server has half of the cores and the daemon the others: a store is
another machine. Then both share all cores, so that the server lacks each second that the daemon computes.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import statistics
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import safetensors.torch
import torch

from benchmarks.stores import BLOCK_BYTES, CONNECTIONS, STORES, Stored
from penstock.client import StreamerClient


@dataclass(frozen=True, slots=True)
class Run:
    seconds: float
    cpu_seconds: float


class Contender:
    """A daemon that verifies in one way."""

    def __init__(self, stored: Stored, size_bytes: int, verify: str, sha256: str = "") -> None:
        self._uri = stored.uri
        self._digests = {stored.uri: sha256} if sha256 else None
        self._client = StreamerClient.embedded(
            size_bytes * 5 // 4 + (256 << 20),
            environment={**stored.environment, "NO_PROXY": "127.0.0.1"},
            object_concurrency=CONNECTIONS,
            object_block_size=BLOCK_BYTES,
            verify=verify,
        )
        self._pid = self._client.status()["pid"]

    def run(self) -> Run:
        self._client.evict(self._uri)
        cpu, began = self._cpu_seconds(), time.perf_counter()
        self._client.prefetch(self._uri, digests=self._digests)
        return Run(time.perf_counter() - began, self._cpu_seconds() - cpu)

    def verified_bytes(self) -> int:
        count: int = self._client.status()["totals"]["verified_bytes"]
        return count

    def close(self) -> None:
        self._client.close()

    def _cpu_seconds(self) -> float:
        with open(f"/proc/{self._pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """Processes that are started meanwhile run on these only."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def measured(name: str, content: bytes, rounds: int, *, apart: bool) -> list[str]:
    """Rows of the table. `apart`: the server has half of the cores, and the daemons have the others."""
    cores = sorted(os.sched_getaffinity(0))
    half = len(cores) // 2
    theirs, ours = (cores[:half], cores[half:]) if apart else (cores, cores)
    with contextlib.ExitStack() as stack:
        with on_cores(theirs):
            stored = stack.enter_context(STORES[name](content))
        with on_cores(ours):
            return compared(stored, content, rounds, "apart" if apart else "shared")


def compared(stored: Stored, content: bytes, rounds: int, cores: str) -> list[str]:
    """Rows of the table: medians over the rounds, and ratios within rounds."""
    ways = {"off": ("off", ""), "auto": ("auto", ""), "SHA-256": ("off", hashlib.sha256(content).hexdigest())}
    with contextlib.ExitStack() as stack:
        contenders = {
            name: stack.enter_context(contextlib.closing(Contender(stored, len(content), *way)))
            for name, way in ways.items()
        }
        for one in contenders.values():
            one.run()
        runs: dict[str, list[Run]] = {name: [] for name in contenders}
        for number in range(rounds):
            names = list(contenders) if number % 2 else list(reversed(contenders))
            first = number // 2 % len(names)  # each has each place, and each neighbour
            for name in names[first:] + names[:first]:
                runs[name].append(contenders[name].run())
        for name, one in contenders.items():
            assert one.verified_bytes() == (0 if name == "off" else (rounds + 1) * len(content)), name
    rows = []
    for name, mine in runs.items():
        slower = [run.seconds / base.seconds - 1 for run, base in zip(mine, runs["off"], strict=True)]
        more = [run.cpu_seconds - base.cpu_seconds for run, base in zip(mine, runs["off"], strict=True)]
        rate = len(content) / statistics.median(run.seconds for run in mine) / 1e9
        rows.append(
            f"| {stored.name} | {cores} | {name} | {rate:.2f} | {statistics.median(slower):+.1%} | "
            f"{statistics.median(more) / len(content) * 1e9:+.2f} |"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the cost of comparing bytes with checksums.")
    parser.add_argument("--size-mb", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--store", choices=("gcs", "s3"), action="append", help="only this one; repeatable")
    options = parser.parse_args()
    tensors = {f"t{number}": torch.rand(1 << 20) for number in range(max(1, options.size_mb // 4))}
    content = safetensors.torch.save(tensors)
    print(f"{len(content) / 1e6:.0f} MB, {options.rounds} rounds; medians, differences within rounds\n")
    print("| store | cores | verify | GB/s | seconds more | CPU s a GB more |\n|---|---|---|---|---|---|")
    for name in options.store or ("gcs", "s3"):
        for apart in (True, False):
            print("\n".join(measured(name, content, options.rounds, apart=apart)), flush=True)


if __name__ == "__main__":
    main()
