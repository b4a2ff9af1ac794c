"""Groups of ranks of torch.distributed that share one pass over the storage.

Ranks may share if they ask the same daemon for the same tensors of the same files. In one collective every
rank sends its request and its daemon, so all of them have to call this together. The lowest rank makes up the
group's name, so no other job can have it. This works between nodes too: each has a daemon, and a group, of
its own.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Hashable, Sequence
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Said = tuple[str, Hashable, Hashable]
"""A rank's message to the others: a name for a group, its daemon, its request."""


def shared_group(socket_dir: Path, request: Hashable) -> tuple[str, int] | None:
    """(name, size) for `StreamerClient.load(group=)`; None if no other rank can share.

    `request` is compared between ranks, and must be picklable.
    """
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    mine: Said = (uuid.uuid4().hex, daemon_identity(socket_dir), request)
    everybody: list[Said] = [mine] * dist.get_world_size()
    # Not the job's own group, whose backend would take device memory for a few bytes.
    group = dist.new_group(backend="gloo")
    try:
        dist.all_gather_object(everybody, mine, group=group)
    finally:
        dist.destroy_process_group(group)
    return group_of(mine, everybody)


def group_of(mine: Said, everybody: Sequence[Said]) -> tuple[str, int] | None:
    """The group of all ranks with this rank's request, named by the first of them; None if it is the only
    one."""
    alike = [name for name, *asked in everybody if asked == list(mine[1:])]
    return (alike[0], len(alike)) if len(alike) > 1 else None


def daemon_identity(socket_dir: Path) -> Hashable:
    """The socket itself: containers of one node may see it under different paths."""
    try:
        status = os.stat(socket_dir / "handoff.sock")
        return _BOOT_ID.read_text(), status.st_dev, status.st_ino
    except OSError:  # the load will report what is wrong, on each rank
        return None, os.getpid()
