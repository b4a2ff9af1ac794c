"""Tokens of identities, from servers on the loopback; which credentials are for which account; what is said
where there are none. Keys and SAS are tested against Azurite, in tests/stores."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from azure.identity._internal import utils

from penstock.server.errors import AccessDeniedError, InvalidRequestError, SourceUnavailableError
from penstock.server.sources.azure.account import Account
from penstock.server.sources.azure.identity import AzureIdentity
from penstock.server.sources.azure.location import parse
from penstock.server.sources.azure.settings import AzureSettings
from penstock.server.sources.azure.source import AzureSource
from penstock.server.sources.objects.service import Ask

from ....s3.authority import Authority
from ....server.entra import CLIENT, TENANT, Entra, of_workload_identity
from ....server.objects import Asked, ObjectServer
from .. import tokens
from ..tokens import SETTINGS, answer_range, without_identity


class Blobs:
    """One blob, for those whose tokens are not revoked."""

    def __init__(self, server: ObjectServer) -> None:
        self.url = server.url
        self.revoked: set[str] = set()
        self.authorizations: list[str] = []
        server.hooks.append(self._answer)

    def _answer(self, asked: Asked) -> bool:
        if not asked.target.startswith("/account/c/k"):
            return False
        authorization = asked.headers.get("authorization", "")
        self.authorizations.append(authorization)
        if authorization.removeprefix("Bearer ") in self.revoked:
            asked.answer(401, x_ms_error_code="InvalidAuthenticationInfo")
            return True
        answer_range(asked, ETag='"0x8D"')
        return True


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch, authority: Authority) -> Iterator[tuple[Entra, Blobs]]:
    without_identity(monkeypatch, "AZURE_", "IDENTITY_", "MSI_")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(authority.bundle))
    with (
        contextlib.closing(ObjectServer()) as plain,
        contextlib.closing(ObjectServer(tls=authority.server("127.0.0.1"))) as secure,
    ):
        endpoint = f"BlobEndpoint={plain.url}/account;AccountName=account"
        monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", endpoint)
        monkeypatch.setenv("AZURE_AUTHORITY_HOST", secure.url)
        yield Entra(plain, secure), Blobs(plain)


@pytest.fixture
def source(node: object) -> Iterator[AzureSource]:
    with ThreadPoolExecutor(2) as workers:
        made = AzureSource(SETTINGS, AzureSettings(), lambda uid: workers, lambda reason: None)
        yield made
        made.stop()


@pytest.fixture
def workload_identity(node: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The file that is mounted."""
    for name, value in of_workload_identity(tmp_path).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "projected"


