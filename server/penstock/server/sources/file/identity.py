"""Which version of a file it is, and whether that may have changed since: decided from what the kernel says.
Pure but for `disk_sequence`.

Two files are the same version only if everything is equal that the kernel has to tell them apart: the mount,
the device and which disk was in it, inode, birth, size, mtime and ctime. None of these suffices alone: a
reproducible image mounted in another's place has all but the mount.

While a file is read, size and mtime must stay. ctime also moves when the bytes do not: by a link, a rename, a
chmod. It is taken for one of these only if that shows, and no write does.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from ...system.statx import FileStatus


@dataclass(frozen=True, slots=True)
class Look:
    """A file at one moment: its status, and under which name the kernel has it."""

    status: FileStatus
    name: str


def portable_version(status: FileStatus) -> str:
    """Equal for an unchanged file in each process of this machine, whatever its mount namespace."""
    major, minor = status.device
    return (
        f"file:{major:x}:{minor:x}:{disk_sequence(major, minor)}:{status.inode}:{status.birth_ns}"
        f":{status.size_bytes}:{status.mtime_ns}:{status.ctime_ns}"
    )


def disk_sequence(major: int, minor: int) -> str:
    """Which disk is in that device: the kernel counts them (Linux 5.15), so that another image on the same
    loop device differs. Empty for what is no disk, or a partition."""
    if not major:
        return ""
    try:
        with open(f"/sys/dev/block/{major}:{minor}/diskseq", "rb") as file:
            return str(int(file.read()))
    except OSError:
        return ""


def change(before: Look, now: Look, *, watched: bool, modified: bool) -> str:
    """Why the bytes may have changed between two looks, in words; empty if they did not.

    `modified`: the kernel told of a write. `watched`: it would have told of any write but one through a
    mapping. Without that a mode or an owner explains no ctime, since copying onto a file with its times
    (`cp -p`) sets them too.
    """
    old, new = before.status, now.status
    if new.size_bytes != old.size_bytes:
        return f"its size was {old.size_bytes} bytes and is {new.size_bytes}"
    if new.mtime_ns != old.mtime_ns:
        return "its modification time changed"
    if modified:
        return "it was written to"
    if new.ctime_ns == old.ctime_ns:
        return ""
    renamed = (new.links, now.name) != (old.links, before.name)
    reowned = (new.mode, new.uid, new.gid) != (old.mode, old.uid, old.gid)
    if renamed or (watched and reowned):
        return ""
    return "its change time moved, and neither a link nor a rename nor a new mode explains it"


@dataclass(frozen=True, slots=True)
class Place:
    """The mounts that a load's files were opened through, as a suffix of the version that clients are told.

    Within one mount namespace, which `root` stands for, the same mounts must be there for a load to go on at
    another daemon. Another namespace, such as a new container, has other mounts of the same file systems:
    there the rest of the version has to suffice.
    """

    root: str
    """Empty where the kernel has no ids of mounts that are unique: a restart compares no mounts then."""
    mounts: str

    @classmethod
    def of(cls, root: str, mounts: list[str]) -> Place:
        """`mounts` of each file in order; empty for those that are not local."""
        if not any(mounts):
            return cls("", "")
        return cls(root, hashlib.sha256("\0".join(mounts).encode()).hexdigest()[:16])

    def __str__(self) -> str:
        return f".{self.root}.{self.mounts}" if self.mounts else ""


def continues(before: str, now: str) -> bool:
    """Whether a load that began with the version `before` may go on with `now`, both as clients are told."""
    old_content, _, old_place = before.partition(".")
    content, _, place = now.partition(".")
    if old_content != content or not content:
        return False
    old_root, _, old_mounts = old_place.partition(".")
    root, _, mounts = place.partition(".")
    return not root or old_root != root or old_mounts == mounts
