"""What a scrape holds before anything happened, and what it says of what is counted."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.server.sources.stores import KINDS
from penstock.server.system.counts import RETRY_REASONS, Distribution, Totals
from penstock.server.watch.exposition import Exposition, Gauges
from penstock.server.watch.metrics import METRICS, Metric

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(
    totals: Totals,
    *,
    stalled: set[str] | None = None,
    gauges: Gauges | None = None,
    hung: dict[str, int] | None = None,
) -> Series:
    exposition = Exposition(totals, "1.2.3")
    text = exposition.render(
        "text/plain",
        gauges or Gauges(),
        ready=not stalled,
        stalled=stalled or set(),
        hung=hung or {},
    )
    families = text_string_to_metric_families(text.decode())
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if sample.name.startswith("penstock_")
    }


def declared() -> Iterator[tuple[str, frozenset[tuple[str, str]]]]:
    """Every series but those of the build, whose labels differ, and without the buckets."""
    for metric in METRICS:
        suffixes = {"histogram": ("_sum", "_count"), "info": ()}.get(metric.kind, ("",))
        for values in itertools.product(*metric.labels.values()):
            for suffix in suffixes:
                yield metric.full_name + suffix, frozenset(zip(metric.labels, values, strict=True))


def test_every_declared_series_is_there_from_the_start_and_no_other() -> None:
    series = scrape(Totals(KINDS))
    found = {key for key in series if not key[0].endswith("_bucket") and key[0] != "penstock_build_info"}
    assert found == set(declared())
    counted = {key[0] for key in series if key[0].endswith("_total")}
    assert all(value == 0 for key, value in series.items() if key[0] in counted)


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.name)
def test_names_and_units_are_as_prometheus_wants_them(metric: Metric) -> None:
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    assert metric.name.endswith("_info") == (metric.kind == "info")
    assert metric.kind != "histogram" or metric.name.endswith("_seconds")
    assert metric.help.endswith(".")
    assert list(metric.buckets) == sorted(metric.buckets)


def test_what_is_counted_is_what_is_said() -> None:
    totals = Totals(KINDS)
    totals.loads["s3", "failed"] += 3
    totals.source_bytes["file"] += 100
    totals.rejected["ACCESS_DENIED"] += 2
    totals.delivered["tier",] += 50
    totals.retries["s3"] = lambda: dict.fromkeys(RETRY_REASONS, 0) | {"throttled": 7}
    totals.observe_read("s3", 0.5)
    totals.load_wait_seconds.observe(700)
    series = scrape(totals, gauges=Gauges(limit_bytes=10, warm_bytes=4), stalled={"loop"})
    for name, labels, value in (
        ("loads_total", {"source": "s3", "result": "failed"}, 3),
        ("read_bytes_total", {"source": "file"}, 100),
        ("rejected_total", {"reason": "ACCESS_DENIED"}, 2),
        ("delivered_bytes_total", {}, 50),
        ("delivered_from_bytes_total", {"origin": "tier"}, 50),
        ("delivered_from_bytes_total", {"origin": "storage"}, 0),
        ("read_retries_total", {"source": "s3", "reason": "throttled"}, 7),
        ("read_retries_total", {"source": "file", "reason": "throttled"}, 0),
        ("read_seconds_count", {"source": "s3"}, 1),
        ("read_seconds_bucket", {"source": "s3", "le": "0.5"}, 1),
        ("read_seconds_bucket", {"source": "s3", "le": "0.25"}, 0),
        ("load_wait_seconds_bucket", {"le": "600.0"}, 0),
        ("load_wait_seconds_bucket", {"le": "1800.0"}, 1),
        ("staging_limit_bytes", {}, 10),
        ("staging_bytes", {"state": "warm"}, 4),
        ("stalled", {"part": "loop"}, 1),
        ("stalled", {"part": "readers"}, 0),
        ("ready", {}, 0),
    ):
        assert series[f"penstock_{name}", frozenset(labels.items())] == value
    assert totals.summary()["loads_failed"] == 3
    assert totals.read_bytes == 100
    (build,) = [dict(labels) for name, labels in series if name == "penstock_build_info"]
    assert build["version"] == "1.2.3"


def test_a_value_counts_below_the_first_bound_that_it_does_not_exceed() -> None:
    seconds = Distribution((0.5, 1, 10))
    for value in (0, 0.5, 0.75, 1, 11):
        seconds.observe(value)
    assert seconds.cumulated() == ([2, 4, 4, 5], 13.25)


def test_mounts_that_hang_are_counted_and_not_named() -> None:
    series = scrape(Totals(KINDS), hung={"/models": 16, "/mnt/secret": 2})
    assert series["penstock_hung_mounts", frozenset()] == 2
    assert series["penstock_hung_threads", frozenset()] == 18
