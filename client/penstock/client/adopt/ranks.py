"""Which ranks of torch.distributed may share one pass over the storage.

Those that ask the same daemon for the same tensors of the same files. Every rank says what it asks of whom,
in one collective, so all of them have to call this together. The group's name is one that its lowest rank
made up, so no other job can have it. It works between nodes too: each has a daemon, and a group, of its own.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Hashable, Sequence
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
Said = tuple[str, Hashable, Hashable]
"""What a rank tells the others: a name for a group, its daemon, what it asks for."""


def shared_group(socket_dir: Path, request: Hashable) -> tuple[str, int] | None:
    """(name, size) for `StreamerClient.load(group=)`; None where there is nobody to share with.

    `request` is compared between ranks, and has to be picklable.
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
    """Of all who asked for what this rank did, named by the first of them; None if nobody else did."""
    alike = [name for name, *asked in everybody if asked == list(mine[1:])]
    return (alike[0], len(alike)) if len(alike) > 1 else None


def daemon_identity(socket_dir: Path) -> Hashable:
    """The socket itself: containers of one node may see it under different paths."""
    try:
        status = os.stat(socket_dir / "handoff.sock")
        return _BOOT_ID.read_text(), status.st_dev, status.st_ino
    except OSError:  # the load will say what is wrong, on every rank for itself
        return None, os.getpid()
