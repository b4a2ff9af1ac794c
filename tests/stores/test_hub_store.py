"""The Hub passes what every store has to, against a server that behaves as it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock.server.sources import SourceFile
from penstock.server.sources.hub.store import HubStore
from penstock.server.sources.store import Store

from ..server.hub_server import Call, HubServer
from ..server.support import ROOT, make_config
from .conformance import CONTENT, ObjectStoreTests, Storage, closing
from .hooked import HookedStorage
from .proxied import without_settings


class Repository(HookedStorage):
    def __init__(self, store: Store, hub: HubServer) -> None:
        super().__init__(store, "hf://org/repo/top", hub.hooks, hub.storage_hooks)
        self._hub = hub

    def put(self, name: str, content: bytes) -> str:
        """By a commit that takes the place of those before it."""
        self._hub.commit("org/repo", {f"top/{name}": content}, rewrite=True)
        ROOT.pins._values.clear()  # which the suite has for all that it does: from here it is another load
        return f"{self.top}/{name}"

    def fail(self, file: SourceFile) -> contextlib.AbstractContextManager[object]:
        def hook(call: Call) -> bool:
            call.answer(500)
            return True

        return self.hooked(hook)

    def cut_off(self, times: int) -> None:
        left = [times]

        def hook(call: Call) -> bool:
            if not left[0]:
                return False
            left[0] -= 1
            start, _, last = call.headers["range"].removeprefix("bytes=").partition("-")
            headers = {
                "Content-Length": str(int(last) + 1 - int(start)),
                "Content-Range": f"bytes {start}-{last}/400000",
                "Connection": "close",
            }
            call.answer(206, CONTENT[int(start) : int(start) + 10], headers)
            call.handler.close_connection = True
            return True

        self._hub.storage_hooks.append(hook)


class TestHubStore(ObjectStoreTests):
    @pytest.fixture
    def storage(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Storage]:
        without_settings(monkeypatch)
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        # Other tests of this process set it before they import transformers.
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        with contextlib.closing(HubServer()) as hub:
            monkeypatch.setenv("HF_ENDPOINT", hub.url)
            config = make_config(object_retries=2, object_timeout_seconds=20.0)
            yield from closing(Repository(HubStore(config), hub))