@pytest.fixture
def managed_identity(node: tuple[Entra, Blobs], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IDENTITY_ENDPOINT", f"{node[1].url}/msi/token")
    monkeypatch.setenv("IDENTITY_HEADER", "header-secret")


def read(source: AzureSource) -> None:
    tokens.read(source, "az://c/k")


@pytest.mark.usefixtures("workload_identity")
def test_workload_identity_exchanges_what_is_mounted(node: tuple[Entra, Blobs], source: AzureSource) -> None:
    entra, blobs = node
    read(source)
    ((asked, body),) = entra.asked
    assert asked.target.startswith(f"/{TENANT}/oauth2/")
    assert "client_assertion=a.token.of.kubernetes" in body
    assert "storage.azure.com" in body
    assert set(blobs.authorizations) == {"Bearer eyJ.secret-0"}


@pytest.mark.usefixtures("managed_identity")
def test_a_managed_identity_s_token_comes_from_the_node(
    node: tuple[Entra, Blobs], source: AzureSource
) -> None:
    entra, blobs = node
    read(source)
    assert [asked.target.partition("?")[0] for asked, _ in entra.asked] == ["/msi/token"]
    assert set(blobs.authorizations) == {"Bearer eyJ.secret-0"}


@pytest.mark.usefixtures("workload_identity")
def test_an_identity_that_is_refused_is_told_by_its_code_alone(
    node: tuple[Entra, Blobs], source: AzureSource
) -> None:
    entra, blobs = node
    entra.refusal = (401, {"error": "invalid_client", "error_description": "AADSTS700213: not hunter2"})
    with pytest.raises(AccessDeniedError, match=r"\(AADSTS700213\); check AZURE_CLIENT_ID") as raised:
        read(source)
    assert "hunter2" not in str(raised.value)
    assert not blobs.authorizations


@pytest.mark.parametrize(
    ("variable", "kind"),
    [
        ("AZURE_FEDERATED_TOKEN_FILE", "WorkloadIdentityCredential"),
        ("AZURE_CLIENT_SECRET", "EnvironmentCredential"),
        ("", "DefaultAzureCredential"),
    ],
)
def test_one_kind_of_identity_is_asked_alone_where_variables_name_it(
    variable: str, kind: str, node: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_TENANT_ID", TENANT)
    monkeypatch.setenv("AZURE_CLIENT_ID", CLIENT)
    if variable:
        monkeypatch.setenv(variable, "x")
    assert type(AzureIdentity(20.0)._credential).__name__ == kind


@pytest.mark.usefixtures("workload_identity")
def test_a_token_that_ends_in_a_long_load_is_renewed(
    node: tuple[Entra, Blobs], source: AzureSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "DEFAULT_TOKEN_REFRESH_RETRY_DELAY", 0)  # azure-identity's, of half a minute
    entra, blobs = node
    entra.expires_in = 60
    read(source)
    assert len(entra.issued) >= 3
    assert len(set(blobs.authorizations)) >= 2


@pytest.mark.usefixtures("workload_identity")
def test_a_store_that_refuses_every_token_is_asked_a_bounded_number_of_times(
    node: tuple[Entra, Blobs], source: AzureSource
) -> None:
    node[1].revoked.update(f"eyJ.secret-{number}" for number in range(100))
    with pytest.raises(AccessDeniedError, match=r"InvalidAuthenticationInfo.*check the identity") as raised:
        read(source)
    assert 1 <= len(node[1].authorizations) <= 3
    assert "eyJ" not in str(raised.value)


def test_a_token_that_is_not_mounted_is_told_by_the_variables(
    node: tuple[Entra, Blobs], source: AzureSource, workload_identity: Path
) -> None:
    workload_identity.unlink()
    with pytest.raises(AccessDeniedError, match="AZURE_FEDERATED_TOKEN_FILE") as raised:
        read(source)
    assert str(workload_identity) not in str(raised.value)


@pytest.mark.usefixtures("workload_identity")
def test_an_authority_that_cannot_be_reached_is_asked_again_and_then_named(
    node: tuple[Entra, Blobs], source: AzureSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(ObjectServer()) as gone:
        monkeypatch.setenv("AZURE_AUTHORITY_HOST", gone.url.replace("http:", "https:"))
    with pytest.raises(SourceUnavailableError, match=r"2 times in a row.*no token for penstockd"):
        read(source)


def test_az_uris_need_an_account(monkeypatch: pytest.MonkeyPatch, node: object, source: AzureSource) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    with pytest.raises(InvalidRequestError, match="AZURE_STORAGE_ACCOUNT_NAME"):
        read(source)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("AccountName=acc;AccountKey=c2VjcmV0", "AccountName nor a BlobEndpoint"),
        ("BlobEndpoint=ftp://hunter2/x", "AccountName nor a BlobEndpoint"),
        ("hunter2", "AccountName nor a BlobEndpoint"),
        ("AccountName=acc;AccountKey=hunter2!", "no Base64"),
    ],
)
def test_a_connection_string_that_is_none_is_not_told(
    text: str, parts: str, monkeypatch: pytest.MonkeyPatch, node: object
) -> None:
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", text)
    if "c2VjcmV0" in text:  # which is one
        Account(AzureSettings(), 20.0)
        return
    with pytest.raises((SourceUnavailableError, AccessDeniedError), match=parts) as raised:
        Account(AzureSettings(), 20.0)
    assert "hunter2" not in str(raised.value)


def signed(uri: str, settings: AzureSettings | None = None) -> tuple[str, dict[str, str]]:
    request = Account(settings or AzureSettings(), 20.0).sign(Ask("GET", parse(uri), {}))
    return request.url, dict(request.headers)


def test_the_endpoint_follows_from_account_and_domain(monkeypatch: pytest.MonkeyPatch, node: object) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    url, headers = signed("az://c/a b", AzureSettings(account="acc", suffix="core.chinacloudapi.cn"))
    assert url == "https://acc.blob.core.chinacloudapi.cn/c/a%20b"
    assert headers["Authorization"].startswith("SharedKey acc:")


@pytest.mark.usefixtures("managed_identity")
def test_key_and_sas_are_for_the_configured_account_alone(
    monkeypatch: pytest.MonkeyPatch, node: tuple[Entra, Blobs]
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    settings = AzureSettings(account="acc")
    for name, value, mark in (
        ("SAS_TOKEN", "?sig=secret", "sig=secret"),
        ("ACCOUNT_KEY", "c2VjcmV0", "SharedKey"),
    ):
        monkeypatch.setenv(f"AZURE_STORAGE_{name}", value)
        for uri in ("az://c/k", "abfss://c@acc.dfs.core.windows.net/k"):
            assert mark in str(signed(uri, settings))
        for uri in ("abfss://c@other.dfs.core.windows.net/k", "abfss://c@acc.dfs.core.chinacloudapi.cn/k"):
            url, headers = signed(uri, settings)
            assert mark not in url + str(headers)
            assert headers["Authorization"].startswith("Bearer ")
            assert url == uri.replace("abfss://c@", "https://").replace(".dfs.", ".blob.").replace(
                "/k", "/c/k"
            )


def test_without_credentials_none_are_sent_anywhere(node: object) -> None:
    for uri in ("az://c/k", "abfss://c@other.dfs.core.windows.net/k"):
        assert "Authorization" not in signed(uri, AzureSettings(anonymous=True))[1]


def test_a_missing_library_is_named_with_what_to_install_and_keys_do_without(
    node: object, source: AzureSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "azure.identity", None)
    with pytest.raises(SourceUnavailableError, match=r"tokens need azure-identity.*penstock\[azure\]"):
        read(source)
    monkeypatch.delenv("AZURE_STORAGE_CONNECTION_STRING")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "c2VjcmV0")
    assert "SharedKey" in str(signed("az://c/k", AzureSettings(account="acc")))
