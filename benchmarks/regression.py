"""The scenario of an earlier commit: compares daemon and client of this tree with those of another checkout.

    git worktree add /tmp/before COMMIT
    make bench ARGS="--only before --before /tmp/before"

Both take turns within one run, on the same files. So the ratio is good on a machine whose speed varies. On a
machine that does other work, CPU time is more reliable than the clock.
"""

import contextlib
import os
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import make_checkpoint, measure, report, system
from benchmarks.daemons import Daemon, clean_environment
from benchmarks.report import Run
from benchmarks.runner import ONE_GB, Runner, compare_checksums, files_of, tell_run

_CONTENDER = "penstock-1gb-views"
_NOW, _BEFORE = "this commit", "before"


@dataclass(frozen=True, slots=True)
class _Side:
    """One of the two checkouts, with its daemon of one round."""

    daemon: Daemon
    environment: dict[str, str]

    def run(self, files: list[str]) -> Run:
        cpu_before = self.daemon.cpu_seconds()
        flags = ("--socket-dir", self.daemon.socket_dir)
        measurement = measure.run(_CONTENDER, files, *flags, environment=self.environment)
        return Run(measurement, self.daemon.cpu_seconds() - cpu_before)


def before(runner: Runner) -> None:
    if runner.before is None:
        raise SystemExit(
            "--only before: there is no checkout to compare with; add --before CHECKOUT, the root of a "
            "checkout of the other commit"
        )
    llama = make_checkpoint.llama_checkpoint(runner.size_bytes)
    small = make_checkpoint.small_checkpoint(runner.small_tensors)
    rows = [
        _compare(runner, "page cache warm", llama, system.fill_page_cache),
        _compare(runner, "disk cold", llama, system.drop_page_cache),
        _compare(runner, f"{runner.small_tensors:,} small tensors", small, system.fill_page_cache),
    ]
    head = [
        "seconds, a window of 1 GB, views",
        _NOW,
        _BEFORE,
        "mean time now / before",
        "daemon CPU seconds",
        "now / before",
        "client CPU seconds",
        "now / before",
        "CPU seconds of both",
        "now / before",
    ]
    note = f"Before: commit {system.commit(runner.before)}."
    runner.publish_lines("before", [note, "", *report.markdown_table(head, rows)])


def _compare(runner: Runner, what: str, path: Path, prepare: Callable[[list[str]], None]) -> list[str]:
    assert runner.before is not None
    runs: dict[str, list[Run]] = {_NOW: [], _BEFORE: []}
    checkouts = {_NOW: system.ROOT, _BEFORE: runner.before}
    names = list(checkouts)
    for number in range(runner.rounds):
        # Each round has new daemons, and the other one starts first. With the same code, the one that starts
        # first takes up to 1.4 times as long, as its memory comes from other pages of the host.
        order = names if number % 2 == 0 else names[::-1]
        with contextlib.ExitStack() as stack:
            sides = {name: stack.enter_context(_side(checkouts[name])) for name in order}
            for name in order:
                sides[name].run(files_of(path))  # for imports, headers, and the first use of fresh pages
            for name in (*order, *order[::-1]):
                prepare(files_of(path))
                runs[name].append(sides[name].run(files_of(path)))
                tell_run(f"{what}, {name}", runs[name])
    compare_checksums({_CONTENDER: [run for rounds in runs.values() for run in rounds]})
    seconds = {name: [run.measurement.last_seconds for run in rounds] for name, rounds in runs.items()}
    daemon = {name: [run.daemon_cpu_seconds for run in rounds] for name, rounds in runs.items()}
    client = {name: [run.measurement.cpu_seconds for run in rounds] for name, rounds in runs.items()}
    both = {name: [sum(pair) for pair in zip(daemon[name], client[name], strict=True)] for name in runs}
    return [
        what,
        report.spread(seconds[_NOW], 3),
        report.spread(seconds[_BEFORE], 3),
        f"{statistics.mean(seconds[_NOW]) / statistics.mean(seconds[_BEFORE]):.2f}",
        *_medians(daemon),
        *_medians(client),
        *_medians(both),
    ]


def _medians(cpu_seconds: dict[str, list[float]]) -> tuple[str, str]:
    """Both medians, and their ratio. A median ignores single runs that were disturbed."""
    now, earlier = (statistics.median(cpu_seconds[name]) for name in (_NOW, _BEFORE))
    return f"{now:.3f}, before {earlier:.3f}", f"{now / earlier:.2f}" if earlier else "-"


@contextlib.contextmanager
def _side(checkout: Path) -> Iterator[_Side]:
    """Runs the code of a checkout, whatever is installed."""
    roots = [str(checkout / part) for part in ("proto", "client", "server")]
    path = {"PYTHONPATH": os.pathsep.join(roots)}
    with Daemon("--memory-limit", str(ONE_GB), environment=path) as daemon:
        daemon.wait_until_populated()
        yield _Side(daemon, clean_environment() | path)
