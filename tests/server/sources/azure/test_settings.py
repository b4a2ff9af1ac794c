"""What flags, variables and connection strings say of Azure."""

from __future__ import annotations

import pytest

from penstock.server.errors import ConfigError
from penstock.server.sources.azure.settings import AzureSettings, Configured, configured

from ...support import configuration_of

CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"


def settings(*flags: str, **variables: str) -> AzureSettings:
    return AzureSettings.of(configuration_of(*flags, **variables))


@pytest.mark.parametrize("variable", ["AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"])
def test_the_account_comes_from_a_variable_or_a_flag(variable: str) -> None:
    assert settings(**{variable: "acc"}) == AzureSettings("acc", "core.windows.net", False)
    assert settings("--azure-account", "other", **{variable: "acc"}).account == "other"


@pytest.mark.parametrize("text", ["core.chinacloudapi.cn", "blob.core.chinacloudapi.cn"])
def test_another_cloud_s_domain_is_taken_as_azure_and_as_run_ai_write_it(text: str) -> None:
    found = settings(AZURE_STORAGE_ENDPOINT_SUFFIX=text, AZURE_STORAGE_ACCOUNT_NAME="acc")
    assert configured(found, {}).endpoint == "https://acc.blob.core.chinacloudapi.cn"


@pytest.mark.parametrize(
    ("value", "anonymous"), [("1", True), ("true", True), ("False", False), ("0", False)]
)
def test_the_variable_for_public_containers_counts(value: str, anonymous: bool) -> None:
    assert settings(AZURE_STORAGE_ANON=value).anonymous is anonymous


@pytest.mark.parametrize("account", ["a", "ACC", "a.b", "a" * 25, "evil.example.com/"])
def test_what_is_no_account_is_refused(account: str) -> None:
    with pytest.raises(ConfigError, match="--azure-account"):
        settings("--azure-account", account)


def test_secrets_come_from_variables() -> None:
    variables = {"AZURE_STORAGE_ACCOUNT_KEY": "a2V5", "AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=x"}
    found = configured(AzureSettings("acc"), variables)
    assert (found.key, found.sas) == ("a2V5", "sv=1&sig=x")
    assert "a2V5" not in repr(found)
    assert "sig" not in repr(found)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "DefaultEndpointsProtocol=https;AccountName=acc;AccountKey=a2V5==;EndpointSuffix=core.windows.net",
            Configured("acc", "https://acc.blob.core.windows.net", "acc.dfs.core.windows.net", key="a2V5=="),
        ),
        (
            "accountname=acc; accountkey=k ;ENDPOINTSUFFIX=core.usgovcloudapi.net;",
            Configured(
                "acc", "https://acc.blob.core.usgovcloudapi.net", "acc.dfs.core.usgovcloudapi.net", key="k"
            ),
        ),
        (
            "BlobEndpoint=http://127.0.0.1:10000/devstore/;SharedAccessSignature=sv=1&sig=a=b",
            Configured(
                "devstore",
                "http://127.0.0.1:10000/devstore",
                "devstore.dfs.core.windows.net",
                sas="sv=1&sig=a=b",
            ),
        ),
        (
            "BlobEndpoint=https://acc.privatelink.example.com;AccountKey=k",
            Configured("acc", "https://acc.privatelink.example.com", "acc.dfs.core.windows.net", key="k"),
        ),
    ],
)
def test_a_connection_string_says_account_endpoint_and_secret(text: str, expected: Configured) -> None:
    assert configured(AzureSettings(), {CONNECTION: text}) == expected


def test_a_connection_string_wins_over_single_variables() -> None:
    variables = {CONNECTION: "AccountName=acc;AccountKey=k", "AZURE_STORAGE_ACCOUNT_KEY": "other"}
    assert configured(AzureSettings("another"), variables).key == "k"
