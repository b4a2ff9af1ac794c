"""Seconds in `load_weights` of vLLM on a CPU after a restart: with weights from S3, from the tier, from RAM.

    make .venv-engines/.stamp
    .venv-engines/bin/python -m benchmarks.restart [--size GB] [--rounds N] [--directory DIR]

The three take turns in every round, and each engine is a process of its own, forked by one that has imported
vLLM. For S3 and the tier a daemon is started first: without a tier, and with one that an earlier daemon
filled. RAM is a daemon that runs all the time and has the checkpoint warm: only the engine is restarted. The
store is nginx on the loopback, with the checkpoint in its page cache; the tier is read directly from the disk
of `--directory`. "after the daemon" counts from the start of the daemon on: it serves, and has populated its
buffer, before the engine loads. The first round does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.e2e.support import DaemonProcess, running_daemon
from tests.engines.real.conftest import Engines, penstock
from tests.engines.real.models import Model, write

from benchmarks.make_checkpoint import DATA_DIR
from benchmarks.objects import Near, ObjectServer

GB = 1e9
HTTP = ("--http-address", "127.0.0.1:0")
HIDDEN, INTERMEDIATE = 2048, 8192
LAYER_BYTES = 2 * (3 * HIDDEN**2 + 3 * HIDDEN * INTERMEDIATE)
WRITTEN_SECONDS = 600.0


@dataclass(slots=True)
class Rounds:
    """Seconds of each round, by where the weights came from."""

    loading: dict[str, list[float]] = field(default_factory=dict)
    restart: dict[str, list[float]] = field(default_factory=dict)

    def add(self, where: str, loading: float, restart: float) -> None:
        self.loading.setdefault(where, []).append(loading)
        self.restart.setdefault(where, []).append(restart)


class Node:
    """Daemons of one machine, one after the other, that load the same object."""

    def __init__(self, engines: Engines, model: Path, store: ObjectServer, directory: Path) -> None:
        (weights,) = model.glob("*.safetensors")
        self.size_bytes = weights.stat().st_size
        self._engines = engines
        self._model = model
        self._uri = store.uri(weights)
        self._environment = store.environment()
        self._directory = directory
        self._runs = 0
        self._memory = ("--memory-limit", f"{(self.size_bytes * 5 // 4 >> 20) + 64}MiB")
        self._tier = ("--tier-dir", str(directory / "tier"), "--tier-limit", str(2 * self.size_bytes))

    def fill_tier(self) -> None:
        with self._daemon(*self._tier) as daemon:
            self._stage(daemon)
            ends = time.monotonic() + WRITTEN_SECONDS
            while daemon.status()["tier"]["written_bytes"] < self.size_bytes:
                if time.monotonic() > ends:
                    raise TimeoutError(f"the tier was not written in {WRITTEN_SECONDS:.0f} s: {daemon.log()}")
                time.sleep(0.05)

    @contextlib.contextmanager
    def warm(self) -> Iterator[DaemonProcess]:
        with self._daemon() as daemon:
            self._stage(daemon)
            yield daemon

    def from_s3(self) -> tuple[float, float]:
        return self._restarted("storage")

    def from_tier(self) -> tuple[float, float]:
        return self._restarted("tier", *self._tier)

    def from_ram(self, daemon: DaemonProcess) -> tuple[float, float]:
        seconds = self._load(daemon, "memory")
        return seconds, seconds

    def _restarted(self, origin: str, *flags: str) -> tuple[float, float]:
        began = time.perf_counter()
        with self._daemon(*flags) as daemon:
            start_seconds = time.perf_counter() - began
            loading = self._load(daemon, origin)
        return loading, start_seconds + loading

    def _daemon(self, *flags: str) -> contextlib.AbstractContextManager[DaemonProcess]:
        return running_daemon(*self._memory, *HTTP, *flags, environment=self._environment)

    def _stage(self, daemon: DaemonProcess) -> None:
        with daemon.client() as client:
            client.prefetch(self._uri)

    def _load(self, daemon: DaemonProcess, origin: str) -> float:
        """Seconds in load_weights. Raises RuntimeError if the bytes came from elsewhere."""
        before = _delivered(daemon)
        self._runs += 1
        seconds: float = self._engines.run(
            self._model,
            penstock(daemon, source=self._uri),
            program="time_loading",
            store=str(self._directory / f"store {self._runs}"),
        )["seconds"]
        came = {where: count - before[where] for where, count in _delivered(daemon).items()}
        if came[origin] < 0.99 * sum(came.values()):
            raise RuntimeError(f"the weights came from elsewhere than {origin}: {came}; see {daemon.log()}")
        return seconds


def _delivered(daemon: DaemonProcess) -> dict[str, int]:
    """Bytes that the daemon delivered, by where they came from."""
    totals = daemon.status()["totals"]
    memory, tier = totals["memory_bytes"], totals["tier_bytes"]
    return {"memory": memory, "tier": tier, "storage": totals["delivered_bytes"] - memory - tier}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=float, default=4.0, metavar="GB", help="size of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds in which all three take turns (default: %(default)s)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(tempfile.gettempdir()),
        help="where the tier is written (default: %(default)s)",
    )
    options = parser.parse_args()
    layers = max(1, round(options.size * GB / LAYER_BYTES))
    model = DATA_DIR / f"restart-{layers}"  # below the directory that nginx serves
    engines = Engines()
    try:
        shutil.rmtree(model, ignore_errors=True)
        write(model, Model(hidden=HIDDEN, intermediate=INTERMEDIATE, layers=layers))
        with Near() as store, tempfile.TemporaryDirectory(dir=options.directory) as directory:
            node = Node(engines, model, store, Path(directory))
            print(f"{node.size_bytes / GB:.2f} GB, {os.cpu_count()} cores, {_load_average()}")
            print("\n".join(table(measure(node, options.rounds), node.size_bytes)))
            print(_load_average())
    finally:
        engines.close()
        shutil.rmtree(model, ignore_errors=True)


def measure(node: Node, count: int) -> Rounds:
    rounds = Rounds()
    node.fill_tier()
    with node.warm() as warm:
        places: dict[str, Callable[[], tuple[float, float]]] = {
            "S3": node.from_s3,
            "tier": node.from_tier,
            "RAM": lambda: node.from_ram(warm),
        }
        for number in range(count + 1):
            for where, load in places.items():
                loading, restart = load()
                print(f"round {number}, {where}: {loading:.2f} s, {restart:.2f} s", file=sys.stderr)
                if number:
                    rounds.add(where, loading, restart)
    return rounds


def table(rounds: Rounds, size_bytes: int) -> list[str]:
    shown = [
        "| weights from | seconds in load_weights (median) | each round | GB/s | after the daemon (median) |",
        "|---|---|---|---|---|",
    ]
    for where, seconds in rounds.loading.items():
        median = statistics.median(seconds)
        each = ", ".join(f"{one:.2f}" for one in seconds)
        restart = statistics.median(rounds.restart[where]) if where != "RAM" else None
        after = "" if restart is None else f"{restart:.2f}"
        shown.append(f"| {where} | {median:.2f} | {each} | {size_bytes / GB / median:.2f} | {after} |")
    return shown


def _load_average() -> str:
    return f"load average {os.getloadavg()[0]:.1f}"


if __name__ == "__main__":
    main()
