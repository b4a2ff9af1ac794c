"""nginx passes what every store has to, but for lists, which web servers do not have."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from penstock.server.errors import CheckpointInvalidError
from penstock.server.sources.store import Store
from penstock.server.sources.web.store import WebStore

from ..s3.proxy import FaultProxy
from ..server.nginx import nginx
from ..server.support import ROOT, make_config
from .conformance import ObjectStoreTests, Storage, StoreTests, closing
from .proxied import ProxiedStorage, without_settings


class Site(ProxiedStorage):
    """Files of nginx."""

    def __init__(self, store: Store, files: Path, proxy: FaultProxy) -> None:
        super().__init__(store, f"{proxy.endpoint}/top", proxy)
        self._files = files
        self._puts = 0

    def put(self, name: str, content: bytes) -> str:
        path = self._files / "top" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        self._puts += 1
        os.utime(path, (self._puts * 1000, self._puts * 1000))  # of which the ETag is made, in seconds
        return f"{self.top}/{quote(name)}"


class TestWebStore(ObjectStoreTests):
    @pytest.fixture
    def storage(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, require_tool: Callable[[str], str]
    ) -> Iterator[Storage]:
        without_settings(monkeypatch)
        files, state = tmp_path / "files", tmp_path / "state"
        files.mkdir()
        state.mkdir()
        with (
            nginx(require_tool("nginx"), files, state) as port,
            contextlib.closing(FaultProxy(port)) as proxy,
        ):
            config = make_config(object_retries=2, object_timeout_seconds=20.0)
            yield from closing(Site(WebStore(config), files, proxy))

    def test_a_directory_is_refused_with_what_to_name_instead(self, storage: Storage) -> None:
        storage.put("d/a", b"x")
        source = storage.store.source
        with pytest.raises(CheckpointInvalidError, match=r"/top/d/ is a directory.*name a file, or an index"):
            source.list(f"{storage.top}/d/", ROOT)
        with pytest.raises(CheckpointInvalidError, match=r"/top/d is a directory.*name a file, or an index"):
            source.tree(f"{storage.top}/d", ROOT, lambda name: True)
        assert source.list(f"{storage.top}/d/a", ROOT) is None


_OF_LISTS = (
    "test_a_directory_is_listed_in_order_and_a_file_is_not",
    "test_a_directory_is_a_checkpoint_on_the_threads_of_the_store",
    "test_a_tree_holds_every_file_below_with_its_size_and_version",
    "test_of_a_tree_only_what_is_wanted_is_given",
    "test_the_version_in_a_tree_is_another_after_each_change",
    "test_a_tree_is_for_those_who_may_read_what_is_in_it",
)
for _name in _OF_LISTS:
    assert hasattr(StoreTests, _name)
    setattr(TestWebStore, _name, None)
