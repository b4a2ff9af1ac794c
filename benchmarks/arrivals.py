"""Many client processes at once, each with a checkpoint of its own, and the order in which they are served.

    python -m benchmarks.arrivals --socket-dir DIR PATH...

A process that has imported torch forks a client for each path. All clients load at the same moment, or one
after the other with `--one-by-one`. The program prints a JSON list of `Arrival`. Times are on the clock that
all processes of a machine share.
"""

import argparse
import dataclasses
import datetime
import importlib
import json
import logging
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: modules are found as with -m in the root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import report
from benchmarks.daemons import Daemon, clean_environment
from benchmarks.measure import touch


@dataclass(frozen=True, slots=True)
class Arrival:
    """One client's load."""

    load_id: str
    # Before load(); when it returned and the load had its memory; when the client held nothing any more.
    asked_at: float
    admitted_at: float
    finished_at: float
    tensors: int
    size_bytes: int
    checksum: int
    # In the queue, as the daemon reported them.
    places: list[int]


@dataclass(frozen=True, slots=True)
class Order:
    """The order in which a crowd of clients was served."""

    clients: int
    # From the first request to the end of the last load.
    seconds: float
    # The largest distance between a client's turn and its admission. The turn is taken from the order in
    # which the daemon began the calls, and from the order in which it queued them, after reading headers.
    most_places_from_call: int
    most_places_from_queue: int
    # Clients whose reported place got worse.
    fell_back: int
    longest_queue: int
    # From the end of a load to the admission of the next. That memory was unused while others waited.
    handovers: list[float]
    # Messages that reported a place to a client.
    places_told: int


def run(paths: Sequence[Path], daemon: Daemon, *, one_by_one: bool = False) -> list[Arrival]:
    command = [sys.executable, __file__, "--socket-dir", daemon.socket_dir, *map(str, paths)]
    command += ["--one-by-one"] if one_by_one else []
    finished = subprocess.run(
        command,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Arrival(**arrival) for arrival in json.loads(finished.stdout.splitlines()[-1])]


def order(arrivals: Sequence[Arrival], log: Path, *, at_once: int) -> Order:
    """`at_once` loads fit into the daemon's memory; `log` is the daemon's log."""
    called, queued = _daemon_order(log)
    admitted = [a.load_id for a in sorted(arrivals, key=lambda a: a.admitted_at)]
    ended = sorted(a.finished_at for a in arrivals)
    began = sorted(a.admitted_at for a in arrivals)
    return Order(
        clients=len(arrivals),
        seconds=ended[-1] - min(a.asked_at for a in arrivals),
        most_places_from_call=_most_places(admitted, called),
        most_places_from_queue=_most_places(admitted, queued),
        fell_back=sum(a.places != sorted(a.places, reverse=True) for a in arrivals),
        longest_queue=max((max(a.places, default=0) for a in arrivals), default=0),
        handovers=[start - end for start, end in zip(began[at_once:], ended, strict=False)],
        places_told=sum(len(a.places) for a in arrivals),
    )


def lines(
    orders: Sequence[Order], singles: Sequence[float], daemon_cpu: Sequence[float], peaks: Sequence[int]
) -> list[str]:
    """A table over the rounds. `singles` are the seconds of one client alone, `daemon_cpu` the CPU seconds of
    the daemon while it served all clients, `peaks` the peaks of the staging buffer in bytes."""
    clients = orders[0].clients
    seconds = [order.seconds for order in orders]
    alone = [single * clients for single in singles]

    def milliseconds(choose: Callable[[Sequence[float]], float]) -> str:
        return report.spread([choose(order.handovers) * 1e3 for order in orders], 1)

    rows = [
        ["clients that finished with the right bytes", f"{clients}", f"{clients}"],
        *(
            [what, report.spread([getattr(order, field) for order in orders], 0), target]
            for what, field, target in (
                ("most places from its turn in the daemon's queue", "most_places_from_queue", "1"),
                ("most places from the turn of its call", "most_places_from_call", ""),
                ("clients whose reported place got worse", "fell_back", "0"),
                ("longest queue", "longest_queue", ""),
            )
        ),
        [
            "messages that reported a place to a client",
            report.spread([order.places_told for order in orders], 0),
            "",
        ],
        ["CPU seconds of the daemon", report.spread(daemon_cpu), ""],
        ["seconds until all had finished", report.spread(seconds), ""],
        ["seconds of one client alone", report.spread(singles, 3), ""],
        [f"all clients / {clients} times one client alone", report.ratios(seconds, alone), ""],
        ["from the end of one load to memory for the next, median, ms", milliseconds(statistics.median), ""],
        ["the same, longest, ms", milliseconds(max), ""],
        ["peak of the staging buffer, MB", f"{max(peaks) / 1e6:.1f}", ""],
    ]
    return report.markdown_table(["", "median (range)", "target"], rows)


