"""By which authorities certificates are verified."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest

from penstock.server.errors import SourceUnavailableError
from penstock.server.sources.objects.trust import tls_context

from ....s3.authority import Authority

VARIABLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


@pytest.fixture(autouse=True)
def _nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def test_a_system_without_authorities_gets_those_of_a_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the image is one."""
    nowhere = ssl.DefaultVerifyPaths("", "", "SSL_CERT_FILE", "", "SSL_CERT_DIR", "")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nowhere)
    assert len(tls_context("x").get_ca_certs()) > 50


@pytest.mark.parametrize("variable", VARIABLES)
def test_a_bundle_that_is_named_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, str(Authority(tmp_path).bundle))
    context = tls_context("x")
    assert len(context.get_ca_certs()) == 1
    assert (context.verify_mode, context.check_hostname) == (ssl.CERT_REQUIRED, True)
    monkeypatch.setenv(variable, str(tmp_path / "none"))
    with pytest.raises(SourceUnavailableError, match=f"x: the CA bundle .*none cannot be used.*{variable}"):
        tls_context("x")
