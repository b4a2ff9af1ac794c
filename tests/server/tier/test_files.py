"""Local files that the tier keeps: every guarantee of versions holds for what comes from the disk."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.server.errors import CheckpointChangedError
from penstock.server.sources import RetryingReader
from penstock.server.sources.file.identity import lasting_version, portable_version
from penstock.server.sources.file.local_file import FileContext, LocalFile
from penstock.server.sources.file.mounts import MountPoint, MountTable
from penstock.server.sources.file.source import FileSource
from penstock.server.sources.file.watches import Watches
from penstock.server.sources.resuming import Place, same_place
from penstock.server.system.linux import PAGE_BYTES
from penstock.server.system.statx import file_status
from penstock.server.tier.files import TierFiles
from penstock.server.tier.records import Identity
from penstock.server.tier.source import TieredFile, TieredSource
from penstock.server.tier.tier import Tier

from ...e2e.support import wait_until
from ..support import ROOT, wait_for_tick
from .bench import MIB, Thing, held, tier_in
from .conftest import Mount

SIZE = 3 * MIB + 777


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "models/one.safetensors"
    path.parent.mkdir()
    path.write_bytes(random.Random(1).randbytes(SIZE))
    wait_for_tick(tmp_path)  # a test that writes to it makes another version
    return path


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[Tier]:
    with tier_in(tmp_path / "tier") as tier:
        yield tier


@pytest.fixture
def watched() -> Iterator[FileContext]:
    """What files know of the machine; they count as settled from the first moment."""
    mounts, watches = MountTable(), Watches()
    yield FileContext(mounts, watches, settled_seconds=0)
    watches.close()
    mounts.close()


@pytest.fixture
def source(watched: FileContext) -> Iterator[FileSource]:
    with ThreadPoolExecutor(1) as workers:
        yield FileSource(lambda path, uid: workers, watched)


def opened(source: FileSource, tier: Tier, path: Path) -> TieredFile:
    file = TieredSource(source, tier).open(str(path), ROOT)
    assert isinstance(file, TieredFile)
    return file


def read(file: TieredFile, start: int = 0, end: int = SIZE) -> bytes:
    """As the reader threads do: whole pages."""
    begin = start // PAGE_BYTES * PAGE_BYTES
    target = memoryview(bytearray(-(-end // PAGE_BYTES) * PAGE_BYTES - begin))
    file.read_into(begin, [target])
    return bytes(target[start - begin : end - begin])


def keep(file: TieredFile, tier: Tier, start: int = 0, end: int = SIZE) -> None:
    data = memoryview(bytearray(read(file, start, end)))
    file.keep_bytes(start, [data])
    wait_until(lambda: not tier.waiting_bytes, "all to be written")


def disk_bytes(file: TieredFile) -> int:
    return file.take_disk_bytes(0, file.size_bytes)


def test_a_local_file_comes_from_the_disk_also_after_a_restart(
    source: FileSource, tmp_path: Path, path: Path
) -> None:
    with tier_in(tmp_path / "tier") as tier:
        file = opened(source, tier, path)
        keep(file, tier)
        assert disk_bytes(file) == 0
        assert read(file) == path.read_bytes()
        assert disk_bytes(file) == SIZE
        file.close()
    with tier_in(tmp_path / "tier") as tier:
        file = opened(source, tier, path)
        assert read(file) == path.read_bytes()
        assert disk_bytes(file) == SIZE
        assert file.has(0, SIZE)
        file.close()


def test_what_the_disk_lacks_is_read_in_whole_pages(source: FileSource, tier: Tier, path: Path) -> None:
    """Direct reads need them, and segments begin anywhere."""
    file = opened(source, tier, path)
    keep(file, tier, 100_001, 200_003)
    keep(file, tier, MIB + 1, 2 * MIB - 1)
    asked: list[tuple[int, int]] = []
    really = file._file.read_into

    def counted(offset: int, views: Sequence[memoryview]) -> None:
        asked.append((offset, sum(map(len, views))))
        really(offset, views)

    file._file.read_into = counted  # type: ignore[method-assign]
    assert read(file, 5_000, SIZE - 5_000) == path.read_bytes()[5_000:-5_000]
    assert len(asked) == 3
    assert all(offset % PAGE_BYTES == length % PAGE_BYTES == 0 for offset, length in asked)
    assert not file.has(0, SIZE)
    file.close()


def test_another_version_of_a_file_has_nothing_of_the_first(
    source: FileSource, tier: Tier, path: Path, tmp_path: Path
) -> None:
    file = opened(source, tier, path)
    keep(file, tier)
    file.close()
    times = path.stat()
    wait_for_tick(tmp_path)
    with path.open("r+b") as writing:
        writing.write(b"other bytes")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    file = opened(source, tier, path)
    assert read(file) == path.read_bytes()
    assert disk_bytes(file) == 0
    file.close()


def test_a_file_that_is_written_to_while_it_comes_from_the_disk_fails_the_load(
    source: FileSource, tier: Tier, path: Path
) -> None:
    file = opened(source, tier, path)
    keep(file, tier)
    read(file, 0, MIB)
    with path.open("r+b") as writing:
        writing.seek(2 * MIB)
        writing.write(b"other bytes")
    with pytest.raises(CheckpointChangedError):
        file.check_unchanged()
    file.close()


def test_bytes_that_were_read_after_a_write_are_not_kept_as_the_version_before(
    source: FileSource, tier: Tier, path: Path
) -> None:
    file = opened(source, tier, path)
    with path.open("r+b") as writing:
        writing.write(b"other bytes")
    with pytest.raises(CheckpointChangedError):
        RetryingReader(file).read_into(0, [memoryview(bytearray(MIB))])
    assert tier.counts["written_bytes"] == 0
    assert not file.has(0, 1)
    file.close()


def test_a_file_that_was_written_a_moment_ago_is_read_and_not_kept(tier: Tier, path: Path) -> None:
    """Another write within one step of the file system's clock would not give it another version."""
    with ThreadPoolExecutor(1) as workers:
        just_now = FileContext(settled_seconds=3600)
        file = opened(FileSource(lambda path, uid: workers, just_now), tier, path)
        keep(file, tier)
        assert file.keep() is None
        assert tier.counts["written_bytes"] == 0
        file.close()


