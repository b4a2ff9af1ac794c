"""The scenario of objects on a far server: the daemon's rate over connections and sizes of blocks."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import make_checkpoint, measure, report, system
from benchmarks.daemons import Daemon, clean_environment
from benchmarks.objects import Far
from benchmarks.runner import SELDOM_ROUNDS, Runner, files_of, tell, warm_up
from benchmarks.system import ROOT

_PICTURE = ROOT / "docs" / "s3-latency.png"
_BARE = "raw-http"
_DELAY_SECONDS, _RATE_BYTES = 0.02, 90_000_000
_CONNECTIONS = (4, 8, 16, 32)
_BLOCKS_MIB = (8, 16, 32, 64)


@dataclass(slots=True)
class _Point:
    """Rates against the far server with one number of connections and one size of blocks."""

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
        """The imposed rate less the delay before each block."""
        block_bytes = self.block_mib << 20
        return self.connections * block_bytes / (_DELAY_SECONDS + block_bytes / _RATE_BYTES)


def s3latency(runner: Runner) -> None:
    path = make_checkpoint.llama_checkpoint(runner.size_bytes)
    system.fill_page_cache(files_of(path))
    points = _curve(path, rounds=min(runner.rounds, SELDOM_ROUNDS))
    if runner.write_page:
        _draw(points)
    runner.publish_lines("s3latency", _curve_lines(points))


def _curve(path: Path, *, rounds: int) -> list[_Point]:
    """Stages the checkpoint, and reads it with the bare loop, for every combination."""
    points = []
    with Far(delay_seconds=_DELAY_SECONDS, rate_bytes=_RATE_BYTES) as server:
        uri = server.uri(path)
        size_bytes = path.stat().st_size
        for connections in _CONNECTIONS:
            for block_mib in _BLOCKS_MIB:
                point = _Point(connections, block_mib)
                points.append(point)
                flags = [
                    "--memory-limit",
                    str(size_bytes * 21 // 20),
                    "--object-concurrency",
                    str(connections),
                ]
                flags += ["--object-block-size", f"{block_mib}MiB"]
                with Daemon(*flags, environment=server.environment()) as daemon:
                    daemon.wait_until_populated()
                    warm_up(daemon, server)
                    # Four connections take long and matter little.
                    for number in range(rounds if connections > 4 else 1):
                        seconds = daemon.prefetch(uri)
                        daemon.evict()
                        point.daemon_rates.append(size_bytes / seconds)
                        tell(f"daemon, {connections} connections, {block_mib} MiB", number + 1, seconds)
                        seconds = _bare_seconds(uri, point, server.environment())
                        point.bare_rates.append(size_bytes / seconds)
                        tell(f"bare loop, {connections} connections, {block_mib} MiB", number + 1, seconds)
    return points


def _bare_seconds(uri: str, point: _Point, environment: dict[str, str]) -> float:
    flags = ["--raw-threads", str(point.connections), "--raw-block-bytes", str(point.block_mib << 20)]
    return measure.run(_BARE, [uri], *flags, environment=clean_environment() | environment).last_seconds


def _curve_lines(points: Sequence[_Point]) -> list[str]:
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
        f"![Rate over connections and block sizes]({_PICTURE.name})",
        "",
        *report.markdown_table(head, rows),
    ]


def _draw(points: Sequence[_Point]) -> None:
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
    figure.savefig(_PICTURE, dpi=110)
    pyplot.close(figure)
