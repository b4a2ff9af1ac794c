"""The scenario of objects on a near server: loaders, the daemon beside a bare loop, several clients."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import crowd, make_checkpoint, objects, report, system
from benchmarks.contenders import CONTENDERS
from benchmarks.crowd import CrowdRun
from benchmarks.objects import ObjectServer
from benchmarks.report import Group
from benchmarks.runner import Runner, compare_measurements, files_of, started, tell

_BARE = "raw-http"
_S3 = ["penstock-1gb-views", "penstock-1gb", "runai-default", "runai-1gb-views", _BARE]
_S3_SELDOM = {"penstock-1gb", "runai-default"}
_PAIRS = [
    ("penstock-1gb-views", "runai-1gb-views"),
    ("penstock-1gb-views", "runai-default"),
    ("penstock-1gb", "runai-default"),
]
_NOTE = (
    "nginx on the loopback serves ranges of the checkpoint from the page cache. It shares the machine with "
    "the loaders. The daemon has loaded a small checkpoint from it before, as a daemon lives longer than a "
    "load. The bare loop has as many threads as the daemon has connections, each with a keep-alive "
    "connection of `http.client`, and reads ranges into populated memory. It makes no tensors."
)


@dataclass(frozen=True, slots=True)
class _Staged:
    """One round: the daemon stages a checkpoint, then the bare loop reads it."""

    seconds: float
    cpu_seconds: float
    bare_seconds: float
    bare_cpu_seconds: float


def s3(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    names = runner.chosen(_S3)
    groups, crowds, staged = [], [], []
    for title, tls in (("HTTP", False), ("HTTPS", True)):
        with objects.Near(tls=tls) as server:
            with runner.daemons(names, path, server) as daemons:
                runs = runner.alternate(
                    names, path, daemons, before=system.fill_page_cache, seldom=_S3_SELDOM, server=server
                )
            groups.append(Group(title, runs))
            if _BARE in names:
                staged.append((title, _stage(runner, path, server)))
            if crowd.WINDOW.contender in runner.contenders:
                with started("1gb", path, server) as daemon:
                    uris = [server.uri(file) for file in files_of(path)]
                    crowds.append((title, crowd.run(crowd.WINDOW, uris, daemon)))
    measurements = {title: run.measurements for title, run in crowds}
    for group in groups:
        for name in set(group.runs) - {_BARE}:
            measurements[f"{group.title}, {name}"] = [run.measurement for run in group.runs[name]]
    compare_measurements(measurements)
    runner.publish("s3", groups, _PAIRS, _NOTE, _lines(groups, staged, crowds))


def _stage(runner: Runner, path: Path, server: ObjectServer) -> list[_Staged]:
    """Compares the daemon alone with the bare loop. Neither makes tensors."""
    rounds = []
    with started("roomy", path, server) as daemon:
        for _ in range(runner.rounds):
            cpu_before = daemon.cpu_seconds()
            seconds = sum(daemon.prefetch(server.uri(file)) for file in files_of(path))
            cpu_seconds = daemon.cpu_seconds() - cpu_before
            daemon.evict()
            bare = runner.run(_BARE, path, {}, server=server).measurement
            rounds.append(_Staged(seconds, cpu_seconds, bare.last_seconds, bare.cpu_seconds))
            tell("staged by the daemon", len(rounds), seconds)
            tell("bare loop beside it", len(rounds), bare.last_seconds)
    return rounds


def _lines(
    groups: Sequence[Group],
    staged: Sequence[tuple[str, Sequence[_Staged]]],
    crowds: Sequence[tuple[str, CrowdRun]],
) -> list[str]:
    """Comparisons with the bare loop, several clients at once, and a table of CPU seconds."""
    compared = []
    for group in groups:
        ours, bare = group.runs.get("penstock-1gb-views"), group.runs.get(_BARE)
        if ours and bare:
            factors = report.ratios(
                [run.measurement.last_seconds for run in bare], [run.measurement.last_seconds for run in ours]
            )
            label = CONTENDERS["penstock-1gb-views"].label
            compared.append(f"- {group.title}: {label}: {factors} of the bare loop's rate")
    for title, rounds in staged:
        factors = report.ratios([each.bare_seconds for each in rounds], [each.seconds for each in rounds])
        cpu = report.ratios([each.cpu_seconds for each in rounds], [each.bare_cpu_seconds for each in rounds])
        compared.append(
            f"- {title}: the daemon alone, which stages into populated memory (`prefetch`) and makes no "
            f"tensors either: {factors} of the bare loop's rate, with {cpu} times its CPU"
        )
    rows = []
    for group in groups:
        for name, runs in group.runs.items():
            each = [
                (run.measurement.cpu_seconds + run.daemon_cpu_seconds) / run.measurement.size_bytes * 1e9
                for run in runs
            ]
            rows.append([f"{group.title}, {CONTENDERS[name].label}", report.spread(each)])
    sizes = [run.measurements[0].size_bytes for _, run in crowds]
    together = [
        f"- {title}: {crowd.WINDOW.label}: {run.seconds:.2f} s until all had all tensors; downloaded "
        f"{crowd.times_read([run], size_bytes)}"
        for (title, run), size_bytes in zip(crowds, sizes, strict=True)
    ]
    head = ["CPU seconds for a GB, client and daemon, without the server", "median (range)"]
    return [*compared, *together, "", *report.markdown_table(head, rows)]