def median_seconds(arrivals: Sequence[Arrival]) -> float:
    return statistics.median(a.finished_at - a.asked_at for a in arrivals)


def _daemon_order(log: Path) -> tuple[list[str], list[str]]:
    """Ids of loads: in the order in which their calls began, and in the order of the queue."""
    called, queued = {}, {}
    for line in log.read_text().splitlines():
        entry = json.loads(line)
        if entry["event"] == "load":
            ended = datetime.datetime.fromisoformat(entry["time"].rstrip("Z"))
            called[entry["load"]] = ended - datetime.timedelta(seconds=entry["seconds"])
            # Stages are numbered as they enter the queue.
            queued[entry["load"]] = entry["stage"]
    return sorted(called, key=called.__getitem__), sorted(queued, key=queued.__getitem__)


def _most_places(ids: Sequence[str], others: Sequence[str]) -> int:
    others = [other for other in others if other in set(ids)]
    return max(abs(number - others.index(load_id)) for number, load_id in enumerate(ids))


class _Places(logging.Handler):
    """Collects the places that the client logs while it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[int] = []

    def emit(self, record: logging.LogRecord) -> None:
        if told := re.search(r"waiting for staging memory, place (\d+)", record.getMessage()):
            self.places.append(int(told[1]))


def _client(socket_dir: str, path: str, start_fds: tuple[int, int], results: "SimpleQueue[Any]") -> None:
    from penstock.client import StreamerClient

    start, other_end = start_fds
    os.close(other_end)
    places = _Places()
    logger = logging.getLogger("penstock.client")
    logger.setLevel(logging.INFO)
    logger.addHandler(places)
    logger.propagate = False
    client = StreamerClient(socket_dir)
    client.status()  # the extra cost of a first call stays outside the clock
    results.put(None)
    os.read(start, 1)

    tensors = size_bytes = checksum = 0
    asked_at = time.monotonic()
    with client.load(path) as load:
        admitted_at = time.monotonic()
        for _, tensor in load:
            checksum += touch(tensor)
            tensors += 1
            size_bytes += tensor.nbytes
        del tensor
    finished_at = time.monotonic()
    results.put(
        Arrival(
            load.load_id, asked_at, admitted_at, finished_at, tensors, size_bytes, checksum, places.places
        )
    )


def _fork(socket_dir: str, paths: Sequence[str]) -> list[Arrival]:
    """Loads all paths at once."""
    context = multiprocessing.get_context("fork")
    results: SimpleQueue[Any] = context.SimpleQueue()
    # Closing the write end wakes all readers.
    start_fds = os.pipe()
    processes = [
        context.Process(target=_client, args=(socket_dir, path, start_fds, results), daemon=True)
        for path in paths
    ]
    for process in processes:
        process.start()
    os.close(start_fds[0])
    for _ in processes:
        _next(processes, results)
    os.close(start_fds[1])
    arrivals = [_next(processes, results) for _ in processes]
    for process in processes:
        process.join()
    return arrivals


def _next(processes: "Sequence[multiprocessing.process.BaseProcess]", results: "SimpleQueue[Any]") -> Any:
    while results.empty():
        if any(process.exitcode for process in processes):
            raise SystemExit("a client failed")
        time.sleep(0.01)
    return results.get()


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--socket-dir", required=True)
    parser.add_argument("--one-by-one", action="store_true")
    options = parser.parse_args(arguments)

    # Once for all clients: they are forked from here.
    import torch

    torch.set_num_threads(1)
    importlib.import_module("penstock.client.load")
    crowds = [[path] for path in options.paths] if options.one_by_one else [options.paths]
    arrivals = [arrival for paths in crowds for arrival in _fork(options.socket_dir, paths)]
    print(json.dumps([dataclasses.asdict(arrival) for arrival in arrivals]))


if __name__ == "__main__":
    main(sys.argv[1:])
