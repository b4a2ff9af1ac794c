"""Seconds in `load_weights` of vLLM on a CPU: with its own loader, Penstock cold and warm, Run:ai's streamer.

    make .venv-engines/.stamp
    .venv-engines/bin/python -m benchmarks.engines --help

Each load runs in a process of its own, which is forked by one that has imported vLLM. Loaders take turns in
every round. "cold" is a daemon without the checkpoint, "warm" one that has it. Files are in the page cache
each time. The second table shows how much of a mixture of experts two nodes read, with one rank each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tests.e2e.support import DaemonProcess, running_daemon
from tests.engines.real.conftest import Engines, auto, done, penstock
from tests.engines.real.models import Model, write

GB = 1e9
HTTP = ("--http-address", "127.0.0.1:0")
"""Each daemon takes a free port, so several can run side by side."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--size", type=float, default=1.2, metavar="GB", help="size of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds in which all loaders take turns (default: %(default)s)"
    )
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), help="where models are written (default: %(default)s)"
    )
    options = parser.parse_args()
    engines = Engines()
    try:
        with tempfile.TemporaryDirectory(dir=options.directory) as directory:
            measure_seconds(engines, Path(directory), options.size, options.rounds)
            measure_filters(engines, Path(directory))
    finally:
        engines.close()


def measure_seconds(engines: Engines, directory: Path, size_gb: float, rounds: int) -> None:
    model = directory / "model"
    hidden, intermediate = 2048, 8192
    layer_bytes = 2 * (3 * hidden**2 + 3 * hidden * intermediate)
    layers = max(1, round(size_gb * GB / layer_bytes))
    shape = Model(hidden=hidden, intermediate=intermediate, layers=layers, files=4)
    total_bytes = sum(tensor.nbytes for tensor in write(model, shape).values())
    limit = f"{total_bytes * 5 // 4 >> 20}MiB"
    seconds: dict[str, list[float]] = {}
    load_average = os.getloadavg()[0]
    print(f"{total_bytes / GB:.2f} GB, {os.cpu_count()} cores, load average {load_average:.1f} at the start")
    with running_daemon("--memory-limit", limit, *HTTP) as daemon:
        loaders: dict[str, Callable[[], dict[str, Any]]] = {
            "vLLM's own (auto)": auto,
            "penstock, cold": lambda: evicted(daemon),
            "penstock, warm": lambda: penstock(daemon),
            "Run:ai (runai_streamer)": lambda: {"load_format": "runai_streamer"},
        }
        for round_number in range(rounds + 1):
            for name, load in loaders.items():
                store = str(directory / f"store {name} {round_number}")
                took = engines.run(model, load(), program="time_loading", store=store)["seconds"]
                if round_number:  # the first round only fills the page cache
                    seconds.setdefault(name, []).append(took)
    print(f"\n| loader | seconds in load_weights, median of {rounds} | from, to |\n|---|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {statistics.median(each):.2f} | {min(each):.2f}, {max(each):.2f} |")
    print(f"\nload average {os.getloadavg()[0]:.1f} at the end")


def evicted(daemon: DaemonProcess) -> dict[str, Any]:
    daemon.wait_idle()
    with daemon.client() as client:
        client.evict()
    return penstock(daemon)


def measure_filters(engines: Engines, directory: Path) -> None:
    model = directory / "mixture"
    total_bytes = sum(tensor.nbytes for tensor in write(model, Model("mixtral", files=2)).values())
    print("\n| ranks on two nodes | GB that the nodes read | share of the model |\n|---|---|---|")
    for name, options in (
        ("tensor parallel", {"tensor_parallel_size": 2}),
        ("expert parallel", {"tensor_parallel_size": 2, "enable_expert_parallel": True}),
        ("pipeline parallel", {"pipeline_parallel_size": 2}),
    ):
        with (
            running_daemon("--memory-limit", "256MiB", *HTTP) as one,
            running_daemon("--memory-limit", "256MiB", *HTTP) as other,
        ):
            ranks = [
                engines.launch(
                    "load_as_rank", model, penstock(node), options, rank=rank, store=str(directory / name[:6])
                )
                for rank, node in enumerate((one, other))
            ]
            for rank in ranks:
                done(rank)
            read = [node.read_bytes() for node in (one, other)]
        shown = " and ".join(f"{count / GB:.4f}" for count in read)
        print(f"| {name} | {shown} | {' and '.join(f'{count / total_bytes:.0%}' for count in read)} |")


if __name__ == "__main__":
    main()
