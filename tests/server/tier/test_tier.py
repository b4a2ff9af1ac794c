"""What is kept, found again, and goes for others: on a real disk."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from penstock.server.errors import ConfigError
from penstock.server.sources.replies import StoreUnreachableError
from penstock.server.tier.directory import BLOCKS, RECORDS, Directory, LockedError
from penstock.server.tier.opening import open_tier
from penstock.server.tier.records import BLOCK_BYTES, MIN_BLOCKS
from penstock.server.tier.source import StoredFile, TieredFile
from penstock.server.tier.tier import Tier

from ..support import until_true
from .bench import MIB, RottenError, Thing, disk_bytes, held, tier_in


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def files(path: Path, suffix: str) -> list[Path]:
    return sorted(path.glob(f"*{suffix}"))


# ---- keeping -------------------------------------------------------------------------------------


def test_what_was_kept_is_there_after_a_restart(path: Path) -> None:
    thing = Thing(3 * BLOCK_BYTES + 12345)
    with tier_in(path) as tier:
        assert thing.keep(tier) == len(thing.data)
        assert thing.kept(tier) == len(thing.data)
    with tier_in(path) as tier:
        assert thing.kept(tier) == len(thing.data)
        assert thing.keep(tier) == 0


def test_parts_add_up_whatever_their_borders(path: Path) -> None:
    thing = Thing(2 * MIB + 17)
    with tier_in(path) as tier:
        assert thing.keep(tier, (5, 100_000), (99_999, 1_000_001)) == 999_996
    with tier_in(path) as tier:
        assert thing.kept(tier) == 999_996
        assert thing.keep(tier) == len(thing.data) - 999_996
        assert thing.kept(tier) == len(thing.data)


def test_another_version_has_nothing_of_the_first(path: Path) -> None:
    old, new = Thing(MIB), Thing(MIB, version="v2")
    with tier_in(path) as tier:
        old.keep(tier)
        assert new.kept(tier) == 0
        assert old.kept(tier) == len(old.data)


def test_what_is_being_written_is_not_missing(path: Path) -> None:
    thing = Thing(MIB)
    with tier_in(path) as tier, held(tier, thing) as hold:
        hold.version.begin_write(1000, 5000)
        assert hold.missing(0, MIB) == (0, 1000)
        assert hold.missing(2000, MIB) == (5000, MIB)
        hold.version.end_write(1000, 5000)
        assert hold.missing(0, MIB) == (0, MIB)


def test_the_views_are_free_before_the_disk_is_asked(path: Path) -> None:
    class Slow(Directory):
        def write(self, fd: int, data: bytes | memoryview, position: int) -> None:
            assert copied.wait(60)
            super().write(fd, data, position)

    copied, done = threading.Event(), threading.Event()
    with tier_in(Slow(path)) as tier, held(tier, Thing(MIB)) as hold:
        hold.write(0, MIB, [memoryview(bytearray(MIB))], copied.set, done.set)
        assert done.wait(60)


# ---- rot -----------------------------------------------------------------------------------------


def test_rotten_bytes_are_not_given_and_are_written_again(path: Path) -> None:
    thing = Thing(2 * MIB)
    with tier_in(path) as tier:
        thing.keep(tier)
        (blocks,) = files(path, BLOCKS)
        with blocks.open("r+b") as file:
            file.seek(MIB + 5)
            byte = file.read(1)
            file.seek(MIB + 5)
            file.write(bytes([byte[0] ^ 1]))
        with held(tier, thing) as hold:
            with pytest.raises(RottenError):
                thing.compare(hold)
            hold.version.forget(MIB, 2 * MIB)
            assert thing.compare(hold) == MIB
            assert thing.keep_by(hold) == MIB
    with tier_in(path) as tier:
        assert thing.kept(tier) == len(thing.data), "the rotten record came back"


# ---- damage --------------------------------------------------------------------------------------


def drop(tier: Tier, thing: Thing, *, although_pinned: bool = True) -> None:
    tier.drop(thing.identity.uri, thing.identity.version, although_pinned=although_pinned)


def test_of_a_version_that_is_dropped_nothing_is_given_and_its_files_go(path: Path) -> None:
    damaged, other = Thing(MIB), Thing(MIB, version="v2")
    with tier_in(path) as tier:
        for thing in (damaged, other):
            thing.keep(tier)
        drop(tier, damaged)
        until_true(lambda: len(files(path, BLOCKS)) == 1 and tier.used_bytes == disk_bytes(path))
        assert [thing.kept(tier) for thing in (damaged, other)] == [0, MIB]
        assert damaged.keep(tier) == MIB
        assert damaged.kept(tier) == MIB
    with tier_in(path) as tier:
        assert damaged.kept(tier) == MIB


def test_who_uses_a_version_that_is_dropped_gets_no_more_of_it_and_its_files_go_later(path: Path) -> None:
    thing = Thing(2 * MIB)
    with tier_in(path) as tier:
        with held(tier, thing) as hold:
            thing.keep_by(hold, (0, MIB))
            drop(tier, thing)
            assert thing.compare(hold) == 0
            assert hold.missing(0, 2 * MIB) is None
            assert thing.keep(tier) == 2 * MIB, "others begin anew meanwhile"
            assert len(files(path, BLOCKS)) == 2
        until_true(lambda: len(files(path, BLOCKS)) == 1 and tier.used_bytes == disk_bytes(path))
        assert thing.kept(tier) == 2 * MIB


def test_what_is_being_written_of_a_version_that_is_dropped_is_not_given(path: Path) -> None:
    class Slow(Directory):
        def write(self, fd: int, data: bytes | memoryview, position: int) -> None:
            writing.set()
            assert dropped.wait(60)
            super().write(fd, data, position)

    writing, dropped, done = threading.Event(), threading.Event(), threading.Event()
    thing = Thing(MIB)
    with tier_in(Slow(path)) as tier:
        with held(tier, thing) as hold:
            hold.write(0, MIB, [memoryview(bytearray(thing.data))], lambda: None, done.set)
            assert writing.wait(60)
            drop(tier, thing)
            dropped.set()
            assert done.wait(60)
            assert thing.compare(hold) == 0
        until_true(lambda: not files(path, BLOCKS) and not tier.used_bytes)
        assert not tier.off_because


def test_a_pinned_version_is_dropped_only_if_it_is_surely_damaged(path: Path) -> None:
    thing = Thing(MIB)
    with tier_in(path) as tier, held(tier, thing) as hold:
        thing.keep_by(hold)
        hold.pin(True)
        drop(tier, thing, although_pinned=False)
        assert thing.compare(hold) == MIB
        drop(tier, thing)
        assert thing.compare(hold) == 0


def test_behind_a_torn_record_others_can_be_written(path: Path) -> None:
    thing = Thing(2 * MIB)
    with tier_in(path) as tier:
        thing.keep(tier, (0, MIB), (MIB, 2 * MIB))
    (records,) = files(path, RECORDS)
    os.truncate(records, records.stat().st_size - 1)
    with tier_in(path) as tier:
        assert thing.kept(tier) == MIB
        assert thing.keep(tier) == MIB
    with tier_in(path) as tier:
        assert thing.kept(tier) == len(thing.data)


def test_blocks_without_records_and_records_without_blocks_are_removed(path: Path) -> None:
    with tier_in(path) as tier:
        Thing(MIB).keep(tier)
        Thing(MIB, version="v2").keep(tier)
    (first, second) = files(path, RECORDS)
    first.unlink()
    second.with_suffix(BLOCKS).unlink()
    with tier_in(path) as tier:
        assert tier.used_bytes == 0
    assert [file.name for file in path.iterdir()] == ["lock"]


def test_records_that_are_all_rotten_are_replaced(path: Path) -> None:
    thing = Thing(MIB)
    with tier_in(path) as tier:
        thing.keep(tier)
    (records,) = files(path, RECORDS)
    records.write_bytes(b"x" * 1000)
    with tier_in(path) as tier:
        assert thing.keep(tier) == MIB
        assert thing.kept(tier) == MIB
        assert tier.used_bytes == disk_bytes(path)


# ---- the limit -----------------------------------------------------------------------------------


def test_the_disk_never_has_more_than_the_limit_and_the_least_recently_used_goes_first(path: Path) -> None:
    limit = 10 * MIB
    things = [Thing(3 * MIB, uri=f"s3://bucket/{number}") for number in range(5)]
    with tier_in(path, limit) as tier:
        for thing in things[:3]:
            assert thing.keep(tier) == 3 * MIB
            assert disk_bytes(path) <= limit
        assert things[0].kept(tier) == 3 * MIB  # used again
        assert things[3].keep(tier) == 3 * MIB
        assert disk_bytes(path) <= limit
        assert [bool(thing.kept(tier)) for thing in things] == [True, False, True, True, False]
        assert tier.counts["evictions"] == 1


def test_the_order_of_use_outlives_a_restart(path: Path) -> None:
    first, second = Thing(3 * MIB, uri="s3://b/1"), Thing(3 * MIB, uri="s3://b/2")
    with tier_in(path) as tier:
        first.keep(tier)
        second.keep(tier)
    for records, used_at in zip(files(path, RECORDS), (1, 2), strict=True):
        os.utime(records, (used_at, used_at))
    with tier_in(path) as tier:
        first.kept(tier)
    with tier_in(path, 4 * MIB) as tier:
        assert first.kept(tier) == 3 * MIB
        assert second.kept(tier) == 0


def test_what_is_outdated_stays_so_although_more_of_it_is_written(path: Path) -> None:
    thing = Thing(2 * MIB)
    with tier_in(path) as tier, held(tier, thing) as hold:
        for end in (MIB, 2 * MIB):
            assert thing.keep_by(hold, (0, end)) == MIB
            tier.outdate(thing.identity.uri, 0)
    (records,) = files(path, RECORDS)
    assert records.stat().st_mtime == 0
    with tier_in(path) as tier:
        assert thing.kept(tier) == 2 * MIB
        assert tier.is_latest(thing.identity)


def test_a_limit_that_was_lowered_holds_from_the_start(path: Path) -> None:
    with tier_in(path) as tier:
        for number in range(4):
            Thing(2 * MIB, uri=f"s3://bucket/{number}").keep(tier)
    with tier_in(path, 5 * MIB) as tier:
        assert tier.version_count == 2
        assert disk_bytes(path) <= 5 * MIB


def test_versions_in_use_stay_and_a_checkpoint_larger_than_the_limit_keeps_what_fits(path: Path) -> None:
    shards = [Thing(3 * MIB, uri=f"s3://bucket/{number}") for number in range(4)]
    for _ in range(2):  # also when what fits is there already
        with tier_in(path, 8 * MIB) as tier:
            holds = [tier.hold(shard.identity, 0) for shard in shards]
            for shard, hold in zip(shards, holds, strict=True):
                shard.keep_by(hold)
            kept = [shard.compare(hold) for shard, hold in zip(shards, holds, strict=True)]
            assert kept == [3 * MIB, 3 * MIB, 0, 0]
            assert tier.counts["evictions"] == 0
            for hold in holds:
                hold.release()
    assert disk_bytes(path) <= 8 * MIB


def test_pinned_versions_go_last(path: Path) -> None:
    pinned, plain, new = (Thing(3 * MIB, uri=f"s3://bucket/{number}") for number in range(3))
    with tier_in(path, 8 * MIB) as tier:
        hold = tier.hold(pinned.identity, 0)
        pinned.keep_by(hold)
        hold.pin(True)
        hold.rest()
        plain.keep(tier)
        new.keep(tier)
        assert [bool(thing.kept(tier)) for thing in (pinned, plain, new)] == [True, False, True]
        hold.release()
        Thing(3 * MIB, uri="s3://bucket/another").keep(tier)
        assert pinned.kept(tier) == 0, "the pin outlived its hold"


def test_no_more_versions_are_kept_than_the_daemon_can_remember(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    things = [Thing(100, uri=f"s3://bucket/{number}") for number in range(6)]
    with tier_in(path) as tier:
        things[0].keep(tier)
        monkeypatch.setattr("penstock.server.tier.versions.MAX_VERSIONS", 3)
        for thing in things[1:5]:
            assert thing.keep(tier) == 100
        assert [tier.has(thing.identity.uri) for thing in things[:5]] == [False, False, True, True, True]
        holds = [tier.hold(thing.identity, 0) for thing in things[2:5]]
        assert things[5].keep(tier) == 0, "all others are in use"
        for hold in holds:
            hold.release()
    monkeypatch.setattr("penstock.server.tier.versions.MAX_VERSIONS", 2)
    with tier_in(path) as tier:
        assert tier.version_count == 2
        assert tier.used_bytes == disk_bytes(path)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
@pytest.mark.parametrize("suffix", [BLOCKS, RECORDS])
def test_a_daemon_that_lacks_descriptors_for_a_moment_goes_on_with_its_tier(
    path: Path, suffix: str, number: int
) -> None:
    class Lacking(Directory):
        lacks = False

        def open(self, name: str, flags: int, *, direct: bool = False) -> int:
            if self.lacks and name.endswith(suffix):
                raise OSError(number, os.strerror(number))
            return super().open(name, flags, direct=direct)

    thing, directory = Thing(2 * MIB), Lacking(path)
    with tier_in(directory) as tier, held(tier, thing) as hold:
        assert thing.keep_by(hold, (0, MIB)) == MIB
        directory.lacks = True
        assert thing.keep_by(hold) == 0
        file = TieredFile(StoredFile("s3", thing.identity), tier, thing.identity, hold.again(), 0)
        if suffix == BLOCKS:
            with pytest.raises(StoreUnreachableError):  # this time
                file.read_into(0, [memoryview(bytearray(MIB))])
        assert disk_bytes(path) <= tier.used_bytes
        directory.lacks = False
        assert (tier.off_because, tier.counts["failed_reads"]) == ("", 0)
        assert thing.keep_by(hold) == MIB
        assert thing.compare(hold) == 2 * MIB
        assert disk_bytes(path) <= tier.used_bytes
        file.close()


def test_thousands_of_versions(path: Path) -> None:
    count = 2000
    with tier_in(path) as tier:
        Thing(100).keep(tier)
    (records,), (blocks,) = files(path, RECORDS), files(path, BLOCKS)
    for number in range(count):
        stem = f"{number:024x}-{number:032x}-00000000"
        (path / f"{stem}{RECORDS}").write_bytes(records.read_bytes())
        (path / f"{stem}{BLOCKS}").write_bytes(blocks.read_bytes())
    with tier_in(path, 64 * MIB) as tier:
        assert tier.version_count == count + 1
        assert tier.used_bytes == disk_bytes(path)
    with tier_in(path, MIB) as tier:
        assert tier.used_bytes <= MIB
        assert disk_bytes(path) <= MIB


# ---- whose directory it is -----------------------------------------------------------------------


def test_the_directory_is_the_daemon_s_alone(path: Path) -> None:
    with tier_in(path) as tier:
        Thing(MIB).keep(tier)
    assert path.stat().st_mode & 0o777 == 0o700
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o600}


def test_a_second_daemon_runs_without_the_tier_and_says_so(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with tier_in(path):
        with pytest.raises(LockedError):
            Directory(path)
        assert open_tier(path, MIB) is None
    (record,) = caplog.records
    assert record.__dict__["fields"]["why"] == "another penstockd has it"
    tier = open_tier(path, MIB)
    assert tier is not None
    tier.close()


def test_a_directory_that_others_can_enter_is_refused(path: Path) -> None:
    path.mkdir()
    path.chmod(0o750)
    with pytest.raises(ConfigError, match=r"can be entered by other users; chmod it"):
        Directory(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to others")
def test_a_stranger_s_directory_or_file_is_refused(path: Path) -> None:
    path.mkdir(mode=0o700)
    os.chown(path, 54321, 54321)
    with pytest.raises(ConfigError, match=r"belongs to uid 54321; name one of"):
        Directory(path)
    os.chown(path, 0, 0)
    (path / "x.blocks").touch()
    os.chown(path / "x.blocks", 54321, 54321)
    with pytest.raises(ConfigError, match=r"x.blocks belongs to uid 54321"):
        Directory(path)


def test_links_are_refused(path: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    path.symlink_to(tmp_path / "real")
    with pytest.raises(ConfigError, match=r"is a link or no directory"):
        Directory(path)
    path.unlink()
    path.mkdir(mode=0o700)
    target = tmp_path / "target"
    target.write_bytes(b"precious")
    (path / "x.blocks").symlink_to(target)
    with pytest.raises(ConfigError, match=r"x.blocks is a link"):
        Directory(path)
    (path / "x.blocks").unlink()
    os.link(target, path / "x.blocks")
    with pytest.raises(ConfigError, match=r"x.blocks is a link"):
        Directory(path)
    assert target.read_bytes() == b"precious"


def test_a_link_that_is_put_in_the_place_of_a_file_is_not_followed(path: Path, tmp_path: Path) -> None:
    thing, target = Thing(MIB), tmp_path / "target"
    target.write_bytes(b"precious")
    with tier_in(path) as tier, held(tier, thing) as hold:
        thing.keep_by(hold, (0, 1000))
        (blocks,) = files(path, BLOCKS)
        blocks.unlink()
        blocks.symlink_to(target)
        assert thing.keep_by(hold, (5000, 6000)) == 0
        assert "symbolic links" in tier.off_because
    assert target.read_bytes() == b"precious"


def test_a_directory_with_other_files_is_refused(path: Path) -> None:
    path.mkdir(mode=0o700)
    (path / "thesis.tex").touch()
    with pytest.raises(ConfigError, match=r"thesis.tex is no file of the tier; name a directory"):
        Directory(path)


def test_of_an_object_no_more_blocks_are_kept_than_it_needs(path: Path) -> None:
    """Each takes memory while the object is open, and loads that select a tensor here and there make many."""
    thing = Thing(MIB)
    few = [(start, start + 1) for start in range(0, MIB, MIB // (2 * MIN_BLOCKS))]
    with tier_in(path) as tier, held(tier, thing) as hold:
        assert thing.keep_by(hold, *few) == MIN_BLOCKS
        assert thing.keep_by(hold) == 0
        assert thing.compare(hold) == MIN_BLOCKS
    with tier_in(path) as tier:
        assert thing.kept(tier) == 0, "so small a part is kept anew"
        assert thing.keep(tier) == thing.kept(tier) == MIB
        assert disk_bytes(path) < 2 * MIB
