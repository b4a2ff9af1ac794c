"""What every store has to do.

A store is tested by a subclass of `StoreTests`, or of `ObjectStoreTests`, with a fixture `storage` that
yields the store and puts real content into it.
"""

from __future__ import annotations

import contextlib
import random
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog
from penstock.server.errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    InvalidRequestError,
    PenstockError,
    SourceUnavailableError,
)
from penstock.server.sources import Access, RetryingReader, SourceFile, choose, join, scheme_of
from penstock.server.sources.file.store import FileStore
from penstock.server.sources.store import Store
from penstock.server.sources.stores import STORES, kind_of
from penstock.server.system.counts import RETRY_REASONS
from penstock.server.tier.replies import DiskReplies
from penstock.server.tier.source import TieredSource

from ..server.support import ROOT, checkpoint_bytes, make_config, more_fds, open_fds, until_true
from ..server.tier.bench import tier_in

CONTENT = random.Random(7).randbytes(400_000)
UID = 1000


class Storage(ABC):
    """A store that is set up, where its content lies, and how it gets there."""

    def __init__(self, store: Store, top: str) -> None:
        self.store = store
        self.top = top
        """The location of the directory that all is put into."""
        self.files = store if isinstance(store, FileStore) else FileStore(make_config())
        self.catalog = Catalog([self.files.source, *(() if store is self.files else (store.source,))])

    @abstractmethod
    def put(self, name: str, content: bytes) -> str:
        """Makes or replaces a file in place. Returns its location."""

    @abstractmethod
    def fail(self, file: SourceFile) -> contextlib.AbstractContextManager[object]:
        """While it lasts, reading that open file fails."""

    def open(self, location: str, access: Access = ROOT) -> SourceFile:
        return self.store.source.open(location, access)

    def read(self, location: str, start: int, end: int) -> bytes:
        with contextlib.closing(self.open(location)) as file:
            buffer = bytearray(end - start)
            RetryingReader(file).read_into(start, [memoryview(buffer)[:5], memoryview(buffer)[5:]])
            file.check_unchanged()
            return bytes(buffer)

    def close(self) -> None:
        for store in {self.store, self.files}:
            store.stop()
            store.shutdown()
        self.catalog.shutdown()


