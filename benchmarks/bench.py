"""Measures Penstock and its peers side by side: `make bench`, or parts of it with `--only`.

    python benchmarks/bench.py --only warm cold
    python benchmarks/bench.py --only warm --size 1GB --rounds 3 --no-page

Prints tables, and writes docs/benchmarks.md and docs/benchmarks.png. A run of some scenarios leaves the
others on the page as they were, so that they may be measured one by one; each says of which commit it is. Run
it on a machine that does nothing else. As root it also measures huge pages for shared memory, for which it
changes a setting of the machine and puts it back.
"""

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TypeVar

import arrivals
import crowd
import make_checkpoint
import objects
import operate
import report
import s3
import system
from contenders import CONTENDERS, Measurement
from crowd import CrowdRun, Setup
from daemons import Daemon, MemoryWatch, clean_environment
from make_checkpoint import parse_size
from objects import ObjectServer
from report import Group, Run
from s3 import Staged

_CONTENDERS_SCRIPT = str(Path(__file__).with_name("contenders.py"))
_ONE_GB = 10**9
_S3 = ["penstock-1gb-views", "penstock-1gb", "runai-default", "runai-1gb-views", "raw-http"]
_S3_SELDOM = {"penstock-1gb", "runai-default"}
# As `--block-size` of penstockd, which has no way to be asked.
_BLOCK_BYTES = 8 << 20

_WARM = [
    "penstock-1gb-views",
    "penstock-1gb",
    "penstock-0-views",
    "penstock-0",
    "penstock-default",
    "runai-default",
    "runai-1gb-views",
    "runai-1gb",
    "runai-0-views",
    "runai-0",
    "safetensors-open",
    "safetensors-load",
    "safetensors-pread",
    "fastsafetensors",
    "fastsafetensors-buffered",
]
_WARM_SELDOM = {
    "penstock-0-views",
    "penstock-0",
    "runai-0-views",
    "runai-0",
    "safetensors-pread",
    "fastsafetensors",
    "fastsafetensors-buffered",
}
_RAW = "raw-o-direct"
_COLD = ["penstock-1gb-views", "penstock-1gb", "runai-default", "runai-1gb", "safetensors-load"]
_COLD_SELDOM = {"runai-default", "runai-1gb", "safetensors-load"}
_AGAIN = ["penstock-again", "runai-default", "runai-1gb", "safetensors-load"]
_SMALL = [
    "penstock-1gb-views",
    "penstock-1gb",
    "runai-default",
    "safetensors-open",
    "safetensors-load",
    "fastsafetensors",
]
_SMALL_SELDOM = {"runai-default", "fastsafetensors"}
# Contenders that are slow, or of which less depends, are measured in no more rounds than this.
_SELDOM_ROUNDS = 3
_CLIENTS_AT_ONCE = 2


_T = TypeVar("_T")


