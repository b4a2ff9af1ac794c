"""Makes tables, docs/benchmarks.md and docs/benchmarks.png of measurements."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.contenders import CONTENDERS
from benchmarks.make_checkpoint import DATA_DIR
from benchmarks.measure import Measurement
from benchmarks.system import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
PICTURE = ROOT / "docs" / "benchmarks.png"
# The measurements of the last run of each scenario. The picture shows several of them.
_RESULTS = DATA_DIR / "results.json"

_NEW_PAGE = """\
# Benchmarks

`make bench` measures Penstock against other loaders of safetensors checkpoints and writes the tables and the
picture of this page. Every contender runs in a fresh process for every round, which imports torch before the
clock starts. Contenders alternate within one run. Each reads one byte of every 4 KiB of every tensor and sums
them, and the sums must agree. Each drops a tensor when the next one comes, as a model that copies its weights
does. Figures are medians, with the lowest and the highest in brackets. Figures of different runs or machines
cannot be compared. "Peak RSS" is the highest growth of the loading process, mapped pages of the page cache
and of the staging buffer included.

![Seconds to the first and to the last tensor](benchmarks.png)
"""

_TITLES = {
    "warm": "Page cache warm",
    "cold": "Disk cold",
    "again": "Loaded again",
    "startup": "From the start of the daemon",
    "small": "Many small tensors",
    "sparse": "A checkpoint far larger than the limit",
    "node": "Several processes of one node at once",
    "warm10": "A new process, and a checkpoint that is staged",
    "queue": "Many clients, and memory for two",
    "operate": "Asking how the daemon is",
    "before": "Against an earlier commit",
    "s3": "Object storage, as fast as a server can be",
    "s3latency": "Object storage that is far away",
    "fetch": "Small files from object storage that is far away",
}


@dataclass(frozen=True, slots=True)
class Run:
    """One contender in one round."""

    measurement: Measurement
    daemon_cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Group:
    """The rounds of each contender in one comparison. `title` is empty if a scenario has only one."""

    title: str
    runs: dict[str, list[Run]]


def spread(values: Sequence[float], digits: int = 2) -> str:
    """The median and the range: `0.71 (0.69-0.80)`."""
    median = statistics.median(values)
    if len(values) == 1:
        return f"{median:.{digits}f}"
    return f"{median:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def median_last_seconds(runs: list[Run]) -> float:
    return statistics.median(run.measurement.last_seconds for run in runs)


def ratios(seconds: Sequence[float], other: Sequence[float]) -> str:
    """`seconds` divided by `other`, round by round: `1.50 (1.40-1.70)`."""
    return spread([ours / theirs for ours, theirs in zip(seconds, other, strict=False)])


def table(runs: dict[str, list[Run]]) -> list[str]:
    rows = []
    for name, rounds in runs.items():
        measurements = [run.measurement for run in rounds]
        contender = CONTENDERS[name]
        last = median_last_seconds(rounds)
        first = spread([m.first_seconds for m in measurements], 3) if contender.has_checksum else ""
        daemon = f"{statistics.median(run.daemon_cpu_seconds for run in rounds):.2f}"
        rows.append(
            [
                contender.label,
                first,
                spread([m.last_seconds for m in measurements], 3),
                f"{measurements[0].size_bytes / last / 1e9:.2f}",
                f"{statistics.median(m.cpu_seconds for m in measurements):.2f}",
                daemon if contender.daemon else "",
                f"{max(m.peak_rss_bytes for m in measurements) / 1e6:.0f}",
            ]
        )
    head = ["loader", "first tensor s", "last tensor s", "GB/s", "CPU s", "daemon CPU s", "peak RSS MB"]
    return markdown_table(head, rows)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = ["-" * width if index == 0 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return [line(head), line(rule), *map(line, rows)]


def comparisons(runs: dict[str, list[Run]], pairs: Sequence[tuple[str, str]]) -> list[str]:
    lines = []
    for name, other in pairs:
        if name in runs and other in runs:
            factor = median_last_seconds(runs[other]) / median_last_seconds(runs[name])
            lines.append(
                f"- {CONTENDERS[name].label}: {factor:.2f} times as fast as {CONTENDERS[other].label}"
            )
    return lines


def update_page(scenario: str, lines: list[str]) -> None:
    """Puts lines between the scenario's markers. Text outside the markers stays as it is."""
    begin, end = f"<!-- {scenario}: written by `make bench` -->", f"<!-- {scenario}: end -->"
    text = PAGE.read_text() if PAGE.exists() else _NEW_PAGE
    if begin not in text:
        # Scenarios are in the order of their titles, whichever was measured first.
        names = list(_TITLES)
        later = [text.find(f"\n## {_TITLES[name]}\n") for name in names[names.index(scenario) + 1 :]]
        at = min((place for place in later if place >= 0), default=len(text))
        text = f"{text[:at]}\n## {_TITLES[scenario]}\n\n{begin}\n{end}\n{text[at:]}"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"\n{end}{after}")


def save(scenario: str, groups: list[Group]) -> None:
    results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    results[scenario] = [asdict(group) for group in groups]
    _RESULTS.parent.mkdir(exist_ok=True)
    _RESULTS.write_text(json.dumps(results, indent=1))


def draw(path: Path = PICTURE) -> None:
    """Draws bars of the scenarios with several loaders, as they were last measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = json.loads(_RESULTS.read_text()) if _RESULTS.exists() else {}
    panels = [
        (f"{_TITLES[scenario]}{', ' + group['title'] if group['title'] else ''}", group["runs"])
        for scenario in ("warm", "cold", "again", "s3")
        for group in results.get(scenario, [])
    ]
    if not panels:
        return
    figure, rows = pyplot.subplots(
        len(panels),
        figsize=(9, 0.8 + sum(0.9 + 0.34 * len(runs) for _, runs in panels)),
        height_ratios=[1 + 0.5 * len(runs) for _, runs in panels],
        squeeze=False,
        layout="constrained",
    )
    for axes, (title, runs) in zip(rows[:, 0], panels, strict=True):
        names = sorted(runs, key=lambda name: _median(runs[name], "last_seconds"))
        labels = [CONTENDERS[name].label for name in names]
        ours = [name.startswith("penstock") for name in names]
        last = [_median(runs[name], "last_seconds") for name in names]
        first = [_median(runs[name], "first_seconds") for name in names]
        bars = axes.barh(labels, last, color=["#7fb2d9" if our else "#cfcfcf" for our in ours])
        axes.barh(labels, first, color=["#1f5f99" if our else "#7a7a7a" for our in ours], height=0.4)
        axes.bar_label(bars, [f"{seconds:.2f} s" for seconds in last], padding=3, fontsize=8)
        axes.set_xlim(0, max(last) * 1.12)
        axes.margins(y=0.02)
        axes.invert_yaxis()
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1, 0].set_xlabel(
        "seconds to the last tensor (wide bar) and to the first (narrow bar), median", fontsize=8
    )
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _median(rounds: list[dict[str, dict[str, float]]], field: str) -> float:
    return statistics.median(run["measurement"][field] for run in rounds)
