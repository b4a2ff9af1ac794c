"""How much memory the system has for the staging buffer now.

It may be less than the limit: on a node whose memory is used up, or in a container whose earlier penstockd
died while clients held its slabs. These stay charged until the clients unmap them, and a daemon that took
more would be killed. In a container that is started anew the kernel does not show older charges. There the
container's limit has to be large enough (docs/deploy.md).
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
    # Memory that the daemon may need for itself, as far as the limits have any beside the buffer.
    reserve_bytes = min(OVERHEAD_BYTES, beside_bytes) * 3 // 4 - own.get("RssAnon", 0)
    left = min(left_bytes(root))
    room_bytes = left + own.get("RssShmem", 0) - max(0, reserve_bytes)
    return min(capacity_bytes, max(0, room_bytes))


def left_bytes(root: Path = _ROOT) -> Iterator[int]:
    """The bytes that the machine and each cgroup have left. Page cache counts as free."""
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
