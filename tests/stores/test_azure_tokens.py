"""Azure Blob Storage passes what every store has to with the tokens of an identity too: against Azurite over
HTTPS, which checks their audience, issuer and times."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
from azure.identity._internal import utils
from azure.storage.blob import BlobServiceClient

from penstock.server.errors import AccessDeniedError
from penstock.server.sources.azure.store import AzureStore
from penstock.server.sources.objects import tokens

from ..e2e.support import random_tensors, running_daemon, same
from ..s3.authority import Authority
from ..s3.proxy import FaultProxy
from ..server.entra import Entra, json_web_token, of_workload_identity
from ..server.objects import ObjectServer
from ..server.support import make_config
from .conformance import CONTENT, ObjectStoreTests, closing
from .proxied import without_settings
from .servers import BUCKET, Server, azurite
from .test_azure_store import Azure, connection_string, service_of


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Iterator[Server]:
    with azurite(authority) as server:
        yield server


@pytest.fixture(scope="module")
def service(server: Server, authority: Authority) -> Iterator[BlobServiceClient]:
    with service_of(server, connection_verify=str(authority.bundle)) as service:
        service.create_container(BUCKET)
        yield service


@pytest.fixture(scope="module")
def module_proxy(server: Server, authority: Authority) -> Iterator[FaultProxy]:
    tls, trusting = authority.server("127.0.0.1"), ssl.create_default_context(cafile=authority.bundle)
    with contextlib.closing(FaultProxy(server.port, tls=tls, upstream_tls=trusting)) as proxy:
        yield proxy


@pytest.fixture
def entra(authority: Authority) -> Iterator[Entra]:
    with contextlib.closing(ObjectServer(tls=authority.server("127.0.0.1"))) as server:
        yield Entra(server, mint=json_web_token)


@pytest.fixture
def environment(
    module_proxy: FaultProxy, entra: Entra, authority: Authority, tmp_path: Path
) -> dict[str, str]:
    """Of a daemon in a pod with a workload identity."""
    module_proxy.reset()
    return {
        "AZURE_STORAGE_CONNECTION_STRING": connection_string(module_proxy.endpoint),
        "AZURE_AUTHORITY_HOST": entra.url,
        "REQUESTS_CA_BUNDLE": str(authority.bundle),
        **of_workload_identity(tmp_path),
    }


class TestAzureStoreByTokens(ObjectStoreTests):
    @pytest.fixture
    def storage(
        self,
        monkeypatch: pytest.MonkeyPatch,
        environment: dict[str, str],
        service: BlobServiceClient,
        module_proxy: FaultProxy,
    ) -> Iterator[Azure]:
        without_settings(monkeypatch)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        config = make_config(object_retries=2, object_timeout_seconds=20.0)
        yield from closing(Azure(AzureStore(config), module_proxy, service))  # type: ignore[misc]

    def test_one_token_serves_all_requests_until_it_ends(
        self, storage: Azure, entra: Entra, module_proxy: FaultProxy
    ) -> None:
        location = storage.put("a", CONTENT)
        for _ in range(3):
            assert storage.read(location, 0, 400_000) == CONTENT
        (token,) = entra.issued
        assert {request.headers["Authorization"] for request in module_proxy.requests()} == {
            f"Bearer {token}"
        }

    def test_a_token_that_ends_soon_is_renewed(
        self, storage: Azure, entra: Entra, module_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(tokens, "LEAST_SECONDS", 0.0)
        monkeypatch.setattr(utils, "DEFAULT_TOKEN_REFRESH_RETRY_DELAY", 0)  # azure-identity's own
        entra.expires_in = 60
        location = storage.put("a", CONTENT)
        for _ in range(3):
            assert storage.read(location, 0, 400_000) == CONTENT
        assert len({request.headers["Authorization"] for request in module_proxy.requests()}) > 1

    @pytest.mark.parametrize(
        ("audience", "seconds"), [("https://graph.microsoft.com", 3600), ("https://storage.azure.com", -3600)]
    )
    def test_a_token_that_the_store_refuses_is_not_told(
        self, audience: str, seconds: int, storage: Azure, entra: Entra
    ) -> None:
        """One for another service, or one that this node takes for good and that has ended."""
        entra.mint = lambda number, ends: json_web_token(number, ends - 3600 + seconds, audience=audience)
        location = storage.put("a", CONTENT)
        with pytest.raises(AccessDeniedError, match=r"AuthenticationFailed.*check the identity") as raised:
            storage.open(location)
        assert entra.issued
        assert not any(token in str(raised.value) for token in entra.issued)


def test_a_daemon_in_a_pod_with_an_identity_loads_and_tells_no_token(
    environment: dict[str, str], entra: Entra, service: BlobServiceClient
) -> None:
    tensors = random_tensors(4, 1000)
    service.get_blob_client(BUCKET, "pod/m.safetensors").upload_blob(safetensors.torch.save(tensors))
    with running_daemon(environment={**environment, "NO_PROXY": "127.0.0.1"}) as daemon:
        with daemon.client() as client:
            same(client.load(f"az://{BUCKET}/pod"), tensors)
        told = daemon.log() + str(daemon.status())
    (token,) = entra.issued
    assert token not in told
    assert "eyJ" not in told
