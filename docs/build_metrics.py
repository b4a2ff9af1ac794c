"""Writes docs/metrics.md from the daemon's declarations. With `--check`, fails if the page is out of date."""

from __future__ import annotations

import sys
from pathlib import Path

from penstock.server.watch.metrics import METRICS, Metric

PAGE = Path(__file__).with_name("metrics.md")
HEAD = """\
# Metrics

<!-- Made by `make docs` from server/penstock/server/watch/metrics.py: change that, not this. -->

The daemon serves these metrics at `/metrics` on `--http-address`, as Prometheus text or OpenMetrics, as the
scraper prefers. Units are bytes and seconds. No label takes a model's name, a path or a client's id, so
there are few series however many models there are. `/status` and the log have names, paths and ids. Every
series exists from the start, so that rates are right from the first event on.

| metric | type | labels | meaning |
|---|---|---|---|
"""
MIDDLE = """
The usual `process_*` metrics (CPU seconds, memory, open descriptors, start time) are served too.
`process_resident_memory_bytes` includes the staging buffer, `penstock_resident_bytes` does not.

A separate thread answers scrapes. If the event loop hangs, a scrape shows the last known values, with
`penstock_stalled{part="loop"}` at 1.

## Questions and queries

| question | query |
|---|---|
"""
QUESTIONS = {
    "how fast is storage read?": "sum by (source) (rate(penstock_read_bytes_total[1m]))",
    "what part of loads finds its checkpoint staged?": "rate(penstock_stage_hits_total[5m]) / "
    "(rate(penstock_stage_hits_total[5m]) + rate(penstock_stage_misses_total[5m]))",
    "how long do nearly all loads take?": "histogram_quantile(0.95, sum by (le, cache) "
    "(rate(penstock_load_seconds_bucket[10m])))",
    "how long do they wait for memory?": "histogram_quantile(0.95, sum by (le) "
    "(rate(penstock_load_wait_seconds_bucket[10m])))",
    "what part of the buffer do clients hold?": 'penstock_staging_bytes{state="leased"} '
    "/ ignoring (state) penstock_staging_limit_bytes",
    "why do requests fail?": "sum by (reason) (rate(penstock_rejected_total[5m]))",
    "does somebody flood the socket?": "sum by (reason) (rate(penstock_connections_closed_total[5m]))",
}


def page() -> str:
    questions = (f"| {question} | `{query}` |\n" for question, query in QUESTIONS.items())
    return "".join([HEAD, *map(_row, METRICS), MIDDLE, *questions])


def _row(metric: Metric) -> str:
    labels = [
        f"`{name}`: {', '.join(f'`{value}`' for value in values)}" if values else f"`{name}`"
        for name, values in metric.labels.items()
    ]
    meaning = metric.help
    if metric.buckets:
        meaning += f" Buckets from {metric.buckets[0]:g} to {metric.buckets[-1]:g} s."
    return f"| `{metric.full_name}` | {metric.kind} | {'<br>'.join(labels)} | {meaning} |\n"


def main() -> int:
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print(f"{PAGE} is not what the code declares: run `make docs`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
