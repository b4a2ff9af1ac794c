"""az:// and abfss:// URIs, and to whom credentials go."""

from __future__ import annotations

import pytest

from penstock.server.errors import AccessDeniedError, InvalidRequestError
from penstock.server.sources import Access
from penstock.server.sources.azure.location import Location, parse
from penstock.server.sources.objects.keys import check_access

HOST = "account.dfs.core.windows.net"


@pytest.mark.parametrize(
    ("uri", "location", "canonical"),
    [
        ("az://c/a/b", Location("c", "a/b"), "az://c/a/b"),
        ("az://my-models", Location("my-models", ""), "az://my-models/"),
        ("az://$root/k?%41#1", Location("$root", "k?%41#1"), "az://$root/k?%41#1"),
        (f"abfss://c@{HOST}/a/b", Location("c", "a/b", HOST), f"abfss://c@{HOST}/a/b"),
        (
            "abfss://c@account.z12.dfs.storage.azure.net/a",
            Location("c", "a", "account.z12.dfs.storage.azure.net"),
            "abfss://c@account.z12.dfs.storage.azure.net/a",
        ),
    ],
)
def test_a_uri_is_written_in_one_way(uri: str, location: Location, canonical: str) -> None:
    assert parse(uri) == location
    assert location.uri == canonical
    assert parse(canonical) == location


@pytest.mark.parametrize(
    "uri",
    [
        "az://C/k",
        "az:///k",
        "az://c_d/k",
        "abfss://c/k",
        "abfss://c@account/k",
        "abfss://c@account.blob.core.windows.net/k",
        "abfss://c@account.dfs.example.com/k",
        "abfss://c@account.dfs.core.windows.net.example.com/k",
        "abfss://c@account.dfs.core.windows.net:8080/k",
        "abfss://c@user@account.dfs.core.windows.net/k",
        "abfss://c@a.b.dfs.core.windows.net/k",
        "abfss://c@example.com/account.dfs.core.windows.net/k",
        "abfss://@account.dfs.core.windows.net/k",
    ],
)
def test_no_credentials_go_to_what_is_not_azure_s(uri: str) -> None:
    with pytest.raises(InvalidRequestError, match="is not of the form"):
        parse(uri)


def test_a_domain_that_is_configured_is_azure_s_too() -> None:
    uri = "abfss://c@account.dfs.azure.example.com/k"
    assert parse(uri, {"azure.example.com"}).uri == uri


def test_a_prefix_counts_for_the_way_in_which_it_is_written() -> None:
    short, long = Access(1, False, ("az://c/m",)), Access(1, False, (f"abfss://c@{HOST}/m",))
    check_access(parse("az://c/m/k"), short)
    check_access(parse(f"abfss://c@{HOST}/m/k"), long)
    for uri, access in (
        ("az://c/m/k", long),
        (f"abfss://c@{HOST}/m/k", short),
        ("abfss://c@another.dfs.core.windows.net/m/k", long),
        (f"abfss://d@{HOST}/m/k", long),
    ):
        with pytest.raises(AccessDeniedError):
            check_access(parse(uri), access)
