"""Scenarios in which a daemon serves several processes: at once, one after the other, or from a queue."""

import contextlib
import sys
import tempfile
from pathlib import Path

from benchmarks import arrivals, crowd, make_checkpoint, report, system
from benchmarks.contenders import CONTENDERS
from benchmarks.crowd import CrowdRun, Setup
from benchmarks.daemons import Daemon
from benchmarks.report import Run
from benchmarks.runner import (
    ONE_GB,
    ChecksumError,
    Runner,
    checkpoint_bytes,
    compare_checksums,
    compare_measurements,
    files_of,
    started,
    tell,
    tell_run,
)

_CLIENTS_AT_ONCE = 2


def node(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    setups = [setup for setup in crowd.SETUPS if setup.contender in runner.contenders and _fits(setup, path)]
    seldom = {setup for setup in setups if not CONTENDERS[setup.contender].daemon}
    runs: dict[Setup, list[CrowdRun]] = {setup: [] for setup in setups}
    for setup in runner.turns(setups, seldom):
        system.fill_page_cache(files_of(path))
        with contextlib.ExitStack() as stack:
            # Each run has a new daemon, which has read nothing.
            kind = CONTENDERS[setup.contender].daemon
            daemon = stack.enter_context(started(kind, path)) if kind else None
            runs[setup].append(crowd.run(setup, files_of(path), daemon))
        tell(setup.label, len(runs[setup]), runs[setup][-1].seconds)
    compare_measurements(
        {setup.label: [m for run in runs[setup] for m in run.measurements] for setup in setups}
    )
    runner.publish_lines("node", crowd.lines(runs))


def warm10(runner: Runner) -> None:
    needed = runner.staged_bytes * 21 // 20 + 2 * ONE_GB
    if system.available_bytes() < needed:
        print(
            f"warm10 left out: it needs {needed / 1e9:.1f} GB of memory, "
            f"{system.available_bytes() / 1e9:.1f} GB are available",
            file=sys.stderr,
        )
        return
    path = make_checkpoint.llama_checkpoint(runner.staged_bytes)
    name = "penstock-full"
    # The right checksum, and another loader whose bytes are in the page cache, to compare with.
    system.drop_page_cache(files_of(path))
    runs = {"safetensors-load": [runner.run("safetensors-load", path, {})], name: []}
    untouched: dict[str, list[Run]] = {name: [], "safetensors-load": []}
    system.drop_page_cache(files_of(path))
    with runner.daemons([name], path) as daemons:
        daemon = daemons["roomy"]
        prefetch_seconds = daemon.prefetch(path)
        for _ in range(runner.rounds):
            for each in untouched:
                untouched[each].append(runner.run(each, path, daemons, "--hold", "--untouched"))
                tell(
                    f"{each} untouched",
                    len(untouched[each]),
                    untouched[each][-1].measurement.last_seconds,
                )
            runs[name].append(runner.run(name, path, daemons, "--hold"))
            tell_run(name, runs[name])
        status = daemon.status()
    compare_checksums(runs)
    data_bytes = runs[name][0].measurement.size_bytes
    rows = [
        [what, report.spread([getattr(run.measurement, field) for run in measured], 4), target]
        for what, measured, field, target in (
            ("load() to first tensor", untouched[name], "first_seconds", "0.05"),
            ("load() to all tensors wrapped, all kept", untouched[name], "last_seconds", "0.3"),
            ("load() to all tensors touched, all kept", runs[name], "last_seconds", ""),
            (
                "safetensors load_file to all tensors wrapped",
                untouched["safetensors-load"],
                "last_seconds",
                "",
            ),
        )
    ]
    loads = len(untouched[name]) + len(runs[name])
    lines = [
        f"{data_bytes / 1e9:.2f} GB in {runs[name][0].measurement.tensors} tensors, prefetched in "
        f"{prefetch_seconds:.1f} s into a limit of {status['staging']['limit_bytes'] / 1e9:.1f} GB. "
        "Every load runs in a new process.",
        "",
        *report.markdown_table(["seconds", "median (range)", "target"], rows),
        "",
        f"- Read from the file for the prefetch and {loads} loads: "
        f"{status['totals']['read_bytes'] / data_bytes:.6f} times the bytes of its tensors",
    ]
    runner.publish_lines("warm10", lines)


def queue(runner: Runner) -> None:
    paths = make_checkpoint.different_checkpoints(runner.clients, 40_000_000)
    files = [str(path) for path in paths]
    slab_bytes = 2 << 20
    # Room for two checkpoints, each with its share of a slab and of alignment, and not for a third.
    limit = _CLIENTS_AT_ONCE * (paths[0].stat().st_size // slab_bytes + 2) * slab_bytes
    orders, singles, daemon_cpu, peaks, summed = [], [], [], [], set()
    for _ in range(runner.rounds):
        system.fill_page_cache(files)
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as directory:
            log = Path(directory, "log")
            with Daemon("--memory-limit", str(limit), log=log) as daemon:
                daemon.wait_until_populated()
                singles.append(arrivals.median_seconds(arrivals.run(paths[:8], daemon, one_by_one=True)))
                cpu_before = daemon.cpu_seconds()
                crowd_arrivals = arrivals.run(paths, daemon)
                daemon_cpu.append(daemon.cpu_seconds() - cpu_before)
                peaks.append(daemon.status()["staging"]["peak_bytes"])
            orders.append(arrivals.order(crowd_arrivals, log, at_once=_CLIENTS_AT_ONCE))
        summed.add(sum(arrival.checksum for arrival in crowd_arrivals))
        tell(f"{runner.clients} clients", len(orders), orders[-1].seconds)
    summed.add(runner.run("safetensors-load", paths[0].parent, {}, files=files).measurement.checksum)
    if len(summed) > 1:
        raise ChecksumError(f"queue: different sums of the same files: {summed}")
    text = (
        f"{runner.clients} processes load at the same moment, each another checkpoint of "
        f"{paths[0].stat().st_size / 1e6:.0f} MB. The page cache is warm. The limit of {limit / 1e6:.1f} MB "
        "fits two checkpoints. Clients took the times."
    )
    runner.publish_lines("queue", [text, "", *arrivals.lines(orders, singles, daemon_cpu, peaks)])


def _fits(setup: Setup, path: Path) -> bool:
    """Whether the processes' own copies fit into memory beside the page cache."""
    copies = setup.processes if setup.hold and setup.contender.startswith("runai") else 0
    needed = (copies + 1) * checkpoint_bytes(path) + ONE_GB
    if system.available_bytes() >= needed:
        return True
    print(f"{setup.label} left out: it needs {needed / 1e9:.1f} GB of memory", file=sys.stderr)
    return False
