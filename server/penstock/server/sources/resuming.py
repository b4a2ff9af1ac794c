"""Decides whether a load may go on at another daemon, and whether a file is the one that an earlier daemon
read: by the versions that clients receive, and by mounts as the tier remembers them. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MountSet:
    """The mounts through which a load's files were opened, as a suffix of the version that clients receive.

    `root` identifies a mount namespace. Within one, a load goes on at another daemon only if the mounts are
    the same. Another namespace, such as a new container, has other mounts of the same file systems. There the
    rest of the version has to suffice.
    """

    root: str
    """Empty if the kernel has no unique ids of mounts. Mounts are not compared then."""
    mounts: str

    @classmethod
    def of(cls, root: str, mounts: list[str]) -> MountSet:
        """`mounts` has the mount of each file, in order; empty for files that are not local."""
        if not any(mounts):
            return cls("", "")
        return cls(root, hashlib.sha256("\0".join(mounts).encode()).hexdigest()[:16])

    def __str__(self) -> str:
        return f".{self.root}.{self.mounts}" if self.mounts else ""


def seen_writes(counts: Sequence[int]) -> str:
    """A part of the version that clients receive, before the mounts: how many writes to each file this daemon
    has seen. It tells apart what one daemon keeps. Another daemon has seen others, so `continues` leaves it
    out."""
    return "+" + hashlib.sha256(repr(list(counts)).encode()).hexdigest()[:8] if any(counts) else ""


def continues(before: str, now: str) -> bool:
    """Whether a load that began with the version `before` may go on with `now`. Both are versions that
    clients receive."""
    old_content, _, old_set = before.partition(".")
    content, _, mount_set = now.partition(".")
    old_content, content = old_content.partition("+")[0], content.partition("+")[0]
    if old_content != content or not content:
        return False
    old_root, _, old_mounts = old_set.partition(".")
    root, _, mounts = mount_set.partition(".")
    return not root or old_root != root or old_mounts == mounts


@dataclass(frozen=True, slots=True)
class Place:
    """The mount that a local file was opened through, as a text that outlives the daemon."""

    namespace: str
    """The boot and the mount namespace; empty where the kernel has no ids of mounts that are unique."""
    mount: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.mount}"


def same_place(before: str, now: str) -> bool:
    """Whether files may be the same, going by the mounts that they were opened through: the rule of
    `continues`. Within one mount namespace the mount must be the same. Another namespace, such as a new
    container or the machine after a restart, has other mounts of the same file systems."""
    old_namespace, _, old_mount = before.rpartition("/")
    namespace, _, mount = now.rpartition("/")
    return not namespace or namespace != old_namespace or mount == old_mount
