"""Disks that are full, read-only, failing, or that hang: real ones, mounted for the test."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.server.errors import AccessDeniedError
from penstock.server.sources import Access, Source
from penstock.server.sources.checksums import Checksum
from penstock.server.tier.directory import BLOCKS, Directory
from penstock.server.tier.opening import open_tier
from penstock.server.tier.records import Identity
from penstock.server.tier.source import TieredFile, TieredSource
from penstock.server.tier.threads import READ_BYTES
from penstock.server.tier.tier import Tier

from ...attacks.fuse import FuseFileSystem
from ...e2e.support import wait_until
from ..support import ROOT
from .bench import MIB, PATIENCE_SECONDS, Thing, disk_bytes, held, tier_in
from .conftest import Mount


@pytest.fixture
def small(mount: Mount, tmp_path: Path) -> Path:
    """A disk of 4 MiB."""
    (tmp_path / "disk").mkdir()
    return mount("-t", "tmpfs", "-o", "size=4m,mode=700", "penstock", tmp_path / "disk")


class Stored:
    """A file of a store, whose reads are counted."""

    kind = "s3"
    listed_version = mount = mount_point = ""
    checksums: Sequence[Checksum] = ()
    alignment = 1
    give_up_at = float("inf")

    def __init__(self, thing: Thing) -> None:
        self.uri = thing.identity.uri
        self.version = self.portable_version = thing.identity.version
        self.writes_before = 0
        self.size_bytes = thing.identity.size_bytes
        self.data = thing.data
        self.reads: list[tuple[int, int]] = []

    def read_into(self, offset: int, views: list[memoryview]) -> None:
        start = offset
        for view in views:
            part = self.data[offset : offset + len(view)]
            view[: len(part)] = part
            offset += len(part)
        self.reads.append((start, offset))

    def check_unchanged(self) -> None:
        """It is."""

    def unmounted(self) -> bool:
        return False

    def close(self) -> None:
        """Nothing."""


def opened(tier: Tier, thing: Thing) -> tuple[TieredFile, Stored]:
    """The file as a load has it, and the store's."""
    stored = Stored(thing)
    hold = tier.hold(thing.identity, 0)
    return TieredFile(stored, tier, thing.identity, hold, 0), stored  # type: ignore[arg-type]


def load(file: TieredFile, start: int, end: int) -> bytes:
    """In two pieces of memory, as across the border of slabs."""
    target = memoryview(bytearray(end - start))
    middle = (end - start) // 3
    file.read_into(start, [target[:middle], target[middle:]])
    return bytes(target)


def test_what_the_disk_has_is_not_asked_of_the_store(tmp_path: Path) -> None:
    thing = Thing(5 * MIB)
    with tier_in(tmp_path / "tier") as tier:
        thing.keep(tier, (MIB, 2 * MIB), (3 * MIB, 5 * MIB))
        file, stored = opened(tier, thing)
        assert load(file, 100, 5 * MIB) == thing.data[100:]
        assert stored.reads == [(100, MIB), (2 * MIB, 3 * MIB)]
        assert load(file, MIB + 1, 2 * MIB - 1) == thing.data[MIB + 1 : 2 * MIB - 1]
        assert len(stored.reads) == 2
        assert tier.counts["read_bytes"] == 4 * MIB - 2
        file.close()


def test_bytes_that_are_read_again_count_as_what_they_came_from_last(tmp_path: Path) -> None:
    thing = Thing(2 * MIB)
    with tier_in(tmp_path / "tier") as tier:
        thing.keep(tier)
        file, _ = opened(tier, thing)
        for _ in range(2):
            load(file, 0, 2 * MIB)
        tier.drop(thing.identity.uri, thing.identity.version, although_pinned=True)
        load(file, MIB, 2 * MIB)
        assert file.take_disk_bytes(0, 2 * MIB) == MIB
        assert file.take_disk_bytes(0, 2 * MIB) == 0
        file.close()


