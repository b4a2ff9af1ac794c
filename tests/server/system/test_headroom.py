"""How much of the buffer there is room for, from what a machine's /proc and /sys say."""

from __future__ import annotations

from pathlib import Path

import pytest

from penstock.server.system.headroom import (
    PRESSURE_PERCENT,
    SPARE_SHARE,
    SPARE_SHARE_UNDER_PRESSURE,
    buffer_headroom,
    spare_bytes,
)
from penstock.server.system.limits import OVERHEAD_BYTES

from ..machine import GIB, PRESSURE, V1, machine, v2
from ..support import MIB

RESERVE = OVERHEAD_BYTES * 3 // 4


def test_an_empty_container_has_room_for_all_that_it_was_made_for(tmp_path: Path) -> None:
    root = machine(tmp_path, files=v2(GIB + OVERHEAD_BYTES, 50 * MIB))
    assert buffer_headroom(GIB, root) == GIB


def test_what_others_hold_of_the_container_is_missing(tmp_path: Path) -> None:
    root = machine(tmp_path, files=v2(GIB + OVERHEAD_BYTES, 400 * MIB))
    assert buffer_headroom(GIB, root) == GIB + OVERHEAD_BYTES - 400 * MIB - RESERVE


def test_page_cache_and_what_the_buffer_has_itself_count_as_free(tmp_path: Path) -> None:
    files = v2(GIB + OVERHEAD_BYTES, GIB + OVERHEAD_BYTES - 10 * MIB, cached=100 * MIB)
    root = machine(tmp_path, shm=600 * MIB, files=files)
    assert buffer_headroom(GIB, root) == 710 * MIB - RESERVE


def test_a_container_that_leaves_little_beside_the_limit_gives_the_limit_all_the_same(tmp_path: Path) -> None:
    root = machine(tmp_path, files=v2(GIB + 64 * MIB, 10 * MIB))
    assert buffer_headroom(GIB, root) == GIB


def test_an_ancestor_s_limit_counts(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        **v2(8 * GIB, 0),
        "pod/memory.max": 2 * GIB,
        "pod/memory.current": 2 * GIB - 300 * MIB,
        "pod/memory.stat": "inactive_file 0\nactive_file 0",
    }
    assert buffer_headroom(GIB, machine(tmp_path, files=files)) == 300 * MIB - RESERVE


def test_version_1_counts_with_its_descendants(tmp_path: Path) -> None:
    files: dict[str, str | int] = {
        "memory/pod/a/memory.limit_in_bytes": GIB + OVERHEAD_BYTES,
        "memory/pod/a/memory.usage_in_bytes": GIB,
        "memory/pod/a/memory.stat": f"active_file 7\ntotal_inactive_file {200 * MIB}\ntotal_active_file 0",
    }
    root = machine(tmp_path, cgroup=V1, files=files)
    assert buffer_headroom(GIB, root) == OVERHEAD_BYTES + 200 * MIB - RESERVE


@pytest.mark.parametrize(("available", "room"), [(16 * GIB, GIB), (GIB, GIB - RESERVE), (0, 0)])
def test_the_machine_s_memory_counts(tmp_path: Path, available: int, room: int) -> None:
    assert buffer_headroom(GIB, machine(tmp_path, cgroup="0::/\n", available=available, files={})) == room


def test_this_machine_has_room_for_a_slab() -> None:
    assert buffer_headroom(2 * MIB) == 2 * MIB


# ---- what has to go back -------------------------------------------------------------------------


def test_a_machine_with_memory_to_spare_lacks_nothing(tmp_path: Path) -> None:
    assert spare_bytes(machine(tmp_path, available=3 * GIB, files=v2(8 * GIB, 7 * GIB))) == GIB // 2
    assert spare_bytes(machine(tmp_path, available=GIB, files=v2(8 * GIB, 7 * GIB))) == 0


def test_a_machine_is_short_of_what_its_share_lacks(tmp_path: Path) -> None:
    assert spare_bytes(machine(tmp_path, available=GIB - 5 * MIB)) == -5 * MIB
    assert 16 * GIB * SPARE_SHARE == GIB


def test_a_container_is_short_though_the_machine_is_not(tmp_path: Path) -> None:
    files = v2(8 * GIB, 8 * GIB - 100 * MIB, cached=40 * MIB)
    assert spare_bytes(machine(tmp_path, files=files)) == 140 * MIB - 8 * GIB * SPARE_SHARE


def test_a_container_without_a_limit_lacks_nothing(tmp_path: Path) -> None:
    files: dict[str, str | int] = {**v2(0, 15 * GIB), "pod/a/memory.max": "max"}
    assert spare_bytes(machine(tmp_path, files=files)) == 16 * GIB - 16 * GIB * SPARE_SHARE


def test_where_processes_stall_for_memory_more_of_it_goes_back(tmp_path: Path) -> None:
    calm = machine(tmp_path, available=3 * GIB, stalled_percent=PRESSURE_PERCENT - 0.01)
    assert spare_bytes(calm) == 3 * GIB - 16 * GIB * SPARE_SHARE
    pressed = machine(tmp_path, available=3 * GIB, stalled_percent=PRESSURE_PERCENT)
    assert spare_bytes(pressed) == 3 * GIB - 16 * GIB * SPARE_SHARE_UNDER_PRESSURE


def test_a_container_in_which_processes_stall_gives_back_more(tmp_path: Path) -> None:
    files = {**v2(8 * GIB, 7 * GIB), "pod/a/memory.pressure": PRESSURE.format(55.5)}
    assert spare_bytes(machine(tmp_path, files=files)) == GIB - 8 * GIB * SPARE_SHARE_UNDER_PRESSURE


def test_stalls_elsewhere_take_nothing_from_a_machine_with_much_memory_left(tmp_path: Path) -> None:
    assert spare_bytes(machine(tmp_path, available=5 * GIB, stalled_percent=80.0)) == GIB


def test_a_kernel_that_knows_no_pressure_is_judged_by_its_memory(tmp_path: Path) -> None:
    root = machine(tmp_path, available=GIB - MIB)
    (root / "proc/pressure/memory").unlink()
    assert spare_bytes(root) == -MIB
