"""Azure Blob Storage passes what every store has to, against Azurite, which checks signatures."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from types import ModuleType
from typing import Any, ClassVar

import pytest
from azure.storage.blob import BlobServiceClient, ContainerSasPermissions, generate_container_sas

from penstock.server.errors import AccessDeniedError, CheckpointNotFoundError
from penstock.server.sources import ListingDeniedError
from penstock.server.sources.azure import account
from penstock.server.sources.azure.store import AzureStore
from penstock.server.sources.store import Store

from ..s3.proxy import FaultProxy, Request
from ..server.support import ROOT, make_config
from .conformance import CONTENT, closing
from .proxied import BucketStoreTests, ProxiedStorage, new_prefix, without_settings
from .servers import ACCOUNT, ACCOUNT_KEY, BUCKET, Server, azurite

LONG = f"abfss://{BUCKET}@{ACCOUNT}.dfs.core.windows.net"


class Azure(ProxiedStorage):
    def __init__(self, store: Store, proxy: FaultProxy, service: BlobServiceClient) -> None:
        self.prefix = new_prefix()
        super().__init__(store, f"az://{BUCKET}/{self.prefix}", proxy)
        self._service = service

    def put(self, name: str, content: bytes, **options: Any) -> str:
        blob = self._service.get_blob_client(BUCKET, f"{self.prefix}/{name}")
        blob.upload_blob(content, overwrite=True, **options)
        return f"{self.top}/{name}"


def service_of(server: Server, **options: Any) -> BlobServiceClient:
    endpoint = f"{server.url}/{ACCOUNT}"
    return BlobServiceClient(endpoint, {"account_name": ACCOUNT, "account_key": ACCOUNT_KEY}, **options)


def connection_string(endpoint: str, *more: str) -> str:
    return ";".join([f"BlobEndpoint={endpoint}/{ACCOUNT}", f"AccountName={ACCOUNT}", *more])


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with azurite() as server:
        yield server


@pytest.fixture(scope="module")
def service(server: Server) -> Iterator[BlobServiceClient]:
    with service_of(server) as service:
        service.create_container(BUCKET)
        yield service


@pytest.fixture(scope="module")
def module_proxy(server: Server) -> Iterator[FaultProxy]:
    with contextlib.closing(FaultProxy(server.port)) as proxy:
        yield proxy


class TestAzureStore(BucketStoreTests):
    account: ClassVar[ModuleType] = account
    nowhere = "az://no-such-container"

    @staticmethod
    def is_list(request: Request) -> bool:
        return request.query.get("comp") == "list"

    @pytest.fixture
    def storage(
        self, monkeypatch: pytest.MonkeyPatch, service: BlobServiceClient, module_proxy: FaultProxy
    ) -> Iterator[Azure]:
        without_settings(monkeypatch)
        module_proxy.reset()
        key = connection_string(module_proxy.endpoint, f"AccountKey={ACCOUNT_KEY}")
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", key)
        config = make_config(object_retries=2, object_timeout_seconds=20.0)
        yield from closing(Azure(AzureStore(config), module_proxy, service))  # type: ignore[misc]

    def test_the_configured_account_may_be_named(self, storage: Azure) -> None:
        storage.put("a b", CONTENT)
        location = f"{LONG}/{storage.prefix}/a b"
        assert storage.read(location, 0, 400_000) == CONTENT
        assert storage.store.source.list(f"{LONG}/{storage.prefix}", ROOT) == ["a b"]

    def test_a_sas_is_enough_and_told_to_nobody_but_the_store(
        self, storage: Azure, monkeypatch: pytest.MonkeyPatch, module_proxy: FaultProxy
    ) -> None:
        location = storage.put("d/a", CONTENT)
        sas = self._sas(read=True, list=True)
        monkeypatch.setenv(
            "AZURE_STORAGE_CONNECTION_STRING",
            connection_string(module_proxy.endpoint, f"SharedAccessSignature=?{sas}"),
        )
        assert storage.read(location, 0, 400_000) == CONTENT
        assert storage.store.source.list(f"{storage.top}/d", ROOT) == ["a"]
        assert all(request.query["sig"] for request in module_proxy.requests())
        with pytest.raises(CheckpointNotFoundError) as raised:
            storage.open(f"{storage.top}/d/none")
        assert "sig" not in str(raised.value)

    def test_a_sas_that_may_not_list_can_read_what_is_named(
        self, storage: Azure, monkeypatch: pytest.MonkeyPatch, module_proxy: FaultProxy
    ) -> None:
        location = storage.put("d/a", CONTENT)
        monkeypatch.setenv(
            "AZURE_STORAGE_CONNECTION_STRING",
            connection_string(module_proxy.endpoint, f"SharedAccessSignature={self._sas(read=True)}"),
        )
        with pytest.raises(AccessDeniedError, match="or a SAS that allows to list") as raised:
            storage.store.source.list(f"{storage.top}/d", ROOT)
        assert isinstance(raised.value, ListingDeniedError)
        assert storage.read(location, 0, 400_000) == CONTENT

    @pytest.mark.parametrize(
        "wrong", ["AccountKey=d3Jvbmc=", "SharedAccessSignature=sv=2023-11-03&sig=d3Jvbmc="]
    )
    def test_wrong_secrets_are_refused_and_not_told(
        self, wrong: str, storage: Azure, monkeypatch: pytest.MonkeyPatch, module_proxy: FaultProxy
    ) -> None:
        location = storage.put("a", CONTENT)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(module_proxy.endpoint, wrong))
        with pytest.raises(AccessDeniedError, match=r"check (the account key|that the SAS)") as raised:
            storage.open(location)
        assert "d3Jvbmc" not in str(raised.value)

    def test_a_container_is_asked_without_credentials_if_so_configured(
        self, storage: Azure, monkeypatch: pytest.MonkeyPatch, module_proxy: FaultProxy
    ) -> None:
        location = storage.put("a", CONTENT)
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", connection_string(module_proxy.endpoint))
        options = {**make_config().store_options, "azure_anonymous": True}
        anonymous = AzureStore(
            make_config(object_retries=2, object_timeout_seconds=20.0, store_options=options)
        )
        with contextlib.closing(Azure(anonymous, module_proxy, storage._service)) as other:
            module_proxy.reset()
            with pytest.raises(AccessDeniedError, match="leave out --azure-anonymous"):
                other.open(location)
        assert not any(request.headers["Authorization"] for request in module_proxy.requests())

    def test_what_stands_for_a_directory_is_no_file(self, storage: Azure) -> None:
        """As file systems on top of Azure make them, and as accounts with a hierarchy have them."""
        storage.put("d/sub", b"", metadata={"hdi_isfolder": "true"})
        storage.put("d/sub/a", b"x")
        storage.put("d/b", b"x", metadata={"hdi_isfolder": "false"})
        assert storage.store.source.list(f"{storage.top}/d", ROOT) == ["b"]
        tree = storage.store.source.tree(f"{storage.top}/d", ROOT, lambda name: True)
        assert sorted(one.name for one in tree) == ["b", "sub/a"]

    @staticmethod
    def _sas(**permission: bool) -> str:
        sas: str = generate_container_sas(
            ACCOUNT,
            BUCKET,
            account_key=ACCOUNT_KEY,
            permission=ContainerSasPermissions(**permission),
            expiry=datetime.now(timezone.utc) + timedelta(hours=1),
        )
        return sas
