"""A second S3 passes what every store has to: SeaweedFS, which checks signatures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from penstock.server.errors import AccessDeniedError
from penstock.server.sources.s3.store import S3Store
from penstock.server.sources.store import Store

from ..s3.proxy import FaultProxy
from ..server.support import make_config
from .conformance import CONTENT, ObjectStoreTests, closing
from .proxied import ProxiedStorage, new_prefix, without_settings
from .servers import BUCKET, Server, s3_client, s3_environment, seaweed


class Seaweed(ProxiedStorage):
    def __init__(self, store: Store, proxy: FaultProxy, client: Any) -> None:
        self._prefix = new_prefix()
        super().__init__(store, f"s3://{BUCKET}/{self._prefix}", proxy)
        self._client = client

    def put(self, name: str, content: bytes) -> str:
        self._client.put_object(Bucket=BUCKET, Key=f"{self._prefix}/{name}", Body=content)
        return f"{self.top}/{name}"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with seaweed() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Any:
    return s3_client(server)


@pytest.fixture(scope="module")
def module_proxy(server: Server) -> Iterator[FaultProxy]:
    with contextlib.closing(FaultProxy(server.port)) as proxy:
        yield proxy


class TestSeaweedStore(ObjectStoreTests):
    @pytest.fixture
    def storage(
        self, monkeypatch: pytest.MonkeyPatch, client: Any, module_proxy: FaultProxy
    ) -> Iterator[Seaweed]:
        without_settings(monkeypatch)
        module_proxy.reset()
        for name, value in s3_environment(module_proxy.endpoint).items():
            monkeypatch.setenv(name, value)
        config = make_config(object_retries=2, object_timeout_seconds=20.0)
        yield from closing(Seaweed(S3Store(config), module_proxy, client))  # type: ignore[misc]

    def test_wrong_secrets_are_refused(self, storage: Seaweed, monkeypatch: pytest.MonkeyPatch) -> None:
        location = storage.put("a", CONTENT)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another one")
        with pytest.raises(AccessDeniedError, match="check penstockd's secret key"):
            storage.open(location)
