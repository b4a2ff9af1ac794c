"""A machine's /proc and /sys, as far as they tell of memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

GIB = 1 << 30
V2 = "0::/pod/a\n"
V1 = "5:memory:/pod/a\n"
PRESSURE = "some avg10={} avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"


def machine(
    root: Path,
    *,
    cgroup: str = V2,
    available: int = 16 * GIB,
    shm: int = 0,
    stalled_percent: float = 0.0,
    files: Mapping[str, str | int] = MappingProxyType({}),
) -> Path:
    """What a machine with 16 GiB says in its /proc and /sys; written anew when called again."""
    _write(root / "proc/self/cgroup", cgroup)
    _write(
        root / "proc/self/status",
        f"Name:\tpenstockd\nVmRSS:\t1 kB\nRssAnon:\t  0 kB\nRssShmem:\t{shm >> 10} kB\nThreads:\t3\n",
    )
    _write(root / "proc/pressure/memory", PRESSURE.format(stalled_percent))
    meminfo = f"MemTotal: {16 << 20} kB\nMemAvailable: {available >> 10} kB\nHuge: 0\n"
    _write(root / "proc/meminfo", meminfo)
    for name, content in files.items():
        _write(root / "sys/fs/cgroup" / name, f"{content}\n")
    return root


def _write(path: Path, content: str) -> None:
    """At once: a thread may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    beside.write_text(content)
    beside.replace(path)


def v2(limit: int, used: int, cached: int = 0) -> dict[str, str | int]:
    return {
        "pod/a/memory.max": limit,
        "pod/a/memory.current": used,
        "pod/a/memory.stat": f"file {9 * GIB}\ninactive_file {cached // 2}\nactive_file {cached // 2}",
    }
