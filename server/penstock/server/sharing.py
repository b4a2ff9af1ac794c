"""Which staged checkpoint a load may share, which none can any more, whom a group waits for. Pure."""

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


def superseded(
    stages: Iterable[StagedCheckpoint], checkpoint: Checkpoint, *, since: float
) -> list[StagedCheckpoint]:
    """Those with a file of which `checkpoint`, for a load that began at `since`, found another version: no
    later load can be served by them. One made after `since` may be the newer one."""
    now = {file.uri: file.version for file in checkpoint.files}
    return [
        staged
        for staged in stages
        if staged.made_at <= since
        and any(now.get(file.uri, file.version) != file.version for file in staged.checkpoint.files)
    ]


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
