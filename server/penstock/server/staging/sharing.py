"""Which staged checkpoint a load may share, which no load can use any more, and whom a group waits for.
Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..checkpoint.files import Checkpoint
from ..checkpoint.selection import Selection
from ..sources.verification import Expected
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
        if not _verifies(entry, checkpoint, selection):
            continue
        if entry.full:
            if entry.contents.serves(checkpoint, selection):
                return entry, 0
        elif _together(entry, group):
            ahead = entry.contents.selection.tensor_count - selection.tensor_count
            if ahead < entry.released_tensors or (ahead and not group):
                continue  # before what takes longer
            skipped = entry.contents.skipped_by(checkpoint, selection)
            if skipped is not None:
                return entry, skipped
    return None


def _verifies(entry: CacheEntry, checkpoint: Checkpoint, selection: Selection) -> bool:
    """What a load must have verified, the entry has, or will. Nobody waits for what somebody else's digest
    says: it may be wrong."""
    verifier, has = entry.verifier, _expected(entry.checkpoint)
    asked = _expected(checkpoint)
    for file, one, table, indices in zip(
        checkpoint.files, checkpoint.expected, checkpoint.tables, selection.files, strict=False
    ):
        wants_bytes = len(indices) > 0 and table.end(indices[-1]) > table.start(indices[0])
        if not (one.must and one.checksum and wants_bytes):
            continue
        if verifier is None:
            if file.version not in has or has[file.version].checksum != one.checksum:
                return False
        elif not verifier.verifies(file.version, one.checksum):
            return False
    return all(
        (verifier is not None and verifier.has_verified(version))
        or (version in asked and asked[version].checksum == one.checksum)
        for version, one in has.items()
        if one.given
    )


def _expected(checkpoint: Checkpoint) -> dict[str, Expected]:
    """By the version of the file; empty where nothing is verified."""
    return {file.version: one for file, one in zip(checkpoint.files, checkpoint.expected, strict=False)}


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
