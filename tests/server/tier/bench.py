"""An object, tiers in real directories, and what tests do with both."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

from penstock.server.tier.directory import Directory
from penstock.server.tier.hold import Hold
from penstock.server.tier.records import PAGE_BYTES, Identity, padded
from penstock.server.tier.threads import DiskThreads
from penstock.server.tier.tier import Tier
from penstock.server.tier.version import RottenError

PATIENCE_SECONDS = 60
MIB = 1 << 20
LIMIT_BYTES = 64 * MIB


class Thing:
    """An object whose bytes are known."""

    def __init__(self, size_bytes: int, *, uri: str = "s3://bucket/key", version: str = "v1") -> None:
        self.data = random.Random(f"{uri} {version}").randbytes(size_bytes)
        self.identity = Identity(uri, version, size_bytes)

    def keep(self, tier: Tier, *ranges: tuple[int, int]) -> int:
        """Writes what is missing of the ranges, all by default; how many bytes were."""
        with held(tier, self) as hold:
            return self.keep_by(hold, *ranges)

    def keep_by(self, hold: Hold, *ranges: tuple[int, int]) -> int:
        written = 0
        for start, end in ranges or ((0, len(self.data)),):
            while (missing := hold.missing(start, end)) is not None:
                first, last = missing
                done = threading.Event()
                view = memoryview(bytearray(self.data[first:last]))
                hold.write(first, last, [view], lambda: None, done.set)
                assert done.wait(PATIENCE_SECONDS)
                if hold.version.span(first, last).block is None:
                    break  # there was no room, or the tier is off
                written += last - first
        return written

    def kept(self, tier: Tier) -> int:
        """How many bytes are kept, each of which is read and compared. Raises RottenError."""
        with held(tier, self) as hold:
            return self.compare(hold)

    def compare(self, hold: Hold) -> int:
        position = total = 0
        buffer = aligned(4 * MIB)
        while position < len(self.data):
            span = hold.version.span(position, len(self.data))
            if span.block is None:
                position = span.end
                continue
            found = hold.version.read(span.block, position, span.end, buffer)
            assert found == self.data[position : position + len(found)]
            position += len(found)
            total += len(found)
        return total


def aligned(size_bytes: int) -> memoryview:
    import mmap

    return memoryview(mmap.mmap(-1, padded(max(size_bytes, PAGE_BYTES))))


@contextlib.contextmanager
def held(tier: Tier, thing: Thing) -> Iterator[Hold]:
    hold = tier.hold(thing.identity, 0)
    try:
        yield hold
    finally:
        hold.release()


@contextlib.contextmanager
def tier_in(path: Path | Directory, limit_bytes: int = LIMIT_BYTES) -> Iterator[Tier]:
    directory = path if isinstance(path, Directory) else Directory(path)
    tier = Tier(directory, limit_bytes, threads=DiskThreads(hang_seconds=PATIENCE_SECONDS))
    try:
        yield tier
    finally:
        tier.close()


def disk_bytes(path: Path) -> int:
    """What the files take of the disk. Some may be removed meanwhile."""
    total = 0
    for file in path.iterdir():
        with contextlib.suppress(FileNotFoundError):
            total += file.stat().st_blocks * 512
    return total


__all__ = ["LIMIT_BYTES", "MIB", "RottenError", "Thing", "aligned", "disk_bytes", "held", "tier_in"]