class ChecksumError(Exception):
    """Two contenders read different bytes from the same checkpoint."""


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.rounds: int = options.rounds
        self.size_bytes: int = options.size
        self.small_tensors: int = options.small_tensors
        self.sparse_bytes: int = options.sparse
        self.staged_bytes: int = options.staged_size
        self.clients: int = options.clients
        self._only_contenders: list[str] = options.contenders or sorted(CONTENDERS)
        self._write_page: bool = options.page

    def warm(self) -> None:
        path = make_checkpoint.llama_checkpoint(self.size_bytes)
        names = self._chosen(_WARM)
        with self._daemons(names, path) as daemons:
            runs = self._alternate(names, path, daemons, before=system.fill_page_cache, seldom=_WARM_SELDOM)
        pairs = [
            ("penstock-1gb-views", "runai-1gb-views"),
            ("penstock-1gb-views", "runai-1gb"),
            ("penstock-1gb", "runai-1gb"),
            ("penstock-0-views", "runai-0-views"),
            ("penstock-0", "runai-0"),
            ("penstock-default", "runai-default"),
        ]
        self._publish("warm", [Group("", runs)], pairs)

    def cold(self) -> None:
        """Each run lies between two raw reads and is compared with these: the rate of a disk changes."""
        path = make_checkpoint.llama_checkpoint(self.size_bytes)
        names = self._chosen(_COLD)
        runs: dict[str, list[Run]] = {name: [] for name in [_RAW, *names]}
        raw_seconds: dict[str, list[float]] = {name: [] for name in names}

        with self._daemons(names, path) as daemons:

            def measure(name: str) -> float:
                system.drop_page_cache(_files(path))
                runs[name].append(self._run(name, path, daemons))
                _tell_run(name, runs[name])
                return runs[name][-1].measurement.last_seconds

            raw_before = measure(_RAW)
            for name in self._turns(names, _COLD_SELDOM):
                measure(name)
                raw_after = measure(_RAW)
                raw_seconds[name].append((raw_before + raw_after) / 2)
                raw_before = raw_after
        _compare_checksums(runs)
        own_seconds = {name: [run.measurement.last_seconds for run in runs[name]] for name in names}
        compared = [
            f"- {CONTENDERS[name].label}: {report.ratios(raw_seconds[name], own_seconds[name])} of the rate "
            "of the raw reads right before and after it"
            for name in names
        ]
        note = "Before every run the checkpoint's pages are dropped from the page cache."
        self._publish("cold", [Group("", runs)], [], note, compared)

    def again(self) -> None:
        path = make_checkpoint.llama_checkpoint(self.size_bytes)
        names = self._chosen(_AGAIN)
        settings = [system.shmem_huge_pages()]
        if system.may_set_shmem_huge_pages():
            settings += [other for other in ("never", "advise") if other not in settings]
        groups = []
        for setting in settings:
            # The setting is nothing to the others.
            names = names if setting == settings[0] else self._chosen(["penstock-again"])
            with system.shmem_huge_pages_set_to(setting), self._daemons(names, path) as daemons:
                if "roomy" in daemons:
                    # The load that the measured ones find in the staging buffer.
                    self._run("penstock-again", path, daemons)
                runs = self._alternate(names, path, daemons, before=system.fill_page_cache)
            groups.append(Group(f"shmem_enabled={setting}", runs))
        pairs = [("penstock-again", other) for other in _AGAIN if other != "penstock-again"]
        self._publish("again", groups, pairs)

    def startup(self) -> None:
        path = make_checkpoint.llama_checkpoint(self.size_bytes)
        files = _files(path)
        ready, at_once, populated = [], [], []
        for _ in range(self.rounds):
            system.fill_page_cache(files)
            with Daemon("--memory-limit", str(_ONE_GB)) as daemon:
                ready.append(daemon.ready_seconds)
                at_once.append(self._run("penstock-1gb-views", path, {"1gb": daemon}))
                daemon.wait_until_populated()
                populated.append(self._run("penstock-1gb-views", path, {"1gb": daemon}))
        rows = [
            ["daemon started to first answer, imports included", report.spread(ready, 3)],
            *(
                [f"{what}: seconds to {which} tensor", report.spread(seconds, 3)]
                for what, runs in (("load at once", at_once), ("load once populated", populated))
                for which, seconds in (
                    ("first", [run.measurement.first_seconds for run in runs]),
                    ("last", [run.measurement.last_seconds for run in runs]),
                )
            ),
        ]
        self._publish_lines("startup", report.markdown_table(["limit 1 GB, page cache warm", "s"], rows))

    def small(self) -> None:
        path = make_checkpoint.small_checkpoint(self.small_tensors)
        # The same bytes in few tensors: what the bytes alone cost.
        few = make_checkpoint.llama_checkpoint(path.stat().st_size)
        names = self._chosen(_SMALL)
        with self._daemons(names, path) as daemons:
            many_runs = self._alternate(
                names, path, daemons, before=system.fill_page_cache, seldom=_SMALL_SELDOM
            )
            few_runs = self._alternate(names, few, daemons, before=system.fill_page_cache, seldom=names)
        rows = []
        for name in names:
            few_cpu = statistics.median(
                run.measurement.cpu_seconds / run.measurement.size_bytes for run in few_runs[name]
            )
            many = [run.measurement for run in many_runs[name]]
            each = [
                (m.cpu_seconds - m.touch_cpu_seconds - few_cpu * m.size_bytes) / m.tensors * 1e6 for m in many
            ]
            untouched = [m.last_seconds - m.touch_cpu_seconds for m in many]
            rows.append([CONTENDERS[name].label, report.spread(untouched, 3), report.spread(each, 1)])
        head = ["loader", "last tensor s, less touching", "CPU µs per tensor"]
        note = (
            f"{self.small_tensors} tensors of 6 KiB. CPU per tensor is the client's, less what the same "
            "bytes in few tensors cost it and less what the benchmark does with each: counting and touching."
        )
        self._publish("small", [Group("", many_runs)], [], note, report.markdown_table(head, rows))

    def sparse(self) -> None:
        path = make_checkpoint.sparse_checkpoint(self.sparse_bytes)
        with Daemon("--memory-limit", str(_ONE_GB)) as daemon:
            daemon.wait_until_populated()
            with MemoryWatch(daemon.pid) as watch:
                run = self._run("penstock-1gb-views", path, {"1gb": daemon})
            staging = daemon.status()["staging"]
        measured = run.measurement
        expected = make_checkpoint.expected_sparse_checksum(self.sparse_bytes)
        if measured.checksum != expected:
            raise ChecksumError(f"sparse: {measured.checksum} instead of {expected}")
        rows = [
            ["bytes loaded", f"{measured.size_bytes / 1e9:.0f} GB in {measured.tensors} tensors"],
            [
                "seconds",
                f"{measured.last_seconds:.1f} ({measured.size_bytes / measured.last_seconds / 1e9:.1f} GB/s)",
            ],
            ["limit", f"{staging['limit_bytes'] / 1e6:.0f} MB"],
            ["peak of the staging buffer", f"{staging['peak_bytes'] / 1e6:.0f} MB"],
            ["peak of the daemon's shared resident memory", f"{watch.peaks.shared_bytes / 1e6:.0f} MB"],
            ["peak of the daemon's other resident memory", f"{watch.peaks.private_bytes / 1e6:.0f} MB"],
        ]
        self._publish_lines("sparse", report.markdown_table(["sparse file", ""], rows))

    def node(self) -> None:
        path = make_checkpoint.llama_checkpoint(self.size_bytes)
        setups = [
            setup for setup in crowd.SETUPS if setup.contender in self._only_contenders and _fits(setup, path)
        ]
        seldom = {setup for setup in setups if not CONTENDERS[setup.contender].daemon}
        runs: dict[Setup, list[CrowdRun]] = {setup: [] for setup in setups}
        for setup in self._turns(setups, seldom):
            system.fill_page_cache(_files(path))
            with contextlib.ExitStack() as stack:
                # A daemon that has not read anything.
                kind = CONTENDERS[setup.contender].daemon
                daemon = stack.enter_context(_started(kind, path)) if kind else None
                runs[setup].append(crowd.run(setup, _files(path), daemon))
            _tell(setup.label, len(runs[setup]), runs[setup][-1].seconds)
        _compare_measurements(
            {setup.label: [m for run in runs[setup] for m in run.measurements] for setup in setups}
        )
        self._publish_lines("node", crowd.lines(runs))

    def warm10(self) -> None:
        needed = self.staged_bytes * 21 // 20 + 2 * _ONE_GB
        if system.available_bytes() < needed:
            print(
                f"warm10 left out: it needs {needed / 1e9:.1f} GB of memory, "
                f"{system.available_bytes() / 1e9:.1f} GB are available",
                file=sys.stderr,
            )
            return
        path = make_checkpoint.llama_checkpoint(self.staged_bytes)
        name = "penstock-full"
        # What the bytes are, and what another loader needs that has them in the page cache.
        system.drop_page_cache(_files(path))
        runs = {"safetensors-load": [self._run("safetensors-load", path, {})], name: []}
        untouched: dict[str, list[Run]] = {name: [], "safetensors-load": []}
        system.drop_page_cache(_files(path))
        with self._daemons([name], path) as daemons:
            daemon = daemons["roomy"]
            prefetch_seconds = daemon.prefetch(path)
            for _ in range(self.rounds):
                for each in untouched:
                    untouched[each].append(self._run(each, path, daemons, "--hold", "--untouched"))
                    _tell(
                        f"{each} untouched",
                        len(untouched[each]),
                        untouched[each][-1].measurement.last_seconds,
                    )
                runs[name].append(self._run(name, path, daemons, "--hold"))
                _tell_run(name, runs[name])
            status = daemon.status()
        _compare_checksums(runs)
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
            "Every load is a new process.",
            "",
            *report.markdown_table(["seconds", "median (range)", "target"], rows),
            "",
            f"- Read from the file for the prefetch and {loads} loads: "
            f"{status['totals']['read_bytes'] / data_bytes:.6f} times its tensors' bytes",
        ]
        self._publish_lines("warm10", lines)

    def queue(self) -> None:
        paths = make_checkpoint.different_checkpoints(self.clients, 40_000_000)
        files = [str(path) for path in paths]
        slab_bytes = 2 << 20
        # Two checkpoints, each with its share of a slab and of alignment; no third.
        limit = _CLIENTS_AT_ONCE * (paths[0].stat().st_size // slab_bytes + 2) * slab_bytes
        orders, singles, daemon_cpu, peaks, summed = [], [], [], [], set()
        for _ in range(self.rounds):
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
            _tell(f"{self.clients} clients", len(orders), orders[-1].seconds)
        summed.add(self._run("safetensors-load", paths[0].parent, {}, files=files).measurement.checksum)
        if len(summed) > 1:
            raise ChecksumError(f"queue: different sums of the same files: {summed}")
        text = (
            f"{self.clients} processes load at the same moment, each a checkpoint of its own of "
            f"{paths[0].stat().st_size / 1e6:.0f} MB, page cache warm, under a limit of {limit / 1e6:.1f} "
            "MB, which fits two. Times are the clients'."
        )
        self._publish_lines("queue", [text, "", *arrivals.lines(orders, singles, daemon_cpu, peaks)])

    def operate(self) -> None:
        path = make_checkpoint.llama_checkpoint(self.size_bytes)
        system.fill_page_cache(_files(path))
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as directory:
            log = Path(directory, "log")
            with Daemon("--memory-limit", str(_ONE_GB), log=log, http_address="127.0.0.1:0") as daemon:
                daemon.wait_until_populated()
                address = next(event["http"] for line in log.open() if "http" in (event := json.loads(line)))
                rows = [
                    ("a scrape, nothing to do", operate.scrape_seconds(address), "0.02"),
                    ("`penstock health`, nothing to do", operate.probe_seconds(daemon.socket_dir), "0.3"),
                ]
                with operate.loads(daemon.socket_dir, str(path)):
                    rows.append(("a scrape while a load runs", operate.scrape_seconds(address), "0.02"))
        self._publish_lines("operate", operate.lines(rows))

    def s3(self) -> None:
        path = make_checkpoint.llama_checkpoint(self.size_bytes)
        names = self._chosen(_S3)
        groups, crowds, staged = [], [], []
        for title, tls in (("HTTP", False), ("HTTPS", True)):
            with objects.Near(tls=tls) as server:
                with self._daemons(names, path, server) as daemons:
                    runs = self._alternate(
                        names, path, daemons, before=system.fill_page_cache, seldom=_S3_SELDOM, server=server
                    )
                groups.append(Group(title, runs))
                if s3.BARE in names:
                    staged.append((title, self._stage(path, server)))
                if crowd.WINDOW.contender in self._only_contenders:
                    with _started("1gb", path, server) as daemon:
                        uris = [server.uri(file) for file in _files(path)]
                        crowds.append((title, crowd.run(crowd.WINDOW, uris, daemon)))
        measurements = {title: run.measurements for title, run in crowds}
        for group in groups:
            for name in set(group.runs) - {s3.BARE}:
                measurements[f"{group.title}, {name}"] = [run.measurement for run in group.runs[name]]
        _compare_measurements(measurements)
        self._publish("s3", groups, s3.PAIRS, s3.NOTE, s3.lines(groups, staged, crowds))

    def _stage(self, path: Path, server: ObjectServer) -> list[Staged]:
        """Nothing but the daemon, beside the bare loop: neither makes tensors."""
        rounds = []
        with _started("roomy", path, server) as daemon:
            for _ in range(self.rounds):
                cpu_before = daemon.cpu_seconds()
                seconds = sum(daemon.prefetch(server.uri(file)) for file in _files(path))
                cpu_seconds = daemon.cpu_seconds() - cpu_before
                daemon.evict()
                bare = self._run(s3.BARE, path, {}, server=server).measurement
                rounds.append(Staged(seconds, cpu_seconds, bare.last_seconds, bare.cpu_seconds))
                _tell("staged by the daemon", len(rounds), seconds)
                _tell("bare loop beside it", len(rounds), bare.last_seconds)
        return rounds

    def s3latency(self) -> None:
        path = make_checkpoint.llama_checkpoint(self.size_bytes // 2)
        system.fill_page_cache(_files(path))
        points = s3.curve(path, rounds=min(self.rounds, _SELDOM_ROUNDS), tell=_tell)
        if self._write_page:
            s3.draw(points)
        self._publish_lines("s3latency", s3.curve_lines(points))

    def _turns(self, names: list[_T], seldom: Collection[_T]) -> Iterator[_T]:
        for number in range(self.rounds):
            # Each round starts with another one, so that nobody always comes after the same.
            turn = number % len(names) if names else 0
            for name in names[turn:] + names[:turn]:
                if number < _SELDOM_ROUNDS or name not in seldom:
                    yield name

    def _chosen(self, names: list[str]) -> list[str]:
        return [name for name in names if name in self._only_contenders]

    @contextlib.contextmanager
    def _daemons(
        self, names: list[str], path: Path, server: ObjectServer | None = None
    ) -> Iterator[dict[str, Daemon]]:
        """The daemons that the contenders need and that may serve several runs; `_run` makes the others."""
        needed = {CONTENDERS[name].daemon for name in names} - {None, "fresh"}
        # Only who is measured for it may find the checkpoint in the staging buffer.
        if _checkpoint_bytes(path) < 2 * _ONE_GB:
            needed.discard("1gb")
        with contextlib.ExitStack() as stack:
            yield {
                kind: stack.enter_context(_started(kind, path, server))
                for kind in sorted(filter(None, needed))
            }

    def _alternate(
        self,
        names: list[str],
        path: Path,
        daemons: dict[str, Daemon],
        *,
        before: Callable[[list[str]], None],
        seldom: Collection[str] = (),
        server: ObjectServer | None = None,
    ) -> dict[str, list[Run]]:
        """With a server the contenders read the checkpoint from there."""
        runs: dict[str, list[Run]] = {name: [] for name in names}
        for name in self._turns(names, seldom):
            before(_files(path))
            runs[name].append(self._run(name, path, daemons, server=server))
            _tell_run(name, runs[name])
        _compare_checksums(runs)
        return runs

    def _run(
        self,
        name: str,
        path: Path,
        daemons: dict[str, Daemon],
        *flags: str,
        files: list[str] | None = None,
        server: ObjectServer | None = None,
    ) -> Run:
        contender = CONTENDERS[name]
        files = files or _files(path)
        environment = clean_environment() | contender.environment
        raw_block_bytes, threads = _BLOCK_BYTES, 16
        if server is not None:
            files = [server.uri(file) for file in files]
            # A client of Penstock knows nothing of the server.
            environment |= server.environment() if contender.daemon is None else {}
            raw_block_bytes, threads = s3.BLOCK_BYTES, s3.CONNECTIONS
        with contextlib.ExitStack() as stack:
            daemon = None
            if contender.daemon in daemons:
                daemon = daemons[contender.daemon]
            elif contender.daemon is not None:
                daemon = stack.enter_context(_started(contender.daemon, path, server))
            command = [sys.executable, _CONTENDERS_SCRIPT, name, *files, *flags]
            if daemon is not None:
                command += ["--socket-dir", daemon.socket_dir]
            elif not contender.has_checksum and daemons and server is None:
                threads = next(iter(daemons.values())).status()["readers"]["threads"]
            command += ["--raw-threads", str(threads), "--raw-block-bytes", str(raw_block_bytes)]
            cpu_before = daemon.cpu_seconds() if daemon else 0.0
            finished = subprocess.run(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                check=False,
            )
            if finished.returncode:
                raise RuntimeError(f"{name} failed with exit code {finished.returncode}")
            daemon_cpu = daemon.cpu_seconds() - cpu_before if daemon else 0.0
        return Run(Measurement(**json.loads(finished.stdout.splitlines()[-1])), daemon_cpu)

    def _publish(
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
        if self._write_page:
            report.save(scenario, groups)
        self._publish_lines(scenario, lines[:-1])

    def _publish_lines(self, scenario: str, lines: list[str]) -> None:
        seldom = self.rounds > _SELDOM_ROUNDS and scenario in ("warm", "cold", "small", "node", "s3")
        rounds_note = f"; {_SELDOM_ROUNDS} of loaders that are slow or matter less" if seldom else ""
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
        if self._write_page:
            report.update_page(scenario, lines)


@contextlib.contextmanager
def _started(kind: str, path: Path, server: ObjectServer | None = None) -> Iterator[Daemon]:
    """A daemon of the limit that the kind stands for, with its pages."""
    environment = server.environment() if server else None
    if kind == "fresh":
        with Daemon(environment=environment) as daemon:
            yield daemon
        return
    limits = {"1gb": _ONE_GB, "zero": 0, "roomy": _roomy_bytes(path)}
    with Daemon("--memory-limit", str(limits[kind]), environment=environment) as daemon:
        if limits[kind]:
            daemon.wait_until_populated()
        if server is not None:
            s3.warm_up(daemon, server)
        yield daemon


def _roomy_bytes(path: Path) -> int:
    """Room for a whole checkpoint, however it is cut into segments and slabs."""
    return _checkpoint_bytes(path) * 26 // 25


def _fits(setup: Setup, path: Path) -> bool:
    """Whether what the processes keep for themselves fits beside the page cache."""
    copies = setup.processes if setup.hold and setup.contender.startswith("runai") else 0
    needed = (copies + 1) * _checkpoint_bytes(path) + _ONE_GB
    if system.available_bytes() >= needed:
        return True
    print(f"{setup.label} left out: it needs {needed / 1e9:.1f} GB of memory", file=sys.stderr)
    return False


def _tell_run(what: str, runs: list[Run]) -> None:
    _tell(what, len(runs), runs[-1].measurement.last_seconds)


def _tell(what: str, number: int, seconds: float) -> None:
    print(f"  round {number} {what:<50} {seconds:8.3f} s", file=sys.stderr)


def _checkpoint_bytes(path: Path) -> int:
    return sum(Path(file).stat().st_size for file in _files(path))


def _files(path: Path) -> list[str]:
    return [str(file) for file in make_checkpoint.checkpoint_files(path)]


def _compare_checksums(runs: dict[str, list[Run]]) -> None:
    _compare_measurements(
        {
            name: [run.measurement for run in rounds]
            for name, rounds in runs.items()
            if CONTENDERS[name].has_checksum
        }
    )


def _compare_measurements(measurements: dict[str, list[Measurement]]) -> None:
    sums: dict[tuple[int, int, int], set[str]] = {}
    for name, measured in measurements.items():
        for m in measured:
            sums.setdefault((m.checksum, m.tensors, m.size_bytes), set()).add(name)
    if len(sums) > 1:
        raise ChecksumError(f"contenders read different bytes (checksum, tensors, bytes): {sums}")


_SCENARIOS = (
    "warm",
    "cold",
    "again",
    "startup",
    "small",
    "sparse",
    "node",
    "warm10",
    "queue",
    "operate",
    "s3",
    "s3latency",
)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=_SCENARIOS, default=_SCENARIOS, metavar="SCENARIO")
    parser.add_argument("--contenders", nargs="+", choices=sorted(CONTENDERS), metavar="NAME")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=parse_size, default=4 * 10**9, help="of the checkpoint (4GB)")
    parser.add_argument("--small-tensors", type=int, default=100_000, metavar="COUNT")
    parser.add_argument("--sparse", type=parse_size, default=200 * 10**9, metavar="SIZE")
    parser.add_argument("--staged-size", type=parse_size, default=10 * 10**9, help="of warm10's (10GB)")
    parser.add_argument("--clients", type=int, default=64, help="of the queue (64)")
    parser.add_argument("--no-page", dest="page", action="store_false", help="only print")
    options = parser.parse_args(arguments)

    # Ends through the clean-up of every `with`: daemons, temporary directories, the machine's settings.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    bench = Bench(options)
    for scenario in _SCENARIOS:
        if scenario in options.only:
            print(f"{scenario} ...", file=sys.stderr)
            getattr(bench, scenario)()
    if options.page:
        report.draw()


if __name__ == "__main__":
    main(sys.argv[1:])