def test_a_name_that_is_not_utf_8_is_a_name_like_others(source: FileSource, tier: Tier, path: Path) -> None:
    odd = path.with_name(os.fsdecode(b"\xff.safetensors"))
    path.rename(odd)
    file = opened(source, tier, odd)
    keep(file, tier)
    assert read(file) == odd.read_bytes()
    assert disk_bytes(file) == SIZE
    file.close()


def test_only_files_below_a_prefix_are_kept(source: FileSource, tier: Tier, path: Path) -> None:
    files = TierFiles([f"{path.parent}/"])
    kept = TieredSource(source, tier, files.cover).open(str(path), ROOT)
    assert isinstance(kept, TieredFile)
    kept.close()
    other = TieredSource(source, tier, TierFiles([f"{path.parent}x", "/nothing"]).cover)
    plain = other.open(str(path), ROOT)
    assert isinstance(plain, LocalFile)
    plain.close()
    files.name(["/nfs/named"])
    assert [files.cover(name) for name in ("/nfs/named", "/nfs/named/a", "/nfs/name", str(path))] == [
        True,
        True,
        False,
        True,
    ]
    files.name([])
    assert not files.cover("/nfs/named")


# ---- mounts --------------------------------------------------------------------------------------


def test_another_file_system_in_the_same_place_has_nothing_of_the_first(
    mount: Mount,
    source: FileSource,
    tier: Tier,
    path: Path,
    tmp_path: Path,
) -> None:
    """The same directory, mounted anew: of that only the kernel's number of the mount tells."""
    place = tmp_path / "place"
    place.mkdir()
    mount("--bind", path.parent, place)
    file = opened(source, tier, place / path.name)
    if not file.mount.isalnum():
        pytest.skip("the kernel does not tell mounts apart (Linux 6.8)")
    keep(file, tier)
    first = file.version
    subprocess.run(["umount", "--lazy", place], check=True)
    mount("--bind", path.parent, place)
    beside = opened(source, tier, place / path.name)
    assert beside.version != first
    assert read(beside) == path.read_bytes()
    assert disk_bytes(beside) == 0, "the first is still in use"
    keep(beside, tier)
    assert not beside.has(0, 1)
    beside.close()
    file.close()
    after = opened(source, tier, place / path.name)
    assert read(after) == path.read_bytes()
    assert disk_bytes(after) == 0
    keep(after, tier)
    assert after.has(0, SIZE)
    after.close()


def test_in_another_namespace_or_after_a_restart_of_the_machine_mounts_have_other_numbers(
    tmp_path: Path,
) -> None:
    thing = Thing(MIB)
    here, there = Place("boot.7f", "a"), Place("boot.80", "b")

    def of(place: Place) -> Thing:
        thing.identity = Identity(thing.identity.uri, thing.identity.version, MIB, str(place))
        return thing

    with tier_in(tmp_path / "tier") as tier:
        of(here).keep(tier)
    with tier_in(tmp_path / "tier") as tier:
        assert of(there).kept(tier) == MIB
        with held(tier, of(Place("boot.80", "c"))) as hold:
            assert hold.missing(0, MIB) == (0, MIB), "another mount, seen by the same daemon"
    with tier_in(tmp_path / "tier") as tier:
        assert tier.version_count == 0
        of(here).keep(tier)
    with tier_in(tmp_path / "tier") as tier:
        assert of(Place("boot.7f", "b")).kept(tier) == 0, "another mount in the same namespace"


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("boot.1/a", "boot.1/a", True),
        ("boot.1/a", "boot.1/b", False),
        ("boot.1/a", "boot.2/b", True),
        ("other.1/a", "boot.1/b", True),
        ("/a.3", "/b.4", True),  # the kernel does not tell
        ("", "", True),
    ],
)
def test_mounts_are_compared_within_one_namespace_only(before: str, now: str, *, same: bool) -> None:
    assert same_place(before, now) is same


def test_the_device_number_of_a_network_file_system_does_not_count_and_its_server_does(path: Path) -> None:
    with path.open("rb") as file:
        status = file_status(file.fileno())
    servers = [
        MountPoint("/nfs", kind, source).server
        for kind, source in (
            ("nfs4", "10.0.0.1:/models"),
            ("nfs4", "10.0.0.2:/models"),
            ("cifs", "//nas/models"),
        )
    ]
    assert [
        MountPoint("/", kind, source).server for kind, source in (("ext4", "/dev/sda1"), ("tmpfs", "tmpfs"))
    ] == [
        "",
        "",
    ]
    versions = [lasting_version(status, server) for server in servers]
    assert len(set(versions)) == 3
    device = f"file:{status.device[0]:x}:{status.device[1]:x}:"
    assert portable_version(status).startswith(device)
    assert not any(version.startswith(device) for version in versions)
    assert all(version.endswith(f":{status.mtime_ns}:{status.ctime_ns}") for version in versions)
    assert lasting_version(status, "") == portable_version(status)
