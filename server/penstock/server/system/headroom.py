"""How much of the staging buffer the system can give now.

Less than the limit where others hold what the limit counts on: on a node whose memory is used up, or in a
container whose earlier penstockd died while clients held its slabs, which stay charged until they let go.
Taking it all the same would end in a kill. Of a container that starts anew the kernel shows no older
charges; there the limits of the container have to leave room (docs/deploy.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .limits import OVERHEAD_BYTES, cgroup_limits, memory_bound, proc_sizes

_ROOT = Path("/")


def buffer_headroom(capacity_bytes: int, root: Path = _ROOT) -> int:
    """Bytes of a buffer of `capacity_bytes` that can exist, those included that do. Blocks for a moment."""
    own = proc_sizes(root / "proc/self/status")
    beside_bytes = max(0, memory_bound(root).limit_bytes - capacity_bytes)
    # What the daemon may come to need for itself, but never what the limits leave no room for anyway.
    reserve_bytes = min(OVERHEAD_BYTES, beside_bytes) * 3 // 4 - own.get("RssAnon", 0)
    left = min(left_bytes(root))
    room_bytes = left + own.get("RssShmem", 0) - max(0, reserve_bytes)
    return min(capacity_bytes, max(0, room_bytes))


def left_bytes(root: Path = _ROOT) -> Iterator[int]:
    """What the machine and each cgroup have left, page cache counted as free."""
    machine = proc_sizes(root / "proc/meminfo")
    yield machine.get("MemAvailable", machine["MemTotal"])
    for directory, name in cgroup_limits(root):
        prefix, usage = (
            ("", "memory.current") if name == "memory.max" else ("total_", "memory.usage_in_bytes")
        )
        try:
            limit = (directory / name).read_text().strip()
            used_bytes = int((directory / usage).read_text())
            cache = dict(line.split() for line in (directory / "memory.stat").read_text().splitlines())
        except OSError:  # not every level has them
            continue
        if limit.isdecimal():
            cached_bytes = sum(int(cache.get(prefix + part, 0)) for part in ("inactive_file", "active_file"))
            yield int(limit) - used_bytes + cached_bytes
