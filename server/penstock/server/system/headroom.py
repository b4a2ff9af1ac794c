"""How much memory the system has for the staging buffer now.

It may be less than the limit: on a node whose memory is used up, or in a container whose earlier penstockd
died while clients held its slabs. These stay charged until the clients unmap them, and a daemon that took
more would be killed. In a container that is started anew the kernel does not show older charges. There the
container's limit has to be large enough (docs/deploy.md).

Also, how much of the buffer has to be given back. Without a limit the buffer keeps warm checkpoints as long
as the machine and each cgroup have `SPARE_SHARE` of their memory left. If processes stall for memory there,
the share is `SPARE_SHARE_UNDER_PRESSURE`. Stalls alone do not count: the kernel also reports those of a
neighbour in a tight cgroup of its own as the machine's, and memory of the daemon does not help that
neighbour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .limits import OVERHEAD_BYTES, cgroup_limits, memory_bound, proc_sizes

_ROOT = Path("/")

SPARE_SHARE = 1 / 16
"""The share of the machine's memory, and of each cgroup's limit, that has to be left. At 0.25 s a look
(`staging/memory/upkeep.py`) a process may take 16 GB/s of a node with 64 GB, and finds memory left."""
SPARE_SHARE_UNDER_PRESSURE = 1 / 4
PRESSURE_PERCENT = 10.0
"""The share of the last ten seconds in which a process waited for memory: `some avg10` of PSI."""


@dataclass(frozen=True, slots=True)
class Level:
    """The machine, or one cgroup. Page cache counts as left."""

    limit_bytes: int
    left_bytes: int
    stalled_percent: float
    """The share of the last ten seconds in which a process waited for memory. 0 if the kernel does not
    say."""

    @property
    def spare_bytes(self) -> int:
        """Memory left beyond the share that has to be left. Negative if some of the share is missing."""
        pressed = self.stalled_percent >= PRESSURE_PERCENT
        share = SPARE_SHARE_UNDER_PRESSURE if pressed else SPARE_SHARE
        return self.left_bytes - math.ceil(self.limit_bytes * share)


def buffer_headroom(capacity_bytes: int, root: Path = _ROOT) -> int:
    """How many bytes of a buffer of `capacity_bytes` can exist, including those that exist. Blocks for a
    moment."""
    own = proc_sizes(root / "proc/self/status")
    beside_bytes = max(0, memory_bound(root).limit_bytes - capacity_bytes)
    # The memory that the daemon may need besides the buffer, if the limits leave any.
    reserve_bytes = min(OVERHEAD_BYTES, beside_bytes) * 3 // 4 - own.get("RssAnon", 0)
    left = min(level.left_bytes for level in levels(root))
    room_bytes = left + own.get("RssShmem", 0) - max(0, reserve_bytes)
    return min(capacity_bytes, max(0, room_bytes))


def spare_bytes(root: Path = _ROOT) -> int:
    """How much more memory may be kept so that every level has its share left. Negative: so much has to be
    given back. Blocks for a moment."""
    return min(level.spare_bytes for level in levels(root))


def levels(root: Path = _ROOT) -> Iterator[Level]:
    """The machine, then each cgroup that has a limit."""
    machine = proc_sizes(root / "proc/meminfo")
    total_bytes = machine["MemTotal"]
    yield Level(
        total_bytes,
        machine.get("MemAvailable", total_bytes),
        _stalled_percent(root / "proc/pressure/memory"),
    )
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
            left_bytes = int(limit) - used_bytes + cached_bytes
            yield Level(int(limit), left_bytes, _stalled_percent(directory / "memory.pressure"))


def _stalled_percent(path: Path) -> float:
    """`some avg10` of a file of PSI; 0 for kernels and cgroups without it."""
    try:
        words = path.read_text().split()
    except OSError:
        return 0.0
    return next((float(word[6:]) for word in words if word.startswith("avg10=")), 0.0)
