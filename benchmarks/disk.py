"""Scenarios in which one process loads a checkpoint from a disk or from the page cache."""

import statistics
from pathlib import Path

from benchmarks import make_checkpoint, report, system
from benchmarks.contenders import CONTENDERS
from benchmarks.daemons import Daemon, MemoryWatch
from benchmarks.report import Group, Run
from benchmarks.runner import ONE_GB, ChecksumError, Runner, compare_checksums, files_of, tell_run

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
_COLD_OURS = ["penstock-1gb-views"]
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


def warm(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    names = runner.chosen(_WARM)
    with runner.daemons(names, path) as daemons:
        runs = runner.alternate(names, path, daemons, before=system.fill_page_cache, seldom=_WARM_SELDOM)
    pairs = [
        ("penstock-1gb-views", "runai-1gb-views"),
        ("penstock-1gb-views", "runai-1gb"),
        ("penstock-1gb", "runai-1gb"),
        ("penstock-0-views", "runai-0-views"),
        ("penstock-0", "runai-0"),
        ("penstock-default", "runai-default"),
    ]
    runner.publish("warm", [Group("", runs)], pairs)


def cold(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    groups, compared = [], []
    for number, setting in enumerate(_settings()):
        names = runner.chosen(_COLD if number == 0 else _COLD_OURS)
        with system.shmem_huge_pages_set_to(setting):
            runs, lines = _between_raw_reads(runner, path, names)
        groups.append(Group(f"shmem_enabled={setting}", runs))
        compared += [f"- {setting}: {line}" for line in lines]
    note = "Before every run the checkpoint's pages are dropped from the page cache."
    runner.publish("cold", groups, [], note, compared)


def _between_raw_reads(
    runner: Runner, path: Path, names: list[str]
) -> tuple[dict[str, list[Run]], list[str]]:
    """Compares each run with the raw reads just before and after it, because the rate of a disk changes."""
    runs: dict[str, list[Run]] = {name: [] for name in [_RAW, *names]}
    raw_seconds: dict[str, list[float]] = {name: [] for name in names}

    with runner.daemons(names, path) as daemons:

        def measure(name: str) -> float:
            system.drop_page_cache(files_of(path))
            runs[name].append(runner.run(name, path, daemons))
            tell_run(name, runs[name])
            return runs[name][-1].measurement.last_seconds

        raw_before = measure(_RAW)
        for name in runner.turns(names, _COLD_SELDOM):
            measure(name)
            raw_after = measure(_RAW)
            raw_seconds[name].append((raw_before + raw_after) / 2)
            raw_before = raw_after
    compare_checksums(runs)
    own_seconds = {name: [run.measurement.last_seconds for run in runs[name]] for name in names}
    return runs, [
        f"{CONTENDERS[name].label}: {report.ratios(raw_seconds[name], own_seconds[name])} of the rate "
        "of the raw reads right before and after it"
        for name in names
    ]


def _settings() -> list[str]:
    """Settings of huge pages for shared memory: the machine's first, then those that can be set. All loaders
    are measured with the first one. The others concern Penstock alone."""
    settings = [system.shmem_huge_pages()]
    if system.may_set_shmem_huge_pages():
        settings += [other for other in ("never", "advise") if other not in settings]
    return settings


def again(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    groups = []
    for number, setting in enumerate(_settings()):
        names = runner.chosen(_AGAIN if number == 0 else ["penstock-again"])
        with system.shmem_huge_pages_set_to(setting), runner.daemons(names, path) as daemons:
            if "roomy" in daemons:
                # The measured loads find this checkpoint in the staging buffer.
                runner.run("penstock-again", path, daemons)
            runs = runner.alternate(names, path, daemons, before=system.fill_page_cache)
        groups.append(Group(f"shmem_enabled={setting}", runs))
    pairs = [("penstock-again", other) for other in _AGAIN if other != "penstock-again"]
    runner.publish("again", groups, pairs)


def startup(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    files = files_of(path)
    ready, at_once, populated = [], [], []
    for _ in range(runner.rounds):
        system.fill_page_cache(files)
        with Daemon("--memory-limit", str(ONE_GB)) as daemon:
            ready.append(daemon.ready_seconds)
            at_once.append(runner.run("penstock-1gb-views", path, {"1gb": daemon}))
            # A checkpoint that fits the limit is still in the buffer.
            daemon.evict()
            daemon.wait_until_populated()
            populated.append(runner.run("penstock-1gb-views", path, {"1gb": daemon}))
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
    runner.publish_lines("startup", report.markdown_table(["limit 1 GB, page cache warm", "s"], rows))


def small(runner: Runner) -> None:
    path = make_checkpoint.small_checkpoint(runner.small_tensors)
    # The same bytes in few tensors show the cost of the bytes alone.
    few = make_checkpoint.llama_checkpoint(path.stat().st_size)
    names = runner.chosen(_SMALL)
    with runner.daemons(names, path) as daemons:
        many_runs = runner.alternate(
            names, path, daemons, before=system.fill_page_cache, seldom=_SMALL_SELDOM
        )
        few_runs = runner.alternate(names, few, daemons, before=system.fill_page_cache, seldom=names)
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
        f"{runner.small_tensors} tensors of 6 KiB. CPU per tensor is the client's, less the cost of the same "
        "bytes in few tensors, and less the benchmark's own cost of counting and touching tensors."
    )
    runner.publish("small", [Group("", many_runs)], [], note, report.markdown_table(head, rows))


def sparse(runner: Runner) -> None:
    path = make_checkpoint.sparse_checkpoint(runner.sparse_bytes)
    with Daemon("--memory-limit", str(ONE_GB)) as daemon:
        daemon.wait_until_populated()
        with MemoryWatch(daemon.pid) as watch:
            run = runner.run("penstock-1gb-views", path, {"1gb": daemon})
        staging = daemon.status()["staging"]
    measured = run.measurement
    expected = make_checkpoint.expected_sparse_checksum(runner.sparse_bytes)
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
    runner.publish_lines("sparse", report.markdown_table(["sparse file", ""], rows))
