"""Which staged checkpoint a load may share, which no load can use any more, and whom a group waits for.
Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint.catalog import Checkpoint
from ..checkpoint.plan import Selection
from .entry import CacheEntry
from .members import GroupTerms


@dataclass(frozen=True, slots=True)
class Group:
    """Loads that share one window, which waits until `size` of them have joined.

    The other fields come from a load that goes on after its daemon ended, as that daemon sent them: the name
    of the window, how many tensors all members had released, how many members had not left.
    """

    name: str
    size: int
    window: str = ""
    released_tensors: int = 0
    members: int = 0


def find(
    entries: Iterable[CacheEntry],
    checkpoint: Checkpoint,
    selection: Selection,
    *,
    uid: int,
    group: Group | None,
    whole_only: bool,
) -> tuple[CacheEntry, int] | None:
    """The first entry that serves a load of `uid` from its beginning, and how many tensors of the entry's
    selection the load does not need. `whole_only` excludes windows."""
    for entry in entries:
        if entry.owner_uid not in (None, uid) or entry.closed or entry.error is not None:
            continue
        if whole_only and entry.started and not entry.full:
            continue
        if entry.full:
            if entry.contents.serves(checkpoint, selection):
                return entry, 0
        elif _together(entry, group):
            skipped = entry.contents.skipped_by(checkpoint, selection)
            if skipped is not None and skipped >= entry.released_tensors and (group or not skipped):
                return entry, skipped
    return None


def _together(entry: CacheEntry, group: Group | None) -> bool:
    """Whether the group may share the entry: members of one group do. Of members that go on after a restart
    only those that shared a window before do."""
    members = entry.members
    if group is None:
        return not members.group
    return members.group == group.name and (not group.window or members.window in ("", group.window))


def superseded(entries: Iterable[CacheEntry], checkpoint: Checkpoint, *, since: float) -> list[CacheEntry]:
    """Entries with a file of which `checkpoint` found another version, for a load that began at `since`. They
    can serve no later load. An entry made after `since` may have the newer version."""
    now = {file.uri: file.version for file in checkpoint.files}
    return [
        entry
        for entry in entries
        if entry.made_at <= since
        and any(now.get(file.uri, file.version) != file.version for file in entry.checkpoint.files)
    ]


def terms_of(
    group: Group | None, entries: Iterable[CacheEntry], checkpoint: Checkpoint, *, owner_uid: int | None
) -> GroupTerms:
    """The group that a new window waits for. It waits neither for members that share an earlier window, nor
    for members that had left before a restart."""
    if group is None:
        return GroupTerms()
    if group.window:
        return GroupTerms(group.name, group.window, min(max(1, group.members), group.size))
    earlier = sum(
        entry.members.joined
        for entry in entries
        if entry.members.group == group.name
        and entry.owner_uid == owner_uid
        and entry.version == checkpoint.version
    )
    return GroupTerms(group.name, expected=max(1, group.size - earlier))
