"""`--tier-stale`: a load whose store cannot be asked gets what its store said last, from a real disk."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.checkpoint.files import Checkpoint
from penstock.server.errors import AccessDeniedError, CheckpointNotFoundError, SourceUnavailableError
from penstock.server.sources import Access, ListingDeniedError, join
from penstock.server.sources.checksums import crc_checksum
from penstock.server.sources.file.source import FileSource
from penstock.server.sources.replies import Replies, StoreUnreachableError
from penstock.server.sources.verification import AUTO, REQUIRE, Wish
from penstock.server.tier.directory import BLOCKS, RECORDS, Directory
from penstock.server.tier.replies import SILENT_SECONDS, DiskReplies
from penstock.server.tier.source import TieredSource
from penstock.server.tier.tier import Tier
from penstock.server.tier.versions import key_of

from ...e2e.support import wait_until
from ..support import ROOT, checkpoint_bytes
from .bench import MIB, Thing, tier_in
from .test_disks import Stored

TOP = "s3://bucket/model/"
DAY = 86_400.0
USER = Access(uid=1000, privileged=False, prefixes=(TOP,))


class Shelf:
    """A store of objects that can be cut off."""

    kind = "s3"
    schemes = ("s3",)
    descriptors_per_file = 0
    patience_seconds = 60.0

    def __init__(self, workers: ThreadPoolExecutor) -> None:
        self.things: dict[str, Thing] = {}
        self.down = self.refuses = self.hides_lists = False
        self.asked = 0
        self._workers = workers

    def put(self, name: str, seed: int) -> None:
        thing = Thing(0, uri=TOP + name, version=f"v{seed}")
        thing.data = checkpoint_bytes([100_000, 50], seed=seed, prefix=name[0])
        thing.identity = type(thing.identity)(TOP + name, f"v{seed}", len(thing.data))
        self.things[TOP + name] = thing

    def workers(self, location: str, uid: int) -> ThreadPoolExecutor:
        return self._workers

    def location(self, source: str) -> str:
        return source

    def name(self, location: str) -> str:
        return location.rpartition("/")[2]

    def join(self, directory: str, name: str) -> str:
        return join(directory, name)

    def list(self, location: str, access: Access) -> list[str] | None:
        self._ask(location, access)
        if location.endswith(".safetensors"):
            return None
        if self.hides_lists:
            raise ListingDeniedError(f"{location}: refused")
        return sorted(uri[len(location) :] for uri in self.things if uri.startswith(location))

    def dangles(self, location: str, access: Access) -> bool:
        return False

    def open(self, location: str, access: Access) -> Stored:
        self._ask(location, access)
        if location not in self.things:
            raise CheckpointNotFoundError(f"{location} does not exist (request id {self.asked})")
        stored = Stored(self.things[location])
        stored.checksums = (crc_checksum("CRC32C", 0),)
        return stored

    def remember(self, location: str) -> None:
        """It is asked for versions only anyway."""

    def permit(self, location: str, access: Access) -> None:
        if not access.privileged and not location.startswith(access.prefixes):
            raise AccessDeniedError(f"{location}: no prefix")

    def _ask(self, location: str, access: Access) -> None:
        self.permit(location, access)
        self.asked += 1
        if self.down:
            raise StoreUnreachableError(f"{location}: it does not answer")
        if self.refuses:
            raise AccessDeniedError(f"{location}: refused")


class Node:
    """A daemon's catalog over a shelf and a tier, which can be started again."""

    def __init__(self, path: Path, shelf: Shelf, workers: ThreadPoolExecutor, stale_seconds: float) -> None:
        self.path = path
        self.shelf = shelf
        self.stale_seconds = stale_seconds
        self.now = 0.0
        self.old: list[Thing] = []
        """Versions that were replaced."""
        self._workers = workers
        self._stack = ExitStack()
        self.start()

    def start(self, directory: Callable[[Path], Directory] = Directory) -> None:
        self._stack.close()
        self.tier: Tier = self._stack.enter_context(tier_in(directory(self.path)))
        self.catalog = Catalog(
            [FileSource(lambda path, uid: self._workers), TieredSource(self.shelf, self.tier)],  # type: ignore[arg-type]
            replies=DiskReplies(self.tier, self.stale_seconds, clock=lambda: self.now),
        )
        self._stack.callback(self.catalog.shutdown)

    def close(self) -> None:
        self._stack.close()

    def resolve(self, source: str = TOP, access: Access = ROOT, wish: Wish | None = None) -> Checkpoint:
        """Closed already: the test wants what it says, not what it holds."""
        checkpoint = self.catalog.resolve([source], access, wish=wish or Wish(AUTO))
        checkpoint.close()
        self._wait()
        return checkpoint

    def _wait(self) -> None:
        wait_until(lambda: not self.tier.waiting_bytes, "all to be written")

    def load(self, source: str = TOP) -> float | None:
        """Reads and compares every byte of it, and has it kept. For how long the store has not been asked."""
        checkpoint = self.catalog.resolve([source], ROOT)
        try:
            for file in checkpoint.files:
                (data,) = [
                    thing.data
                    for thing in [*self.shelf.things.values(), *self.old]
                    if (thing.identity.uri, thing.identity.version) == (file.uri, file.version)
                ]
                target = memoryview(bytearray(file.size_bytes))
                file.read_into(0, [target])
                assert target == data
                file.keep_bytes(0, [target])  # type: ignore[attr-defined]
        finally:
            checkpoint.close()
        self._wait()
        return checkpoint.stale_seconds

    def replace(self, name: str, seed: int) -> None:
        self.old.append(self.shelf.things[TOP + name])
        self.shelf.put(name, seed)

    def age(self, seconds: float) -> None:
        """The replies that are kept are so much older after the next start."""
        for records in self.replies():
            at = records.stat().st_mtime - seconds
            os.utime(records, (at, at))

    def replies(self) -> list[Path]:
        objects = {key_of(thing.identity)[:24] for thing in [*self.shelf.things.values(), *self.old]}
        return [file for file in self.path.glob(f"*{RECORDS}") if file.name[:24] not in objects]


