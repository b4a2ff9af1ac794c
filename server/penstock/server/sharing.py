"""Which staged checkpoint a load may share, and whom a window of a group waits for. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .catalog import Checkpoint
from .plan import Selection
from .staged import StagedCheckpoint


@dataclass(frozen=True, slots=True)
class Group:
    """Loads that will come together; the window waits for `size` of them."""

    name: str
    size: int


def find(
    stages: Iterable[StagedCheckpoint],
    checkpoint: Checkpoint,
    selection: Selection,
    *,
    uid: int,
    group: Group | None,
    whole_only: bool,
) -> StagedCheckpoint | None:
    """The first that serves a load of `uid` from its beginning. `whole_only` means no window."""
    name = group.name if group else ""
    for staged in stages:
        if staged.uid not in (None, uid) or not staged.servable:
            continue
        if whole_only and staged.started and not staged.full:
            continue
        if (staged.group == name or staged.full) and staged.serves(checkpoint, selection):
            return staged
    return None


def expected_members(
    stages: Iterable[StagedCheckpoint], checkpoint: Checkpoint, *, tenant: int | None, group: Group | None
) -> int:
    """Members that a new window waits for: not those of the group that share an earlier one."""
    if group is None:
        return 1
    earlier = sum(
        staged.members
        for staged in stages
        if staged.group == group.name and staged.uid == tenant and staged.version == checkpoint.version
    )
    return max(1, group.size - earlier)