class StoreTests:
    """`storage` is a fixture of the subclass."""

    # ---- what it says of itself -----------------------------------------------------------------

    def test_it_is_in_the_list_under_a_name_of_its_own(self, storage: Storage) -> None:
        assert type(storage.store) in STORES
        assert [store.kind for store in STORES].count(storage.store.kind) == 1

    def test_its_schemes_lead_to_it_alone(self, storage: Storage) -> None:
        sources = [storage.files.source, storage.store.source]
        assert scheme_of(storage.top) in (*storage.store.schemes, "")
        assert kind_of(storage.top) == storage.store.kind
        assert choose(sources, storage.top) is storage.store.source
        for scheme in storage.store.schemes:
            assert kind_of(f"{scheme}://x/y") == storage.store.kind
            assert choose(sources, f"{scheme}://x/y") is storage.store.source
            assert [scheme in store.schemes for store in STORES].count(True) == 1

    def test_it_says_how_it_is_read(self, storage: Storage) -> None:
        reading = storage.store.reading
        assert min(reading.threads, reading.spare_threads) > 0
        assert reading.block_bytes % 4096 == 0
        assert set(storage.store.retries()) <= set(RETRY_REASONS)

    def test_a_location_is_written_in_one_way(self, storage: Storage) -> None:
        source = storage.store.source
        location = source.location(storage.put("a b%41", CONTENT))
        assert source.location(location) == location
        assert source.name(location) == "a b%41"

    def test_what_names_nothing_is_an_invalid_request(self, storage: Storage) -> None:
        with pytest.raises(InvalidRequestError, match="NUL"):
            storage.store.source.location(f"{storage.top}/\0")

    # ---- list -----------------------------------------------------------------------------------

    def test_a_directory_is_listed_in_order_and_a_file_is_not(self, storage: Storage) -> None:
        for name in ("d/b.safetensors", "d/a.safetensors", "d/é", "d/deeper/c", "e/x"):
            storage.put(name, b"x")
        names = storage.store.source.list(f"{storage.top}/d", ROOT)
        assert names is not None
        assert [name for name in names if name != "deeper"] == ["a.safetensors", "b.safetensors", "é"]
        assert storage.store.source.list(f"{storage.top}/d/a.safetensors", ROOT) is None

    def test_a_tree_holds_every_file_below_with_its_size_and_version(self, storage: Storage) -> None:
        names = ["a", "b c+%41#d", "deep/er/e.json", "deep/é漢", "deeper/f"]
        for number, name in enumerate(names):
            storage.put(f"t/{name}", CONTENT[: number * 1000])
        storage.put("tree/beside", b"x")
        for top in (f"{storage.top}/t", f"{storage.top}/t/"):
            listed = {one.name: one for one in storage.store.source.tree(top, ROOT, lambda name: True)}
            assert sorted(listed) == sorted(names)
            assert [listed[name].size_bytes for name in names] == [0, 1000, 2000, 3000, 4000]
        for name in names:
            with contextlib.closing(storage.open(join(top, name))) as file:
                assert file.listed_version
                assert listed[name].version in ("", file.listed_version)

    def test_of_a_tree_only_what_is_wanted_is_given(self, storage: Storage) -> None:
        for name in ("a", "b", "deep/a", "deep/b"):
            storage.put(f"t/{name}", b"x")
        tree = storage.store.source.tree(f"{storage.top}/t", ROOT, lambda name: not name.endswith("b"))
        assert sorted(one.name for one in tree) == ["a", "deep/a"]

    def test_the_version_in_a_tree_is_another_after_each_change(self, storage: Storage) -> None:
        def version() -> str:
            (listed,) = storage.store.source.tree(f"{storage.top}/t", ROOT, lambda name: True)
            with contextlib.closing(storage.open(f"{storage.top}/t/a")) as file:
                return listed.version or file.listed_version

        versions = []
        for content in (CONTENT, CONTENT[::-1], CONTENT[:1000]):
            storage.put("t/a", content)
            versions += [version(), version()]
        assert versions[0::2] == versions[1::2]
        assert len(set(versions)) == 3

    def test_of_what_is_no_directory_there_is_no_tree(self, storage: Storage) -> None:
        storage.put("t/a", b"x")
        for name in ("t/a", "nothing"):
            with pytest.raises((CheckpointNotFoundError, CheckpointInvalidError), match=f"/{name}"):
                list(storage.store.source.tree(f"{storage.top}/{name}", ROOT, lambda name: True))

    def test_a_tree_is_for_those_who_may_read_what_is_in_it(self, storage: Storage) -> None:
        storage.put("models/a", b"x")
        storage.put("models-secret/a", b"x")
        access = Access(UID, privileged=False, prefixes=(f"{storage.top}/models",))

        def tree(name: str) -> list[str]:
            listed = storage.store.source.tree(f"{storage.top}/{name}", access, lambda name: True)
            return [one.name for one in listed]

        assert tree("models") == ["a"]
        for name in ("models-secret", "models/../models-secret", "."):
            with pytest.raises(AccessDeniedError, match=re.escape(f"/{name}")):
                tree(name)

    # ---- open and read --------------------------------------------------------------------------

    def test_an_open_file_says_what_it_is(self, storage: Storage) -> None:
        location = storage.put("a", CONTENT)
        with contextlib.closing(storage.open(location)) as file:
            assert (file.kind, file.uri, file.size_bytes) == (storage.store.kind, location, len(CONTENT))
            assert not file.unmounted()

    @pytest.mark.parametrize(
        ("start", "end"), [(0, 8), (0, 400_000), (4096, 8192), (262_140, 262_150), (399_990, 400_000)]
    )
    def test_views_get_the_bytes_of_the_range(self, storage: Storage, start: int, end: int) -> None:
        assert storage.read(storage.put("a", CONTENT), start, end) == CONTENT[start:end]

    def test_views_are_filled_as_far_as_the_file_goes(self, storage: Storage) -> None:
        assert storage.read(storage.put("a", CONTENT), 399_990, 400_010) == CONTENT[399_990:] + bytes(10)

    def test_an_empty_file_is_read_at_once(self, storage: Storage) -> None:
        with contextlib.closing(storage.open(storage.put("a", b""))) as file:
            assert file.size_bytes == 0
            RetryingReader(file).read_into(0, [memoryview(bytearray(8))])
            file.check_unchanged()

    def test_many_threads_read_one_file(self, storage: Storage) -> None:
        parts = range(0, 400_000, 50_000)
        with (
            contextlib.closing(storage.open(storage.put("a", CONTENT))) as file,
            ThreadPoolExecutor(4) as threads,
        ):
            buffers = [bytearray(50_000) for _ in parts]
            reads = [
                threads.submit(RetryingReader(file).read_into, start, [memoryview(buffer)])
                for start, buffer in zip(parts, buffers, strict=True)
            ]
            for read in reads:
                read.result(60)
            assert b"".join(buffers) == CONTENT

    def test_closing_gives_every_descriptor_back(self, storage: Storage) -> None:
        location = storage.put("a", CONTENT)
        storage.open(location).close()  # what is kept for the next file is open now
        before = open_fds()
        for _ in range(5):
            storage.open(location).close()
        until_true(lambda: not more_fds(before))

    # ---- changes --------------------------------------------------------------------------------

    def test_versions_are_equal_until_the_bytes_change(self, storage: Storage) -> None:
        versions = []
        location = storage.put("a", CONTENT)
        for content in (None, None, CONTENT[::-1]):
            if content is not None:
                storage.put("a", content)
            with contextlib.closing(storage.open(location)) as file:
                versions.append(file.version)
        assert versions[0] == versions[1] != versions[2]

    @pytest.mark.parametrize("content", [CONTENT[:350_000], CONTENT[:305_000], CONTENT[::-1], CONTENT + b"x"])
    def test_a_change_while_it_is_read_is_noticed(self, storage: Storage, content: bytes) -> None:
        buffer = memoryview(bytearray(1000))
        with contextlib.closing(storage.open(storage.put("a", CONTENT))) as file:
            RetryingReader(file).read_into(300_000, [buffer])
            storage.put("a", content)

            def go_on() -> None:
                RetryingReader(file).read_into(310_000, [buffer])
                file.check_unchanged()

            with pytest.raises(CheckpointChangedError, match="/a"):
                go_on()

    # ---- access ---------------------------------------------------------------------------------

    def test_a_prefix_allows_what_lies_below_it_and_nothing_beside_it(self, storage: Storage) -> None:
        location = storage.put("models/a", CONTENT)
        storage.put("models-secret/a", CONTENT)
        access = Access(UID, privileged=False, prefixes=(f"{storage.top}/models",))
        storage.open(location, access).close()
        for name in ("models-secret/a", "models/../models-secret/a"):
            with pytest.raises(AccessDeniedError, match="models-secret/a"):
                storage.open(f"{storage.top}/{name}", access)

    @pytest.mark.parametrize("prefixes", [(), ("/nowhere",), ("s3://nobody/x",)])
    def test_without_a_prefix_nothing_is_opened_or_listed(
        self, storage: Storage, prefixes: tuple[str, ...]
    ) -> None:
        location = storage.put("models/a", CONTENT)
        access = Access(UID, privileged=False, prefixes=prefixes)
        with pytest.raises(AccessDeniedError, match=r"uid 1000 may not load .*/models/a"):
            storage.open(location, access)
        with pytest.raises(AccessDeniedError, match=r"/models"):
            storage.store.source.list(f"{storage.top}/models", access)

    # ---- errors ---------------------------------------------------------------------------------

    def test_what_does_not_exist_is_named(self, storage: Storage) -> None:
        with pytest.raises(CheckpointNotFoundError, match="nothing-here"):
            storage.open(f"{storage.top}/nothing-here")

    def test_a_read_that_fails_names_the_file(self, storage: Storage) -> None:
        with contextlib.closing(storage.open(storage.put("a", CONTENT))) as file:
            with storage.fail(file), pytest.raises(SourceUnavailableError, match="/a: ") as failed:
                RetryingReader(file).read_into(300_000, [memoryview(bytearray(100))])
            assert failed.value.details["file"] == file.uri

    # ---- with the catalog -----------------------------------------------------------------------

    def test_headers_of_files_with_awkward_names_are_read_and_kept(self, storage: Storage) -> None:
        names = ["a b+%41#c.safetensors", "é漢.safetensors", "plain.safetensors"]
        locations = [
            storage.put(name, checkpoint_bytes([10, 20], prefix=f"{number}-"))
            for number, name in enumerate(names)
        ]
        with contextlib.closing(storage.catalog.resolve(locations, ROOT)) as checkpoint:
            assert [list(table.names()) for table in checkpoint.tables] == [
                ["0-0", "0-1"],
                ["1-0", "1-1"],
                ["2-0", "2-1"],
            ]
            again = storage.catalog.resolve(locations, ROOT)
            again.close()
            assert again.version == checkpoint.version
            assert again.headers[0] is checkpoint.headers[0]

    def test_a_directory_is_a_checkpoint_on_the_threads_of_the_store(self, storage: Storage) -> None:
        for number in range(3):
            storage.put(f"m/model-{number}.safetensors", checkpoint_bytes([3], prefix=f"{number}-"))
        directory = f"{storage.top}/m"
        resolvers = storage.store.resolvers(storage.store.source.location(directory), UID)
        checkpoint = resolvers.submit(storage.catalog.resolve, [directory], ROOT).result(60)
        checkpoint.close()
        assert [list(table.names()) for table in checkpoint.tables] == [["0-0"], ["1-0"], ["2-0"]]

    def test_files_that_take_long_to_open_leave_threads_to_resolve_others(self, storage: Storage) -> None:
        """Which wait for the threads that open files, and must not be the same."""
        location = storage.store.source.location(storage.put("a", CONTENT))
        opened = threading.Event()
        opening = [storage.store.source.workers(location, UID).submit(opened.wait) for _ in range(200)]
        try:
            assert storage.store.resolvers(location, UID).submit(lambda: "resolved").result(60) == "resolved"
        finally:
            opened.set()
        assert all(opens.result(60) for opens in opening)

    def test_files_of_two_stores_make_one_checkpoint(self, storage: Storage, tmp_path: Path) -> None:
        local = tmp_path / "local.safetensors"
        local.write_bytes(checkpoint_bytes([3], prefix="l"))
        there = storage.put("there.safetensors", checkpoint_bytes([4], prefix="t"))
        checkpoint = storage.catalog.resolve([there, str(local)], ROOT)
        checkpoint.close()
        assert [list(table.names()) for table in checkpoint.tables] == [["t0"], ["l0"]]
        with pytest.raises(CheckpointNotFoundError, match="gone"):
            storage.catalog.resolve([str(local), f"{storage.top}/gone.safetensors"], ROOT)

    # ---- its end --------------------------------------------------------------------------------

    def test_after_its_end_no_thread_takes_anything(self, storage: Storage) -> None:
        location = storage.store.source.location(storage.put("a", CONTENT))
        storage.store.stop()
        storage.store.shutdown()
        for threads in (
            storage.store.resolvers(location, UID),
            storage.store.source.workers(location, UID),
        ):
            with pytest.raises(RuntimeError, match="stopped"):
                threads.submit(print)


