"""What lies in a real server behind a proxy that does faults on cue."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from abc import abstractmethod
from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

import pytest

from penstock.server.errors import CheckpointNotFoundError
from penstock.server.sources import SourceFile
from penstock.server.sources.objects import faults as engine_faults
from penstock.server.sources.store import Store

from ..s3 import faults
from ..s3.proxy import Exchange, FaultProxy, Request
from ..server.objects import share_models
from ..server.support import ROOT
from .conformance import ObjectStorage, ObjectStoreTests

_numbers = itertools.count(1)


def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment leads a store to credentials, or through a proxy, and no retry is waited
    for."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE", "NETRC"):
        monkeypatch.setenv(name, os.devnull)
    share_models(monkeypatch)
    monkeypatch.setattr(engine_faults, "FIRST_DELAY_SECONDS", 0.0)


def new_prefix() -> str:
    """Of one test, as all of them share a bucket."""
    return f"top-{next(_numbers)}"


class ProxiedStorage(ObjectStorage):
    """A subclass says how content gets to the server."""

    def __init__(self, store: Store, top: str, proxy: FaultProxy) -> None:
        super().__init__(store, top)
        self._proxy = proxy

    def fail(self, file: SourceFile) -> contextlib.AbstractContextManager[object]:
        self._proxy.on(_of_bytes, faults.error(500, "InternalError"), times=None)
        return contextlib.closing(_Reset(self._proxy))

    def cut_off(self, times: int) -> None:
        self._proxy.on(_of_bytes, faults.cut(1000), times=times)

    @contextlib.contextmanager
    def hang(self) -> Iterator[threading.Event]:
        met = threading.Event()

        def fault(exchange: Exchange) -> None:
            met.set()
            exchange.stall()

        self._proxy.on(_of_bytes, fault, times=None)
        try:
            yield met
        finally:
            self._proxy.reset()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        self._proxy.on(lambda request: True, faults.reset, times=None)
        try:
            yield
        finally:
            self._proxy.reset()


class BucketStoreTests(ObjectStoreTests):
    """Of stores with buckets, or containers, behind the fixture `module_proxy`."""

    account: ClassVar[ModuleType]
    """The module that has the size of a page."""
    nowhere: ClassVar[str]
    """The URI of a bucket that does not exist."""

    @staticmethod
    @abstractmethod
    def is_list(request: Request) -> bool:
        """It is for a page of a list."""

    def test_a_list_of_several_pages_is_one(
        self, storage: ProxiedStorage, monkeypatch: pytest.MonkeyPatch, module_proxy: FaultProxy
    ) -> None:
        names = [f"{number}.txt" for number in range(5)]
        for name in names:
            storage.put(f"d/{name}", b"x")
        monkeypatch.setattr(self.account, "PAGE_NAMES", 2)
        assert storage.store.source.list(f"{storage.top}/d/", ROOT) == names
        assert len(module_proxy.requests(self.is_list)) == 3

    def test_a_bucket_that_is_not_there_is_named(self, storage: ProxiedStorage) -> None:
        for key in ("d/", "a.safetensors"):
            with pytest.raises(CheckpointNotFoundError, match=self.nowhere):
                storage.catalog.resolve([f"{self.nowhere}/{key}"], ROOT)


class _Reset:
    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy

    def close(self) -> None:
        self._proxy.reset()


def _of_bytes(request: Request) -> bool:
    return request.range is not None
