"""Decides whether a load may go on at another daemon, by the versions that clients receive. Pure."""

from __future__ import annotations

import hashlib
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


def continues(before: str, now: str) -> bool:
    """Whether a load that began with the version `before` may go on with `now`. Both are versions that
    clients receive."""
    old_content, _, old_set = before.partition(".")
    content, _, mount_set = now.partition(".")
    if old_content != content or not content:
        return False
    old_root, _, old_mounts = old_set.partition(".")
    root, _, mounts = mount_set.partition(".")
    return not root or old_root != root or old_mounts == mounts