@pytest.mark.parametrize(
    ("rotten_at", "from_disk"),
    [(0, 0), (READ_BYTES - 1, 0), (READ_BYTES, READ_BYTES), (3 * READ_BYTES - 1, 2 * READ_BYTES)],
)
def test_rotten_bytes_come_from_the_store(rotten_at: int, from_disk: int, tmp_path: Path) -> None:
    """And what a thread read behind them, while another found them."""
    thing = Thing(7 * MIB)
    with tier_in(tmp_path / "tier") as tier:
        thing.keep(tier)
        (blocks,) = (tmp_path / "tier").glob(f"*{BLOCKS}")
        content = bytearray(blocks.read_bytes())
        content[rotten_at] ^= 1
        blocks.write_bytes(content)
        file, stored = opened(tier, thing)
        assert load(file, 0, 7 * MIB) == thing.data
        assert stored.reads == [(from_disk, 7 * MIB)]
        assert tier.counts["failed_reads"] == 1
        assert tier.counts["read_bytes"] == from_disk
        file.close()


def test_a_full_disk_turns_the_tier_off_and_what_it_has_is_still_read(small: Path) -> None:
    first, second = Thing(2 * MIB, uri="s3://b/1"), Thing(4 * MIB, uri="s3://b/2")
    with tier_in(small) as tier:
        assert first.keep(tier) == 2 * MIB
        assert second.keep(tier) == 0
        assert tier.off_because == os.strerror(errno.ENOSPC)
        assert not tier.free
        assert first.kept(tier) == 2 * MIB
        file, _ = opened(tier, second)
        assert load(file, 0, 4 * MIB) == second.data
        file.close()
    with tier_in(small) as tier:
        assert first.kept(tier) == 2 * MIB


def test_a_disk_that_becomes_read_only_turns_the_tier_off(small: Path, mount: Mount) -> None:
    first, second = Thing(MIB, uri="s3://b/1"), Thing(MIB, uri="s3://b/2")
    with tier_in(small) as tier:
        first.keep(tier)
        mount("-o", "remount,ro", small)
        assert second.keep(tier) == 0
        assert tier.off_because == os.strerror(errno.EROFS)
        assert first.kept(tier) == MIB


def test_on_a_read_only_disk_there_is_no_tier(
    small: Path, mount: Mount, caplog: pytest.LogCaptureFixture
) -> None:
    mount("-o", "remount,ro", small)
    assert open_tier(small / "tier", MIB) is None
    (record,) = caplog.records
    assert record.__dict__["fields"]["why"] == os.strerror(errno.EROFS)


