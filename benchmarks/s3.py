"""What `make bench` says about objects: the comparison with a near server, and the curve with a far one."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import crowd
import make_checkpoint
import report
from contenders import CONTENDERS, Measurement
from crowd import CrowdRun
from daemons import Daemon, clean_environment
from objects import Far, ObjectServer
from report import Group
from system import ROOT

PICTURE = ROOT / "docs" / "s3-latency.png"
BARE = "raw-http"
# As `--s3-block-size` and `--s3-concurrency` of penstockd, which has no way to be asked.
BLOCK_BYTES, CONNECTIONS = 16 << 20, 32
# What a daemon loads before it is measured: it lives longer than a load, and imports boto3 at its first.
WARM_UP_BYTES = 50_000_000
PAIRS = [
    ("penstock-1gb-views", "runai-1gb-views"),
    ("penstock-1gb-views", "runai-default"),
    ("penstock-1gb", "runai-default"),
]
NOTE = (
    "nginx on the loopback serves ranges of the checkpoint from the page cache; it shares the machine with "
    "the loaders. The daemon has read something small from it before, since it lives longer than a load. The "
    "bare loop is as many threads as the daemon has connections, each with a keep-alive connection of "
    "`http.client` that reads ranges into memory that is there; it makes no tensors."
)
_DELAY_SECONDS, _RATE_BYTES = 0.02, 90_000_000
_CONNECTIONS = (4, 8, 16, 32)
_BLOCKS_MIB = (8, 16, 32, 64)
_CONTENDERS_SCRIPT = str(Path(__file__).with_name("contenders.py"))


@dataclass(frozen=True, slots=True)
class Staged:
    """A checkpoint staged by the daemon alone, and the bare loop right after it."""

    seconds: float
    cpu_seconds: float
    bare_seconds: float
    bare_cpu_seconds: float


def lines(
    groups: Sequence[Group],
    staged: Sequence[tuple[str, Sequence[Staged]]],
    crowds: Sequence[tuple[str, CrowdRun]],
) -> list[str]:
    """The daemon beside the bare loop, CPU, and several clients at once."""
    compared = []
    for group in groups:
        ours, bare = group.runs.get("penstock-1gb-views"), group.runs.get(BARE)
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
            f"- {title}: the daemon alone, which stages it into populated memory (`prefetch`) and makes no "
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
        f"- {title}: {crowd.WINDOW.label}: {run.seconds:.2f} s until all had everything; downloaded "
        f"{crowd.times_read([run], size_bytes)}"
        for (title, run), size_bytes in zip(crowds, sizes, strict=True)
    ]
    head = ["CPU seconds for a GB, client and daemon, without the server", "median (range)"]
    return [*compared, *together, "", *report.markdown_table(head, rows)]


def warm_up(daemon: Daemon, server: ObjectServer) -> None:
    daemon.prefetch(server.uri(make_checkpoint.llama_checkpoint(WARM_UP_BYTES)))
    daemon.evict()


@dataclass(slots=True)
class Point:
    """So many connections and blocks of that size, against the far server."""

    connections: int
    block_mib: int
    # Bytes a second, round by round.
    daemon_rates: list[float] = field(default_factory=list)
    bare_rates: list[float] = field(default_factory=list)

    @property
    def imposed_rate(self) -> float:
        return self.connections * _RATE_BYTES

    @property
    def possible_rate(self) -> float:
        """What the delay before each block leaves of it."""
        block_bytes = self.block_mib << 20
        return self.connections * block_bytes / (_DELAY_SECONDS + block_bytes / _RATE_BYTES)


def curve(path: Path, *, rounds: int, tell: Callable[[str, int, float], None]) -> list[Point]:
    """Stages the checkpoint, and reads it bare, with every number of connections and size of blocks."""
    points = []
    with Far(delay_seconds=_DELAY_SECONDS, rate_bytes=_RATE_BYTES) as server:
        uri = server.uri(path)
        size_bytes = path.stat().st_size
        for connections in _CONNECTIONS:
            for block_mib in _BLOCKS_MIB:
                point = Point(connections, block_mib)
                points.append(point)
                flags = ["--memory-limit", str(size_bytes * 21 // 20), "--s3-concurrency", str(connections)]
                flags += ["--s3-block-size", f"{block_mib}MiB"]
                with Daemon(*flags, environment=server.environment()) as daemon:
                    daemon.wait_until_populated()
                    warm_up(daemon, server)
                    # Four connections take long and decide little.
                    for number in range(rounds if connections > 4 else 1):
                        seconds = daemon.prefetch(uri)
                        daemon.evict()
                        point.daemon_rates.append(size_bytes / seconds)
                        tell(f"daemon, {connections} connections, {block_mib} MiB", number + 1, seconds)
                        seconds = _bare_seconds(uri, point, server.environment())
                        point.bare_rates.append(size_bytes / seconds)
                        tell(f"bare loop, {connections} connections, {block_mib} MiB", number + 1, seconds)
    return points


def _bare_seconds(uri: str, point: Point, environment: dict[str, str]) -> float:
    command = [sys.executable, _CONTENDERS_SCRIPT, BARE, uri]
    command += ["--raw-threads", str(point.connections), "--raw-block-bytes", str(point.block_mib << 20)]
    finished = subprocess.run(
        command,
        env=clean_environment() | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Measurement(**json.loads(finished.stdout.splitlines()[-1])).last_seconds


def curve_lines(points: Sequence[Point]) -> list[str]:
    rows = [
        [
            f"{point.connections}",
            f"{point.block_mib} MiB",
            report.spread([rate / 1e6 for rate in point.daemon_rates], 0),
            report.spread([rate / 1e6 for rate in point.bare_rates], 0),
            f"{point.possible_rate / 1e6:.0f}",
            f"{statistics.median(point.daemon_rates) / point.imposed_rate:.2f}",
        ]
        for point in points
    ]
    head = [
        "connections",
        "blocks",
        "daemon MB/s",
        "bare loop MB/s",
        "possible MB/s",
        "of connections x rate",
    ]
    return [
        f"Every answer is {_DELAY_SECONDS * 1e3:.0f} ms late, and a connection gets "
        f"{_RATE_BYTES / 1e6:.0f} MB/s (SO_MAX_PACING_RATE of the server's socket). The daemon stages the "
        "checkpoint into populated memory (`prefetch`). Possible is what the delay before each block leaves "
        f"of {_RATE_BYTES / 1e6:.0f} MB/s; the server shares the machine.",
        "",
        f"![Rate over connections and block sizes]({PICTURE.name})",
        "",
        *report.markdown_table(head, rows),
    ]


def draw(points: Sequence[Point]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.2), layout="constrained")
    colours = ["#b9d4ea", "#7fb2d9", "#3f86bf", "#1f5f99"]
    for block_mib, colour in zip(_BLOCKS_MIB, colours, strict=True):
        chosen = [point for point in points if point.block_mib == block_mib]
        rates = [statistics.median(point.daemon_rates) / 1e9 for point in chosen]
        bare = [statistics.median(point.bare_rates) / 1e9 for point in chosen]
        places = [point.connections for point in chosen]
        axes.plot(places, rates, "o-", color=colour, label=f"daemon, {block_mib} MiB")
        axes.plot(places, bare, "x:", color=colour, alpha=0.8)
    ceiling = [connections * _RATE_BYTES / 1e9 for connections in _CONNECTIONS]
    axes.plot(_CONNECTIONS, ceiling, "--", color="#888888", label="connections x 90 MB/s")
    axes.plot([], [], "x:", color="#888888", label="bare loops")
    axes.set_xticks(_CONNECTIONS)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("connections")
    axes.set_ylabel("GB/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(PICTURE, dpi=110)
    pyplot.close(figure)
