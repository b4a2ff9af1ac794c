"""GCS passes what every store has to, against fake-gcs-server."""

from __future__ import annotations

import contextlib
import http.client
import json
from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar
from urllib.parse import quote

import pytest

from penstock.server.errors import CheckpointNotFoundError
from penstock.server.sources.checksums import CRC32C, Checksum
from penstock.server.sources.gcs import account
from penstock.server.sources.gcs.store import GcsStore
from penstock.server.sources.store import Store

from ..s3.proxy import FaultProxy, Request
from ..server.support import ROOT, make_config
from .conformance import CONTENT, closing
from .proxied import BucketStoreTests, ProxiedStorage, new_prefix, without_settings
from .servers import BUCKET, Server, conditional, fake_gcs


class Gcs(ProxiedStorage):
    def __init__(self, store: Store, proxy: FaultProxy, server: Server) -> None:
        self._prefix = new_prefix()
        super().__init__(store, f"gs://{BUCKET}/{self._prefix}", proxy)
        self._server = server

    def put(self, name: str, content: bytes) -> str:
        upload(self._server, f"{self._prefix}/{name}", content)
        return f"{self.top}/{name}"


def upload(server: Server, key: str, content: bytes) -> str:
    """Its generation."""
    target = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={quote(key, safe='')}"
    generation: str = _ask(server, "POST", target, content)["generation"]
    return generation


def make_bucket(server: Server) -> None:
    _ask(server, "POST", "/storage/v1/b", json.dumps({"name": BUCKET}).encode())


def _ask(server: Server, method: str, target: str, body: bytes) -> dict[str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, target, body)
        answer = connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        found: dict[str, str] = json.loads(text)
        return found


@pytest.fixture(scope="module")
def module_proxy() -> Iterator[FaultProxy]:
    with contextlib.closing(FaultProxy(0)) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def server(module_proxy: FaultProxy) -> Iterator[Server]:
    with fake_gcs(asked_at=module_proxy.port) as server, conditional(server) as gcs:
        module_proxy.upstream_port = gcs.port
        make_bucket(server)
        yield server


class TestGcsStore(BucketStoreTests):
    account: ClassVar[ModuleType] = account
    nowhere = "gs://no-such-bucket"

    @staticmethod
    def is_list(request: Request) -> bool:
        return "/storage/v1/" in request.path

    @pytest.fixture
    def storage(
        self, monkeypatch: pytest.MonkeyPatch, server: Server, module_proxy: FaultProxy
    ) -> Iterator[Gcs]:
        without_settings(monkeypatch)
        module_proxy.reset()
        options = {
            "gcs_emulator": module_proxy.endpoint,
            "gcs_endpoint": "",
            "gcs_anonymous": False,
            "gcs_credential_file": "",
        }
        config = make_config(object_retries=2, object_timeout_seconds=20.0, store_options=options)
        yield from closing(Gcs(GcsStore(config), module_proxy, server))  # type: ignore[misc]

    def test_a_generation_that_is_named_is_the_one_that_is_asked_for(
        self, storage: Gcs, module_proxy: FaultProxy
    ) -> None:
        location = storage.put("a", CONTENT)
        with contextlib.closing(storage.open(location)) as file:
            generation = file.version.rpartition(":")[0].rpartition(":")[2]
        module_proxy.reset()
        assert storage.read(f"{location}#{generation}", 0, 400_000) == CONTENT
        asked = module_proxy.requests()
        assert {request.query.get("generation") for request in asked} == {generation}
        assert storage.store.source.list(f"{location}#{generation}", ROOT) is None
        with pytest.raises(CheckpointNotFoundError, match=f"{location}#1"):
            storage.open(f"{location}#1")

    def test_the_same_bytes_uploaded_again_are_another_version(self, storage: Gcs) -> None:
        versions = set()
        for _ in range(2):
            with contextlib.closing(storage.open(storage.put("a", CONTENT))) as file:
                versions.add(file.version)
        assert len(versions) == 2

    def test_the_checksum_of_the_whole_object_comes_with_its_first_bytes(self, storage: Gcs) -> None:
        with contextlib.closing(storage.open(storage.put("a", b"123456789"))) as file:
            assert file.checksums == (Checksum(CRC32C, "e3069283"),)  # the check value of its definition
