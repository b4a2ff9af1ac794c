"""Whom TLS trusts, where a store's library does not say: a server whose authority is private."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from penstock.server.errors import SourceUnavailableError
from penstock.server.sources.gcs.settings import GcsSettings
from penstock.server.sources.gcs.source import GcsSource
from penstock.server.sources.objects import ObjectSettings, faults, trust

from ....s3.authority import Authority
from ....server.objects import Asked, ObjectServer
from ....server.support import ROOT

Open = Callable[[], None]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def open_there(authority: Authority, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens an object of that server."""
    for name in list(os.environ):
        if name.endswith("_CA_BUNDLE") or name.startswith("SSL_CERT_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(faults, "FIRST_DELAY_SECONDS", 0.0)  # retries are not waited for

    def answer(asked: Asked) -> bool:
        asked.answer(206, b"abc", Content_Range="bytes 0-2/3", x_goog_generation="1")
        return True

    with (
        contextlib.closing(ObjectServer(hooks=[answer], tls=authority.server("127.0.0.1"))) as server,
        ThreadPoolExecutor(1) as workers,
    ):

        def open_() -> None:
            settings = ObjectSettings(retries=1, timeout_seconds=20.0, connections=1)
            own = GcsSettings(endpoint=server.url, anonymous=True)
            source = GcsSource(settings, own, lambda uid: workers, lambda reason: None)
            try:
                source.open("gs://bucket/k", ROOT).close()
            finally:
                source.stop()

        yield open_


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_private_authority_is_trusted_where_a_variable_names_its_bundle(
    variable: str, open_there: Open, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, str(authority.bundle))
    open_there()


def test_nobody_else_is_trusted_and_the_variable_is_named(open_there: Open) -> None:
    with pytest.raises(SourceUnavailableError, match=r"is not trusted: .*REQUESTS_CA_BUNDLE"):
        open_there()


def test_a_bundle_that_is_none_is_told_by_its_variable(
    open_there: Open, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "bundle.pem").write_text("no certificate")
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "bundle.pem"))
    with pytest.raises(SourceUnavailableError, match=r"GCS: the CA bundle .* check REQUESTS_CA_BUNDLE"):
        open_there()


def test_without_authorities_of_the_system_those_of_certifi_count(
    open_there: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = ssl.DefaultVerifyPaths(None, None, "", "", "", "")  # type: ignore[arg-type]
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: nothing)
    certifi = pytest.importorskip("certifi")
    assert trust._without_the_system_s() == certifi.where()
    assert trust.tls_context("GCS").cert_store_stats()["x509_ca"] > 50
