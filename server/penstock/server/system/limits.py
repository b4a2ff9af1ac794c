"""The limits that the machine and the container set for this process, and which users are privileged."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

OVERHEAD_BYTES = 256 << 20
"""Kept free for the interpreter, gRPC and buffers when the limit follows from the container's."""

MAX_FILE_DESCRIPTORS = 65_536
"""The most descriptors for the files of all loads together, however many the system allows."""
MOMENTARY_DESCRIPTORS = 256
"""Descriptors that are open for a moment, to list a directory or start a process, and a few that stay open:
the log, connections to S3."""


@dataclass(frozen=True, slots=True)
class MemoryBound:
    """The tightest limit of memory that applies to this process, and its origin, for messages."""

    limit_bytes: int
    origin: str


def memory_bound(root: Path = Path("/")) -> MemoryBound:
    """The smallest limit of the machine's memory and of this process's cgroups (v1 and v2), ancestors
    included."""
    bounds = [MemoryBound(proc_sizes(root / "proc/meminfo")["MemTotal"], "the machine's memory")]
    for directory, name in cgroup_limits(root):
        try:
            text = (directory / name).read_text().strip()
        except OSError:  # not every level has the file: the root of v2 has none
            continue
        if text.isdecimal():
            bounds.append(MemoryBound(int(text), f"the cgroup's {name}"))
    return min(bounds, key=lambda bound: bound.limit_bytes)


def proc_sizes(path: Path) -> dict[str, int]:
    """The sizes in a file of /proc such as meminfo, in bytes."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if line[2:] == ["kB"]}


def cgroup_limits(root: Path) -> list[tuple[Path, str]]:
    """Every (directory, file) that may hold a limit. In a container the cgroup's own path may not be visible:
    the mount point shows the cgroup as the root then, so it is looked at too."""
    found: list[tuple[Path, str]] = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # a kernel without control groups
        return found
    for line in lines:
        _, controllers, path = line.split(":", 2)
        tops: tuple[str, ...]
        if controllers == "":
            tops, name = ("sys/fs/cgroup", "sys/fs/cgroup/unified"), "memory.max"
        elif "memory" in controllers.split(","):
            tops, name = ("sys/fs/cgroup/memory",), "memory.limit_in_bytes"
        else:
            continue
        for top in tops:
            mount = root / top
            directory = mount / path.lstrip("/")
            while True:
                found.append((directory, name))
                if directory == mount or mount not in directory.parents:
                    break
                directory = directory.parent
    return found


def raise_open_files() -> int:
    """Raises the soft limit of open files to the hard one: every slab and every shard is one. Returns it."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def file_descriptors(*, slabs: int, sessions: int, connections: int) -> int:
    """How many descriptors the files of checkpoints may take.

    That is the limit of open files, less the most that others take: two for each slab (clients may hold slabs
    that the daemon has given up), one for each session, three for each connection, and
    `MOMENTARY_DESCRIPTORS`. At least an eighth of the limit, since the others rarely take the most.
    """
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = 2 * slabs + min(sessions, limit // 4) + 3 * min(connections, limit // 12) + MOMENTARY_DESCRIPTORS
    return min(MAX_FILE_DESCRIPTORS, max(limit // 8, limit - others))


def shmem_huge_pages() -> str:
    """The active word of the kernel's setting of huge pages for shared memory; "unknown" if it has none."""
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled").read_text()
    except OSError:
        return "unknown"
    return text[text.find("[") + 1 : text.find("]")]


def huge_pages_fields() -> dict[str, str]:
    """The setting, for the log, with a hint if clients would be faster with another."""
    setting = shmem_huge_pages()
    if setting in ("always", "within_size", "advise", "force"):
        return {"huge_pages": setting}
    return {
        "huge_pages": f"no ({setting})",
        "hint": "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled makes clients faster",
    }


def user_share(count: int) -> int:
    """How much of `count` a user who is not privileged may take: never all, so that others can go on."""
    return max(1, count * 7 // 8)


def is_privileged(uid: int) -> bool:
    """Root and the daemon's own user may do everything."""
    return uid in (0, os.geteuid())
