"""How much of the buffer there is room for, from what a machine's /proc and /sys say."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from penstock.server.system.headroom import buffer_headroom
from penstock.server.system.limits import OVERHEAD_BYTES

from ..support import MIB

GIB = 1 << 30
V2 = "0::/pod/a\n"
V1 = "5:memory:/pod/a\n"
RESERVE = OVERHEAD_BYTES * 3 // 4


def machine(
    root: Path, *, cgroup: str = V2, available: int = 16 * GIB, shm: int = 0, files: Mapping[str, str | int]
) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    (root / "proc/self/status").write_text(
        f"Name:\tpenstockd\nVmRSS:\t1 kB\nRssAnon:\t  0 kB\nRssShmem:\t{shm >> 10} kB\nThreads:\t3\n"
    )
    meminfo = f"MemTotal: {16 << 20} kB\nMemAvailable: {available >> 10} kB\nHuge: 0\n"
    (root / "proc/meminfo").write_text(meminfo)
    for name, content in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")
    return root


def v2(limit: int, used: int, cached: int = 0) -> dict[str, str | int]:
    return {
        "pod/a/memory.max": limit,
        "pod/a/memory.current": used,
        "pod/a/memory.stat": f"file {9 * GIB}\ninactive_file {cached // 2}\nactive_file {cached // 2}",
    }


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
