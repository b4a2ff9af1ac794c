"""What `penstock bench` advises."""

from __future__ import annotations

import pytest

from penstock.client.cli.bench import MIB, Row, advice, bench, table


def row(connections: int, rate: float, *, block_mib: int = 32, cores: float = 0.5) -> Row:
    """Of ten seconds."""
    return Row(connections, block_mib * MIB, int(rate * 1e9 * 10), 10.0, cores * 10)


def test_the_smallest_setting_that_is_as_good_is_advised() -> None:
    rows = [row(4, 0.4), row(16, 1.96), row(16, 1.97, block_mib=8), row(32, 2.0), row(64, 1.98)]
    said = advice(rows, objects=True, cores=16)
    assert "--object-concurrency 16 --object-block-size 8MiB: 1.97 GB/s" in said
    assert "bound by the store or the way to it" in said


def test_files_have_flags_of_their_own() -> None:
    assert "penstockd --concurrency 4 --block-size 32MiB" in advice([row(4, 1.0)], objects=False, cores=16)


def test_more_connections_are_advised_where_they_are_the_bound() -> None:
    rows = [row(4, 0.2), row(16, 0.8), row(32, 1.6), row(64, 3.2)]
    assert "bound by the connections, at 50 MB/s each: try more" in advice(rows, objects=True, cores=16)


def test_busy_cores_are_the_bound_whatever_the_connections_bring() -> None:
    rows = [row(4, 0.2, cores=1.8), row(64, 3.2, cores=1.8)]
    assert "bound by the 2 cores of this node" in advice(rows, objects=True, cores=2)


def test_the_table_has_a_line_for_each_measurement() -> None:
    head, *lines = table([row(4, 0.25), Row(16, 8 * MIB, 0, 0.0, 0.0)])
    assert head.split() == ["connections", "block", "read", "seconds", "GB/s", "cores"]
    assert lines[0].split()[0] == "4"
    assert lines[0].split()[-2:] == ["0.25", "0.5"]
    assert lines[1].split()[-2:] == ["0.00", "0.0"]


@pytest.mark.parametrize("bounds", [{"seconds": 0.0, "most_bytes": 1}, {"seconds": 1.0, "most_bytes": 0}])
def test_bounds_that_leave_nothing_to_measure_are_refused(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="leave nothing to measure"):
        bench(["/nowhere"], memory_limit=-1, progress=False, **bounds)  # type: ignore[arg-type]