@contextmanager
def made(path: Path, stale_seconds: float = DAY) -> Iterator[Node]:
    with ThreadPoolExecutor(2) as workers:
        shelf = Shelf(workers)
        shelf.put("a.safetensors", 1)
        shelf.put("b.safetensors", 2)
        node = Node(path, shelf, workers, stale_seconds)
        try:
            yield node
        finally:
            node.close()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    with made(tmp_path / "tier") as node:
        yield node


def test_a_checkpoint_whose_store_cannot_be_asked_comes_from_the_disk_and_says_so(node: Node) -> None:
    assert node.load() is None
    node.shelf.down = True
    stale_seconds = node.load()
    assert stale_seconds is not None
    assert 0 <= stale_seconds < DAY
    (warning,) = node.resolve().warnings
    assert warning.startswith(f"{TOP}: its store cannot be asked; this is the version that it had ")
    node.start()
    assert node.load() is not None, "the replies did not outlive the daemon"
    node.shelf.down = False
    node.start()
    assert node.load() is None


def test_a_checkpoint_that_is_staler_than_the_operator_allows_fails(node: Node) -> None:
    node.load()
    node.shelf.down = True
    node.age(DAY + 10)
    node.start()
    with pytest.raises(SourceUnavailableError, match="it does not answer"):
        node.load()
    node.age(-2 * DAY)  # as if the clock had been set back
    node.start()
    with pytest.raises(SourceUnavailableError, match="it does not answer"):
        node.load()


def test_giving_replies_again_makes_them_no_younger(node: Node) -> None:
    node.load()
    node.age(1000)
    node.shelf.down = True
    for _ in range(2):
        node.start()
        stale_seconds = node.load()
        assert stale_seconds is not None
        assert stale_seconds >= 1000


def test_files_that_were_never_current_together_are_not_loaded_together(node: Node) -> None:
    node.load()
    node.replace("b.safetensors", 3)
    node.load(TOP + "b.safetensors")
    node.shelf.down = True
    for _ in range(2):
        with pytest.raises(SourceUnavailableError, match="it does not answer"):
            node.load()
        assert node.load(TOP + "b.safetensors") is not None
        node.start()


@pytest.mark.parametrize("stale_seconds", [DAY, 1e12])
def test_newer_replies_that_could_not_be_kept_are_not_hidden_by_older_ones(
    tmp_path: Path, stale_seconds: float
) -> None:
    class Full(Directory):
        def write(self, fd: int, data: bytes | memoryview, position: int) -> None:
            raise OSError(28, "No space left on device")

    with made(tmp_path / "tier", stale_seconds) as node:
        node.load()
        node.replace("b.safetensors", 3)
        node.start(Full)
        node.load()
        node.shelf.down = True
        for _ in range(2):
            with pytest.raises(SourceUnavailableError, match="it does not answer"):
                node.load()
            node.start()


def test_that_replies_are_outdated_is_synced_before_newer_ones_are_kept(node: Node) -> None:
    synced: list[float] = []

    class Noting(Directory):
        def sync_times(self, fd: int) -> None:
            super().sync_times(fd)
            synced.append(os.fstat(fd).st_mtime)

    node.load()
    node.start(Noting)
    node.load()
    assert synced == []
    node.replace("b.safetensors", 3)
    node.load()
    assert synced == [0.0]


def test_a_store_that_refuses_is_not_called_silent(node: Node) -> None:
    node.load()
    node.shelf.refuses = True
    with pytest.raises(AccessDeniedError, match="refused"):
        node.load()


