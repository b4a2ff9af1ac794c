"""Runs contenders in turns with the daemons that they need, compares their checksums, and publishes tables.

A scenario is a function that takes a `Runner`. It makes a checkpoint, has contenders load it, each in a
process of its own (`measure.py`), and publishes tables.
"""

import contextlib
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benchmarks import make_checkpoint, measure, report, system
from benchmarks.contenders import CONTENDERS
from benchmarks.daemons import Daemon, clean_environment
from benchmarks.measure import Measurement
from benchmarks.objects import ObjectServer
from benchmarks.report import Group, Run

ONE_GB = 10**9
# Contenders that are slow, or matter less, are measured in no more rounds than this.
SELDOM_ROUNDS = 3
# The defaults of `--block-size`, `--object-block-size` and `--object-concurrency` of penstockd.
_BLOCK_BYTES = 8 << 20
_OBJECT_BLOCK_BYTES, _S3_CONNECTIONS = 32 << 20, 32
# A daemon loads so much from a server before it is measured, because it lives longer than a load.
_WARM_UP_BYTES = 50_000_000

_T = TypeVar("_T")


class ChecksumError(Exception):
    """Two contenders read different bytes from the same checkpoint."""


@dataclass(frozen=True, slots=True)
class Runner:
    """The options of the command line; runs contenders and publishes their measurements."""

    rounds: int
    # Sizes of three checkpoints: the usual one, the sparse one, and the one that is staged as a whole.
    size_bytes: int
    sparse_bytes: int
    staged_bytes: int
    small_tensors: int
    # Clients in the queue.
    clients: int
    # Names of the contenders that may be measured.
    contenders: Collection[str]
    write_page: bool
    # A checkout of another commit, to compare with.
    before: Path | None = None

    def turns(self, names: list[_T], seldom: Collection[_T]) -> Iterator[_T]:
        """The contenders in the order in which they are measured, through all rounds."""
        for number in range(self.rounds):
            # Each round starts with another one, so none always follows the same contender.
            turn = number % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                if number < SELDOM_ROUNDS or name not in seldom:
                    yield name

    def chosen(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self.contenders]

    @contextlib.contextmanager
    def daemons(
        self, names: list[str], path: Path, server: ObjectServer | None = None
    ) -> Iterator[dict[str, Daemon]]:
        """The daemons that the contenders need and that can serve several runs; `run` starts the others."""
        needed = {CONTENDERS[name].daemon for name in names} - {None, "fresh"}
        # The checkpoint must not stay in the staging buffer of contenders that are not measured for that.
        if checkpoint_bytes(path) < 2 * ONE_GB:
            needed.discard("1gb")
        with contextlib.ExitStack() as stack:
            yield {
                kind: stack.enter_context(started(kind, path, server))
                for kind in sorted(filter(None, needed))
            }

    def alternate(
        self,
        names: list[str],
        path: Path,
        daemons: dict[str, Daemon],
        *,
        before: Callable[[list[str]], None],
        seldom: Collection[str] = (),
        server: ObjectServer | None = None,
    ) -> dict[str, list[Run]]:
        """All rounds of several contenders. If there is a server, they read the checkpoint from it."""
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for name in self.turns(names, seldom):
            before(files_of(path))
            runs[name].append(self.run(name, path, daemons, server=server))
            tell_run(name, runs[name])
        compare_checksums(runs)
        return runs

    def run(
        self,
        name: str,
        path: Path,
        daemons: dict[str, Daemon],
        *flags: str,
        files: list[str] | None = None,
        server: ObjectServer | None = None,
    ) -> Run:
        """One run in a process of its own. `flags` are flags of `measure.py`."""
        contender = CONTENDERS[name]
        files = files or files_of(path)
        environment = clean_environment() | contender.environment
        raw_block_bytes, threads = _BLOCK_BYTES, 16
        if server is not None:
            files = [server.uri(file) for file in files]
            # A client of Penstock does not talk to the server.
            environment |= server.environment() if contender.daemon is None else {}
            raw_block_bytes, threads = _OBJECT_BLOCK_BYTES, _S3_CONNECTIONS
        with contextlib.ExitStack() as stack:
            daemon = None
            if contender.daemon in daemons:
                daemon = daemons[contender.daemon]
            elif contender.daemon is not None:
                daemon = stack.enter_context(started(contender.daemon, path, server))
            if daemon is not None:
                flags += ("--socket-dir", daemon.socket_dir)
            elif not contender.has_checksum and daemons and server is None:
                threads = next(iter(daemons.values())).status()["readers"]["threads"]
            flags += ("--raw-threads", str(threads), "--raw-block-bytes", str(raw_block_bytes))
            cpu_before = daemon.cpu_seconds() if daemon else 0.0
            measurement = measure.run(name, files, *flags, environment=environment)
            daemon_cpu = daemon.cpu_seconds() - cpu_before if daemon else 0.0
        return Run(measurement, daemon_cpu)

    def publish(
        self,
        scenario: str,
        groups: list[Group],
        pairs: list[tuple[str, str]],
        note: str = "",
        more: list[str] | None = None,
    ) -> None:
        lines: list[str] = [note, ""] if note else []
        for group in groups:
            if group.title:
                lines += [f"{group.title}:", ""]
            lines += [*report.table(group.runs), ""]
            compared = report.comparisons(group.runs, pairs)
            lines += [*compared, ""] if compared else []
        lines += [*more, ""] if more else []
        if self.write_page:
            report.save(scenario, groups)
        self.publish_lines(scenario, lines[:-1])

    def publish_lines(self, scenario: str, lines: list[str]) -> None:
        seldom = self.rounds > SELDOM_ROUNDS and scenario in ("warm", "cold", "small", "node", "s3")
        rounds_note = f"; {SELDOM_ROUNDS} of loaders that are slow or matter less" if seldom else ""
        lines = [
            "",
            *system.describe(),
            f"- Rounds: {self.rounds if scenario != 'sparse' else 1}{rounds_note}",
            "",
            *lines,
            "",
        ]
        print(f"\n== {scenario}")
        print("\n".join(lines))
        if self.write_page:
            report.update_page(scenario, lines)


