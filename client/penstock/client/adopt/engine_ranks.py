"""Which ranks of an inference engine share one pass over the storage: those that ask the same daemon.

Ranks can ask each other only where all of them load the same models in the same order: those of a
tensor-parallel group always do. The group of the load has the name that the first of them made up, so no
other load has it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from .ranks import Said, daemon_identity, group_of

_Word = TypeVar("_Word")


def agree_on_group(socket_dir: Path, request: object, groups: Sequence[Any]) -> tuple[str, int] | None:
    """(name, size) for `StreamerClient.load(group=)`; None where there is nobody to share with.

    A collective of each of `groups`, one after the other: the engine's coordinators, with `world_size` and
    `cpu_group`. `request` says what is loaded, by its repr.
    """
    return agree(socket_dir, request, groups, None)[0]


def agree(
    socket_dir: Path, request: object, groups: Sequence[Any], word: _Word
) -> tuple[tuple[str, int] | None, list[_Word]]:
    """The same, and what each rank of the group said beside it (picklable), this one's `word` included."""
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