class ObjectStorage(Storage):
    """A store whose server does as it is told."""

    @abstractmethod
    def cut_off(self, times: int) -> None:
        """So many answers with bytes end in their middle."""

    @abstractmethod
    def hang(self) -> contextlib.AbstractContextManager[threading.Event]:
        """While it lasts, requests are not answered. The event says that one came."""

    @abstractmethod
    def silent(self) -> contextlib.AbstractContextManager[None]:
        """While it lasts, the connection of each request ends without an answer."""


class ObjectStoreTests(StoreTests):
    """Of what the engine does for each store."""

    def test_an_answer_that_ends_early_is_asked_for_again_and_counted(self, storage: ObjectStorage) -> None:
        location = storage.put("a", CONTENT)
        with contextlib.closing(storage.open(location)) as file:
            storage.cut_off(1)
            buffer = bytearray(100_000)
            RetryingReader(file).read_into(300_000, [memoryview(buffer)])
        assert bytes(buffer) == CONTENT[300_000:]
        assert sum(storage.store.retries().values()) == 1

    def test_stopping_ends_a_read_under_way(self, storage: ObjectStorage) -> None:
        with (
            contextlib.closing(storage.open(storage.put("a", CONTENT))) as file,
            ThreadPoolExecutor(1) as threads,
            storage.hang() as met,
        ):
            read = threads.submit(RetryingReader(file).read_into, 300_000, [memoryview(bytearray(100))])
            assert met.wait(60)
            storage.store.stop()
            with pytest.raises(PenstockError, match="stop"):
                read.result(60)

    def test_what_the_local_disk_has_is_loaded_while_the_store_cannot_be_asked(
        self, storage: ObjectStorage, tmp_path: Path
    ) -> None:
        contents = {}
        for name in "ab":
            content = checkpoint_bytes([300_000, 7], prefix=name)
            contents[storage.store.source.location(storage.put(f"{name}.safetensors", content))] = content
        with tier_in(tmp_path / "tier") as tier:
            source = TieredSource(storage.store.source, tier)
            catalog = Catalog([storage.files.source, source], replies=DiskReplies(tier, 3600))

            def load() -> float | None:
                access = Access(0, privileged=True, prefixes=())  # anew, as it keeps what a branch was
                with contextlib.closing(catalog.resolve(list(contents), access)) as checkpoint:
                    for file in checkpoint.files:
                        buffer = bytearray(file.size_bytes)
                        RetryingReader(file).read_into(0, [memoryview(buffer)])
                        assert buffer == contents[file.uri]
                until_true(lambda: not tier.waiting_bytes)
                return checkpoint.stale_seconds

            assert load() is None
            with storage.silent():
                stale_seconds = load()
            assert stale_seconds is not None
            assert 0 <= stale_seconds < 3600
            catalog.shutdown()


def closing(storage: Storage) -> Iterator[Storage]:
    """For fixtures."""
    try:
        yield storage
    finally:
        storage.close()
