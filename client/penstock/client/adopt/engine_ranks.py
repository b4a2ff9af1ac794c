"""Groups of ranks of an inference engine that share one pass over the storage, as they use the same daemon.

Ranks can exchange requests only if all of them load the same models in the same order. The ranks of a
tensor-parallel group always do. The first rank makes up the name of the load's group, so no other load has
it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from .ranks import Said, daemon_identity, group_of

_Word = TypeVar("_Word")


def agree_on_group(socket_dir: Path, request: object, groups: Sequence[Any]) -> tuple[str, int] | None:
    """(name, size) for `StreamerClient.load(group=)`; None if no other rank can share.

    Runs a collective of each of `groups`, one after the other. They are the engine's coordinators, with
    `world_size` and `cpu_group`. `request` is compared by its repr.
    """
    return agree(socket_dir, request, groups, None)[0]


def agree(
    socket_dir: Path, request: object, groups: Sequence[Any], word: _Word
) -> tuple[tuple[str, int] | None, list[_Word]]:
    """As `agree_on_group`, and the `word` of each rank of the group (picklable), including this rank's."""
    mine: Said = (uuid.uuid4().hex, daemon_identity(socket_dir), repr(request))
    everybody = [(mine, word)]
    for group in groups:
        everybody = _gather(everybody, group)
    words = [word for said, word in everybody if said[1:] == mine[1:]]
    return group_of(mine, [said for said, _ in everybody]), words


def _gather(mine: list[tuple[Said, _Word]], group: Any) -> list[tuple[Said, _Word]]:
    import torch

    if group.world_size == 1:
        return mine
    gathered: list[list[tuple[Said, _Word]]] = [[]] * group.world_size
    torch.distributed.all_gather_object(gathered, mine, group=group.cpu_group)
    return [one for several in gathered for one in several]
