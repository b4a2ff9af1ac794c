"""Which version of a file it is, and whether that may have changed since: decided from what the kernel says.
Pure but for `disk_sequence`.

Two files are the same version only if everything is equal that the kernel has to tell them apart: the mount,
the device and which disk was in it, inode, birth, size, mtime and ctime. None of these suffices alone: a
reproducible image mounted in another's place has all but the mount.

While a file is read, size and mtime must stay. ctime also moves when the bytes do not: by a link, a rename, a
chmod. It is taken for one of these only if that shows, and no write does.
"""

from __future__ import annotations

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
    return f"file:{major:x}:{minor:x}:{disk_sequence(major, minor)}{_of_inode(status)}"


def lasting_version(status: FileStatus, server: str) -> str:
    """The same after the machine was started again. Of a network file system the server and its export stand
    in place of the device, since the kernel numbers such devices as they are mounted."""
    return f"file:{server}{_of_inode(status)}" if server else portable_version(status)


def _of_inode(status: FileStatus) -> str:
    return f":{status.inode}:{status.birth_ns}:{status.size_bytes}:{status.mtime_ns}:{status.ctime_ns}"


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
