"""A directory that records what is written, and the disks that a loss of power at any moment may leave."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from penstock.server.tier.directory import LOCK, Directory
from penstock.server.tier.records import PAGE_BYTES


@dataclass(frozen=True)
class Step:
    """One system call."""

    kind: str
    """create, write, sync, truncate, remove"""
    name: str
    data: bytes = b""
    position: int = 0


class RecordingDirectory(Directory):
    """Does everything, and remembers it in `steps`."""

    def __init__(self, path: Path) -> None:
        self.steps: list[Step] = []
        self._names: dict[int, str] = {}
        super().__init__(path)

    def open(self, name: str, flags: int, *, direct: bool = False) -> int:
        new = bool(flags & os.O_CREAT) and not (self.path / name).exists()
        fd = super().open(name, flags, direct=direct)
        self._names[fd] = name
        if new and name != LOCK:
            self.note(Step("create", name))
        return fd

    def write(self, fd: int, data: bytes | memoryview, position: int) -> None:
        self.note(Step("write", self._names[fd], bytes(data), position))
        super().write(fd, data, position)

    def sync(self, fd: int) -> None:
        super().sync(fd)
        self.note(Step("sync", self._names[fd]))

    def truncate(self, name: str, size_bytes: int) -> None:
        self.note(Step("truncate", name, position=size_bytes))
        super().truncate(name, size_bytes)

    def remove(self, name: str) -> None:
        self.note(Step("remove", name))
        super().remove(name)

    def note(self, step: Step) -> None:
        self.steps.append(step)


@dataclass
class _File:
    synced: bytes = b""
    unsynced: list[Step] = field(default_factory=list)

    def after(self, choose: random.Random | None, *, all_of_it: bool) -> bytes:
        """What the disk may have of it: everything, or what was synced and any part of the rest."""
        content = self.synced
        for step in self.unsynced:
            if all_of_it:
                content = _apply(content, step)
            elif choose is not None and choose.random() < 0.5:
                pages = range(0, max(1, len(step.data)), PAGE_BYTES)
                for at in pages:  # a write may be torn at any page
                    if choose.random() < 0.7:
                        page = Step(step.kind, step.name, step.data[at : at + PAGE_BYTES], step.position + at)
                        content = _apply(content, page if step.kind == "write" else step)
        return content


def _apply(content: bytes, step: Step) -> bytes:
    if step.kind == "truncate":
        return content[: step.position].ljust(step.position, b"\0")
    end = step.position + len(step.data)
    return content[: step.position].ljust(step.position, b"\0") + step.data + content[end:]


def disks_after(steps: Sequence[Step]) -> Iterator[dict[str, bytes]]:
    """For a loss of power after each step: the disk with all that was written, with what was synced alone,
    and with parts of the rest. A file that was made or removed may be there or not."""
    files: dict[str, _File] = {}
    removed: dict[str, _File] = {}
    for number, step in enumerate(steps):
        if step.kind == "create":
            files[step.name] = _File()
        elif step.kind == "remove":
            if step.name in files:
                removed[step.name] = files.pop(step.name)
        elif step.kind == "sync":
            file = files[step.name]
            file.synced, file.unsynced = file.after(None, all_of_it=True), []
        else:
            files[step.name].unsynced.append(step)
        yield {name: file.after(None, all_of_it=True) for name, file in files.items()}
        yield {name: file.after(None, all_of_it=False) for name, file in files.items()}
        for seed in range(2):
            choose = random.Random(f"{number} {seed}")
            there = {**files, **{name: file for name, file in removed.items() if choose.random() < 0.5}}
            yield {
                name: file.after(choose, all_of_it=False)
                for name, file in there.items()
                if choose.random() < 0.9
            }
