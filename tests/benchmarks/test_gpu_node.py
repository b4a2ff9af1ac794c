"""What the benchmark for a machine with a GPU concludes from its figures."""

from __future__ import annotations

import os

import pytest

from benchmarks import gpu_node


@pytest.mark.parametrize(
    ("rates", "busy", "said"),
    [
        ({1: 1e9, 2: 1.1e9}, {1: 15.0, 2: 15.8}, "is the cores"),
        ({1: 1e9, 2: 1.9e9, 4: 3.5e9}, {1: 4.0, 2: 7.5, 4: 14.0}, "is one process: 4 daemons read 3.5 times"),
        ({1: 1e9, 2: 1.1e9}, {1: 4.0, 2: 5.0}, "is neither the cores nor one process"),
        ({1: 1e9}, {1: 4.0}, "is not known"),
    ],
)
def test_the_bound_follows_from_rates_and_idle_cores(
    rates: dict[int, float], busy: dict[int, float], said: str
) -> None:
    assert said in gpu_node.bound(rates, busy, 16, "HTTPS")


def test_busy_seconds_leave_out_waiting_and_count_guests_once() -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    # user nice system idle iowait irq softirq steal guest guest_nice
    seconds = (100, 1, 1, 500, 9, 1, 1, 1, 50, 0)
    first = " ".join(str(each * ticks) for each in seconds)
    assert gpu_node.busy_seconds(f"cpu  {first}\ncpu0 1 2 3 4\n") == 105


def test_no_time_is_left_after_the_last_second() -> None:
    clock = gpu_node.Clock(0)
    assert clock.left_seconds == 0
    assert not clock.allows(0)
    assert gpu_node.Clock(60).allows(30)