@pytest.mark.parametrize("call", ["write", "sync", "open"])
def test_a_disk_that_fails_in_writing_turns_the_tier_off_and_costs_no_load(
    tmp_path: Path, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(Directory):
        broken = False

    def fails(self: Failing, *given: object, **named: object) -> object:
        if self.broken:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return getattr(Directory, call)(self, *given, **named)

    setattr(Failing, call, fails)
    first, second = Thing(MIB, uri="s3://b/1"), Thing(MIB, uri="s3://b/2")
    directory = Failing(tmp_path / "tier")
    with tier_in(directory) as tier:
        first.keep(tier)
        directory.broken = True
        assert second.keep(tier) == 0
        assert tier.off_because == os.strerror(errno.EIO)
        assert not tier.free
        file, _ = opened(tier, second)
        assert load(file, 0, MIB) == second.data
        file.close()
        file, stored = opened(tier, first)
        assert load(file, 0, MIB) == first.data
        assert bool(stored.reads) is (call == "open")
        file.close()
    assert [record.message for record in caplog.records].count("tier off") == 1
    with tier_in(tmp_path / "tier") as tier:
        assert first.kept(tier) == MIB
        assert second.kept(tier) == 0


class FailingDisk(FuseFileSystem):
    """Reads fail with EIO."""

    def _answer(self, operation: int, inode: int, body: bytes) -> tuple[int, bytes]:
        if operation == 15:  # read
            return errno.EIO, b""
        return super()._answer(operation, inode, body)


def on_fuse(
    stack: ExitStack, mount: Mount, tmp_path: Path, kind: type[FuseFileSystem]
) -> tuple[FuseFileSystem, Path]:
    """The blocks in the tier are from now on those of such a disk."""
    (blocks,) = (tmp_path / "tier").glob(f"*{BLOCKS}")
    try:
        system = kind(tmp_path / "fuse", {"blocks": blocks.read_bytes()})
    except OSError as error:
        pytest.skip(f"FUSE cannot be mounted here: {error}")
    stack.callback(system.close)
    return system, mount("--bind", tmp_path / "fuse" / "blocks", blocks)


def test_bytes_that_cannot_be_read_come_from_the_store(mount: Mount, tmp_path: Path) -> None:
    thing = Thing(MIB)
    with ExitStack() as stack, tier_in(tmp_path / "tier") as tier:
        thing.keep(tier)
        on_fuse(stack, mount, tmp_path, FailingDisk)
        file, stored = opened(tier, thing)
        assert load(file, 0, MIB) == thing.data
        assert stored.reads == [(0, MIB)]
        assert tier.counts["failed_reads"] == 1
        file.close()


def test_a_disk_that_hangs_holds_up_no_load_and_never_writes_into_memory_that_was_given_back(
    mount: Mount, tmp_path: Path
) -> None:
    thing, other = Thing(MIB), Thing(MIB, uri="s3://b/2")
    with ExitStack() as stack, tier_in(tmp_path / "tier") as tier:
        thing.keep(tier)
        system, _ = on_fuse(stack, mount, tmp_path, FuseFileSystem)
        system.hang("read")
        file, stored = opened(tier, thing)
        tier.threads._hang_seconds = 0.5  # before, a slow machine was no disk that hangs
        target = memoryview(bytearray(MIB))
        file.read_into(0, [target])
        assert target == thing.data
        assert stored.reads == [(0, MIB)]
        assert load(file, 0, MIB) == thing.data
        # Others are not even asked of the disk as long as it hangs.
        file2, _ = opened(tier, other)
        assert load(file2, 0, MIB) == other.data
        target[:] = bytes(MIB)  # another load's by now
        system.release()
        wait_until(lambda: not tier.threads._began, "the disk to answer again")
        assert target == bytes(MIB)
        tier.threads._hang_seconds = PATIENCE_SECONDS
        before = len(stored.reads)
        assert load(file, 0, MIB) == thing.data
        assert len(stored.reads) == before, "the disk answers again, and is not asked"
        file.close()
        file2.close()


def test_a_disk_that_hangs_in_writing_takes_its_threads_and_no_memory_of_loads(tmp_path: Path) -> None:
    class Hanging(Directory):
        def sync(self, fd: int) -> None:
            assert released.wait(PATIENCE_SECONDS)
            super().sync(fd)

    released = threading.Event()
    things = [Thing(MIB, uri=f"s3://b/{number}") for number in range(3)]
    with tier_in(Hanging(tmp_path / "tier")) as tier, ExitStack() as stack:
        copied = [threading.Event() for _ in things]
        done = [threading.Event() for _ in things]
        for number, thing in enumerate(things[:2]):
            hold = stack.enter_context(held(tier, thing))
            hold.write(0, MIB, [memoryview(bytearray(thing.data))], copied[number].set, done[number].set)
            assert copied[number].wait(PATIENCE_SECONDS)
        assert not tier.free, "a third write would wait for the disk"
        file, _ = opened(tier, things[2])
        assert load(file, 0, MIB) == things[2].data
        file.close()
        released.set()
        assert all(event.wait(PATIENCE_SECONDS) for event in done[:2])
        assert tier.free


def test_no_write_begins_that_would_wait_for_a_removal_on_a_disk_that_hangs(tmp_path: Path) -> None:
    """A segment would be held until then."""

    class Hanging(Directory):
        def remove(self, name: str) -> None:
            assert released.wait(PATIENCE_SECONDS)
            super().remove(name)

    released, freed = threading.Event(), threading.Event()
    things = [Thing(MIB, uri=f"s3://b/{number}") for number in range(2)]
    with tier_in(Hanging(tmp_path / "tier")) as tier:
        tier.call_when_free(freed.set)
        for thing in things:
            thing.keep(tier)
            assert tier.free
            tier.drop(thing.identity.uri, thing.identity.version, although_pinned=True)
        assert not tier.free
        assert not freed.is_set()
        released.set()
        assert freed.wait(PATIENCE_SECONDS)
        wait_until(lambda: tier.free and tier.used_bytes == 0, "both removals to end")


def test_headers_that_wait_for_a_disk_that_hangs_are_bounded(tmp_path: Path) -> None:
    class Hanging(Directory):
        def sync(self, fd: int) -> None:
            assert released.wait(PATIENCE_SECONDS)
            super().sync(fd)

    released = threading.Event()
    things = [Thing(4 * MIB, uri=f"s3://b/{number}") for number in range(8)]
    with tier_in(Hanging(tmp_path / "tier")) as tier:
        for thing in things:
            file, _ = opened(tier, thing)
            file.keep_bytes(0, [memoryview(thing.data)])
            file.close()
        freed = threading.Event()
        tier.call_when_free(freed.set)
        released.set()
        assert freed.wait(PATIENCE_SECONDS)
        wait_until(lambda: not tier.writes, "all that waited to be written")
        assert sum(thing.kept(tier) for thing in things) == 4 * 4 * MIB  # what WAITING_BYTES allow


def test_very_short_ones_that_wait_are_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hanging(Directory):
        def sync(self, fd: int) -> None:
            assert released.wait(PATIENCE_SECONDS)
            super().sync(fd)

    monkeypatch.setattr("penstock.server.tier.writing.WAITING_BYTES", 64 << 10)
    released = threading.Event()
    things = [Thing(1, uri=f"s3://b/{number}") for number in range(8)]
    with tier_in(Hanging(tmp_path / "tier")) as tier:
        for thing in things:
            file, _ = opened(tier, thing)
            file.keep_bytes(0, [memoryview(thing.data)])
            file.close()
        released.set()
        wait_until(lambda: not tier.writes, "all that waited to be written")
        assert sum(thing.kept(tier) for thing in things) == 4


@pytest.mark.parametrize("kept_before", [True, False])
def test_what_was_opened_while_the_disk_hung_gets_nothing_of_another_mount(
    tmp_path: Path, *, kept_before: bool
) -> None:
    """Two files in one place, of two mounts; the first was opened when nothing of it could be looked up."""

    class Hanging(Directory):
        hangs = False

        def read_all(self, name: str) -> bytes:
            assert not self.hangs or released.wait(PATIENCE_SECONDS)
            return super().read_all(name)

    thing, released = Thing(MIB), threading.Event()

    def on(mount: str) -> Identity:
        return replace(thing.identity, place=f"boot.1/{mount}")

    if kept_before:
        with tier_in(tmp_path / "tier") as tier:
            thing.identity = on("a")
            thing.keep(tier)
    directory = Hanging(tmp_path / "tier")
    with tier_in(directory) as tier:
        directory.hangs = True
        if kept_before:  # else nothing is looked up, and a slow machine is no disk that hangs
            tier.threads._hang_seconds = 0.5
        first = tier.hold(on("a"), 0)
        assert (first.missing(0, MIB) is None) is kept_before
        released.set()
        wait_until(lambda: not tier.threads._began, "the disk to answer again")
        tier.threads._hang_seconds = PATIENCE_SECONDS
        thing.identity = on("b")
        with held(tier, thing) as second:
            thing.keep_by(second)
            assert first.version.span(0, MIB).block is None
            assert second.version.span(0, MIB).block is None or kept_before
        first.release()
        wait_until(lambda: tier.used_bytes == disk_bytes(tmp_path / "tier"), "the count to be right again")


class Kept:
    """A source of one file, which says what it was asked to remember."""

    kind = "s3"
    schemes = ("s3",)
    descriptors_per_file = 0
    patience_seconds = 60.0

    def __init__(self, thing: Thing) -> None:
        self.thing = thing
        self.remembered: list[str] = []

    def open(self, location: str, access: Access) -> Stored:
        return Stored(self.thing)

    def remember(self, location: str) -> None:
        self.remembered.append(location)

    def permit(self, location: str, access: Access) -> None:
        """Everybody."""


def test_of_an_object_that_is_kept_the_source_asks_for_the_version_alone(tmp_path: Path) -> None:
    thing = Thing(MIB)
    source = Kept(thing)
    with tier_in(tmp_path / "tier") as tier:
        tiered = TieredSource(source, tier)  # type: ignore[arg-type]
        tiered.open(thing.identity.uri, ROOT).close()
        assert source.remembered == []
        thing.keep(tier)
    with tier_in(tmp_path / "tier") as tier:
        tiered = TieredSource(source, tier)  # type: ignore[arg-type]
        tiered.open(thing.identity.uri, ROOT).close()
        assert source.remembered == [thing.identity.uri]


def test_a_source_that_refuses_is_not_bypassed(tmp_path: Path) -> None:
    class Refusing(Kept):
        def open(self, location: str, access: Access) -> Stored:
            raise AccessDeniedError("refused")

    thing = Thing(MIB)
    with tier_in(tmp_path / "tier") as tier:
        thing.keep(tier)
        refusing: Source = Refusing(thing)  # type: ignore[assignment]
        with pytest.raises(AccessDeniedError):
            TieredSource(refusing, tier).open(thing.identity.uri, ROOT)
