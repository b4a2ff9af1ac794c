"""The version of a file, and whether the file may have changed since, by what the kernel reports. Pure,
except for `disk_sequence`.

Two files are the same version only if all of these are equal: the mount, the device and the disk in it,
inode, birth, size, mtime and ctime. None of these suffices alone. A reproducible image that is mounted in
place of another differs from it by the mount alone.

While a file is read, size and mtime must stay the same. ctime also moves if the bytes do not: by a link, a
rename or a chmod. A new ctime is accepted only if one of these shows, and no write does.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...system.statx import FileStatus


@dataclass(frozen=True, slots=True)
class Look:
    """A file at one moment: its status, and its name in the kernel."""

    status: FileStatus
    name: str


def portable_version(status: FileStatus) -> str:
    """The same for an unchanged file in each process of this machine, whatever its mount namespace."""
    major, minor = status.device
    return (
        f"file:{major:x}:{minor:x}:{disk_sequence(major, minor)}:{status.inode}:{status.birth_ns}"
        f":{status.size_bytes}:{status.mtime_ns}:{status.ctime_ns}"
    )


def disk_sequence(major: int, minor: int) -> str:
    """The number of the disk in a device. The kernel counts disks (Linux 5.15), so another image on the same
    loop device has another number. Empty for a partition, and for a device that is no disk."""
    if not major:
        return ""
    try:
        with open(f"/sys/dev/block/{major}:{minor}/diskseq", "rb") as file:
            return str(int(file.read()))
    except OSError:
        return ""


def change(before: Look, now: Look, *, watched: bool, modified: bool) -> str:
    """The reason, in words, why the bytes may have changed between two looks; empty if they did not.

    `modified`: the kernel reported a write. `watched`: it would have reported any write, except one through a
    mapping. If the file is not watched, a new mode or owner does not explain a ctime, since a copy onto the
    file that keeps its times (`cp -p`) sets these too.
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
