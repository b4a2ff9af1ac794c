"""Namespaces, root file systems and control groups: what containers are made of."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .forked import ForkedProcess
from .support import wait_until


def cannot(reason: str) -> None:
    """Skips, which in CI is a failure (tests/conftest.py)."""
    pytest.skip(reason)


@dataclass(frozen=True, slots=True)
class Mount:
    """A directory or file of this machine at a place in a container."""

    source: Path
    place: str
    read_only: bool = False


def interpreter() -> list[Path]:
    """What Python needs of this machine, at its own place."""
    needed = {Path("/usr"), Path("/lib"), Path("/lib64"), Path("/bin"), Path(sys.prefix)}
    needed |= {Path(sys.base_prefix)} if not sys.base_prefix.startswith("/usr") else set()
    return [path for path in sorted(needed) if path.exists()]


def root_file_system(top: Path, mounts: Iterable[Mount]) -> list[str]:
    """Shell lines that make a root file system on `top`, in a mount and a pid namespace of its own.

    It holds the interpreter and the `mounts`, an empty /tmp, and an empty /dev/shm of 64 KiB.
    """
    lines = ["set -e", f"mount -t tmpfs -o mode=755 tmpfs {top}"]
    every = [*(Mount(path, str(path), read_only=True) for path in interpreter()), *mounts]
    # Outer ones first: a volume on /tmp must not hide a checkout that lies below it.
    for mount in sorted(every, key=lambda mount: len(Path(mount.place).parts)):
        target = shlex.quote(f"{top}{mount.place}")
        make = "mkdir -p" if mount.source.is_dir() else f"mkdir -p $(dirname {target}) && touch"
        lines.append(f"{make} {target} && mount --bind {shlex.quote(str(mount.source))} {target}")
        if mount.read_only:
            lines.append(f"mount -o remount,bind,ro {target}")
    return [
        *lines,
        f"mkdir -p -m 1777 {top}/tmp && mkdir -p {top}/dev/shm {top}/proc",
        f"cd {top}/dev && touch null zero urandom && cd /",
        *(f"mount --bind /dev/{name} {top}/dev/{name}" for name in ("null", "zero", "urandom")),
        f"mount -t tmpfs -o size=64k tmpfs {top}/dev/shm",
        f"mount -t proc proc {top}/proc",
    ]


def container(unshare: tuple[str, ...], top: Path, shared: dict[Path, str], code: list[Path]) -> list[str]:
    """A command prefix that runs Python in namespaces and a root file system of its own.

    That root, mounted on `top`, holds the `code` at its place, and `shared` where its values say.
    """
    top.mkdir()
    mounts = [Mount(path, str(path)) for path in code]
    mounts += [Mount(path, place) for path, place in shared.items()]
    lines = [*root_file_system(top, mounts), f'exec chroot {top} "$@"']
    search = ":".join(str(directory) for directory in code if directory.is_dir())
    return [*unshare, "sh", "-c", "\n".join(lines), "sh", "/usr/bin/env", f"PYTHONPATH={search}"]


def child_of(process: subprocess.Popen[Any] | ForkedProcess) -> int:
    """The one child of `unshare`."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    return int(wait_until(lambda: children.read_text().split(), "the first process of the namespaces")[0])


class MemoryCgroup:
    """A control group with a memory limit, of either version."""

    def __init__(self, name: str, limit_bytes: int) -> None:
        """Skips the test where control groups cannot be made."""
        top, self._files = _memory_controller()
        self.directory = top / name
        try:
            self.directory.mkdir()
            (self.directory / self._files["limit"]).write_text(str(limit_bytes))
        except OSError as error:
            cannot(f"memory control groups cannot be made here: {error}")
        self.mount = Mount(self.directory, self._files["place"], read_only=True)
        """Where a container sees its own."""

    def figure(self, name: str) -> int:
        """`usage` or `peak`, in bytes."""
        return int((self.directory / self._files[name]).read_text())

    def remove(self) -> None:
        """Once its processes are gone, which takes the kernel a moment."""

        def removed() -> bool:
            try:
                self.directory.rmdir()
            except OSError:
                return False
            return True

        wait_until(removed, "the control group to be empty")


def _memory_controller() -> tuple[Path, Mapping[str, str]]:
    """Where groups can be made, and the names of their files."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/"), {
                "limit": "memory.limit_in_bytes",
                "usage": "memory.usage_in_bytes",
                "peak": "memory.max_usage_in_bytes",
                "place": "/sys/fs/cgroup/memory",
            }
    return Path("/sys/fs/cgroup"), {
        "limit": "memory.max",
        "usage": "memory.current",
        "peak": "memory.peak",
        "place": "/sys/fs/cgroup",
    }
