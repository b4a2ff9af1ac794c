"""What lies in a real server behind a proxy that does faults on cue."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from collections.abc import Iterator

import pytest

from penstock.server.sources import SourceFile
from penstock.server.sources.store import Store

from ..s3 import faults
from ..s3.proxy import Exchange, FaultProxy, Request
from .conformance import ObjectStorage

_numbers = itertools.count(1)


def without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment leads a library to other credentials, or through a proxy."""
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_", "GOOGLE_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, os.devnull)


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


class _Reset:
    def __init__(self, proxy: FaultProxy) -> None:
        self._proxy = proxy

    def close(self) -> None:
        self._proxy.reset()


def _of_bytes(request: Request) -> bool:
    return request.range is not None