def test_what_the_store_refused_or_had_not_any_more_is_not_given_when_it_cannot_be_asked(node: Node) -> None:
    things = dict(node.shelf.things)

    def removed() -> None:
        node.shelf.things.clear()

    def refuses() -> None:
        node.shelf.refuses = True

    for change in (removed, refuses):
        node.shelf.things.update(things)
        node.load()
        change()
        with pytest.raises((AccessDeniedError, CheckpointNotFoundError)):
            node.load()
        node.shelf.refuses, node.shelf.down = False, True
        for _ in range(2):
            with pytest.raises(SourceUnavailableError, match="it does not answer"):
                node.load()
            node.start()
        node.shelf.down = False


def test_that_something_is_not_there_is_the_same_reply_each_time(node: Node) -> None:
    source = TieredSource(node.shelf, node.tier)  # type: ignore[arg-type]
    encoded = []
    for _ in range(2):
        replies = Replies()
        with pytest.raises(CheckpointNotFoundError):
            source.open(TOP + "nothing.safetensors", replace(ROOT, replies=replies))
        encoded.append(replies.encode())
    assert encoded[0] == encoded[1]
    again = Replies.decode(encoded[0])
    with pytest.raises(CheckpointNotFoundError, match="had nothing there when it was last asked"):
        source.open(TOP + "nothing.safetensors", replace(ROOT, replies=again))


def test_who_may_not_ask_the_store_takes_nothing_from_others(node: Node) -> None:
    node.resolve(access=USER)
    node.load()
    stranger = Access(uid=1001, privileged=False, prefixes=("s3://other",))
    with pytest.raises(AccessDeniedError, match="no prefix"):
        node.resolve(access=stranger)
    node.shelf.down = True
    assert node.resolve(access=USER).stale_seconds is not None


def test_a_user_gets_stale_what_a_user_got_and_nothing_without_a_prefix(node: Node) -> None:
    node.load()
    node.shelf.down = True
    with pytest.raises(SourceUnavailableError):
        node.resolve(access=USER)
    node.shelf.down = False
    node.resolve(access=USER)
    node.shelf.down = True
    assert node.resolve(access=USER).stale_seconds is not None
    with pytest.raises(AccessDeniedError, match="no prefix"):
        node.resolve(access=Access(uid=1000, privileged=False, prefixes=("s3://other",)))


def test_what_is_rotten_or_missing_on_the_disk_is_never_made_up(node: Node) -> None:
    node.load()
    node.shelf.down = True
    thing = node.shelf.things[TOP + "a.safetensors"]
    (blocks,) = node.path.glob(f"{key_of(thing.identity)}*{BLOCKS}")
    content = bytearray(blocks.read_bytes())
    content[len(content) // 2] ^= 1
    blocks.write_bytes(content)
    node.start()
    with pytest.raises(SourceUnavailableError, match=r"does not answer|has no bytes from"):
        node.load()


def test_replies_that_are_rotten_are_not_given(node: Node) -> None:
    node.load()
    node.shelf.down = True
    (records,) = node.replies()
    blocks = records.with_suffix(BLOCKS)
    blocks.write_bytes(blocks.read_bytes().replace(b"v1", b"v2"))
    node.start()
    with pytest.raises(SourceUnavailableError, match="it does not answer"):
        node.load()


def test_a_store_that_was_found_silent_is_not_asked_again_at_once(node: Node) -> None:
    node.load()
    node.shelf.down = True
    node.load()
    asked = node.shelf.asked
    node.load()
    assert node.shelf.asked == asked
    node.now += SILENT_SECONDS
    node.load()
    assert node.shelf.asked == asked + 1
    node.shelf.down = False
    node.now += SILENT_SECONDS
    assert node.load() is None


def test_a_directory_that_may_not_be_listed_is_not_served_stale(node: Node) -> None:
    node.load()
    node.shelf.put("model.safetensors", 4)
    node.shelf.hides_lists = True
    node.load()
    node.shelf.down = True
    with pytest.raises(SourceUnavailableError):
        node.load()


def test_what_the_store_said_of_checksums_still_counts(node: Node) -> None:
    node.resolve(wish=Wish(REQUIRE))
    node.load()
    node.shelf.down = True
    checkpoint = node.resolve(wish=Wish(REQUIRE))
    assert checkpoint.stale_seconds is not None
    assert [one.checksum for one in checkpoint.expected] == [crc_checksum("CRC32C", 0)] * 2


def test_replies_that_are_too_long_are_not_kept(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    node.load()
    monkeypatch.setattr("penstock.server.tier.replies.MAX_REPLIES_BYTES", 10)
    node.load()
    node.shelf.down = True
    for _ in range(2):
        with pytest.raises(SourceUnavailableError, match="it does not answer"):
            node.load()
        node.start()


def test_replies_count_within_the_limit_of_the_tier(tmp_path: Path) -> None:
    with made(tmp_path / "tier") as node:
        node.load()
        used = node.tier.used_bytes
        (records,) = node.replies()
        sizes = [file.stat().st_blocks * 512 for file in (records, records.with_suffix(BLOCKS))]
        assert all(sizes)
        assert used == sum(file.stat().st_blocks * 512 for file in node.path.iterdir())
        assert used < MIB