@contextlib.contextmanager
def started(kind: str, path: Path, server: ObjectServer | None = None) -> Iterator[Daemon]:
    """A daemon with the limit that `kind` stands for, and with a populated buffer."""
    environment = server.environment() if server else None
    if kind == "fresh":
        with Daemon(environment=environment) as daemon:
            yield daemon
        return
    limits = {"1gb": ONE_GB, "zero": 0, "roomy": _roomy_bytes(path)}
    with Daemon("--memory-limit", str(limits[kind]), environment=environment) as daemon:
        if limits[kind]:
            daemon.wait_until_populated()
        if server is not None:
            warm_up(daemon, server)
        yield daemon


def warm_up(daemon: Daemon, server: ObjectServer) -> None:
    """Has the daemon load a small checkpoint from the server, because it imports boto3 at its first load."""
    daemon.prefetch(server.uri(make_checkpoint.llama_checkpoint(_WARM_UP_BYTES)))
    daemon.evict()


def _roomy_bytes(path: Path) -> int:
    """Enough for a whole checkpoint, however it is cut into segments and slabs."""
    return checkpoint_bytes(path) * 26 // 25


def tell_run(what: str, runs: list[Run]) -> None:
    tell(what, len(runs), runs[-1].measurement.last_seconds)


def tell(what: str, number: int, seconds: float) -> None:
    print(f"  round {number} {what:<50} {seconds:8.3f} s", file=sys.stderr)


def checkpoint_bytes(path: Path) -> int:
    return sum(Path(file).stat().st_size for file in files_of(path))


def files_of(path: Path) -> list[str]:
    return [str(file) for file in make_checkpoint.checkpoint_files(path)]


def compare_checksums(runs: dict[str, list[Run]]) -> None:
    compare_measurements(
        {
            name: [run.measurement for run in rounds]
            for name, rounds in runs.items()
            if CONTENDERS[name].has_checksum
        }
    )


def compare_measurements(measurements: dict[str, list[Measurement]]) -> None:
    sums: dict[tuple[int, int, int], set[str]] = {}
    for name, measured in measurements.items():
        for m in measured:
            sums.setdefault((m.checksum, m.tensors, m.size_bytes), set()).add(name)
    if len(sums) > 1:
        raise ChecksumError(f"contenders read different bytes (checksum, tensors, bytes): {sums}")
