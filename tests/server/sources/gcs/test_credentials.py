"""Tokens of every kind of credentials, from servers on the loopback, and what is said where there is none."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from google.auth.compute_engine import _metadata

from penstock.server.errors import AccessDeniedError, SourceUnavailableError
from penstock.server.sources.gcs.settings import GcsSettings
from penstock.server.sources.gcs.source import GcsSource

from ....server.objects import Asked, ObjectServer
from ....server.support import ROOT
from .. import tokens
from ..tokens import CONTENT, SETTINGS, answer_range, without_identity

MINT = "/token"
STS = "/v1/sts"
IMPERSONATE = "/v1/projects/-/serviceAccounts/reader@p.iam.gserviceaccount.com:generateAccessToken"
METADATA = "/computeMetadata/v1/instance/service-accounts/"


class Google:
    """Objects, and those who give tokens for them: each good until it is revoked."""

    def __init__(self, server: ObjectServer) -> None:
        self.server = server
        self.issued: list[str] = []
        self.revoked: set[str] = set()
        self.expires_in = 3600
        self.minted_by: list[str] = []
        self.refuses: dict[str, Callable[[Asked], None]] = {}
        """What gives tokens and does not, by its path."""
        server.hooks.append(self._answer)
        server.put("k", CONTENT)

    @property
    def authorizations(self) -> list[str]:
        """Of the requests for objects."""
        return [one.headers.get("authorization", "") for one in self.server.asked if "/bucket/" in one.target]

    def _answer(self, asked: Asked) -> bool:
        path = asked.target.partition("?")[0]
        if path in self.refuses:
            self.refuses[path](asked)
        elif path in (MINT, STS, IMPERSONATE) or path.endswith("/token"):
            self._issue(asked, path)
        elif path == "/" or path.startswith(METADATA):
            body = {"email": "node@p.iam.gserviceaccount.com", "scopes": [], "aliases": []}
            asked.answer(
                200, json.dumps(body).encode(), Metadata_Flavor="Google", Content_Type="application/json"
            )
        elif path.startswith("/bucket/"):
            self._object(asked)
        else:
            asked.answer(404)
        return True

    def _issue(self, asked: Asked, path: str) -> None:
        length = int(asked.headers.get("content-length", "0"))
        asked.handler.rfile.read(length)
        token = f"ya29.secret-{len(self.issued)}"
        self.issued.append(token)
        self.minted_by.append(path)
        ends = time.gmtime(time.time() + self.expires_in)
        body = {
            "access_token": token,
            "expires_in": self.expires_in,
            "token_type": "Bearer",
            "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
            "accessToken": token,
            "expireTime": time.strftime("%Y-%m-%dT%H:%M:%SZ", ends),
        }
        asked.answer(
            200, json.dumps(body).encode(), Metadata_Flavor="Google", Content_Type="application/json"
        )

    def _object(self, asked: Asked) -> None:
        token = asked.headers.get("authorization", "").removeprefix("Bearer ")
        if token in self.revoked:
            asked.answer(401, b"<Error><Code>AuthenticationRequired</Code></Error>")
            return
        answer_range(asked, x_goog_generation="1")


@pytest.fixture
def google(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Google]:
    without_identity(monkeypatch, "GOOGLE_", "CLOUDSDK_", "GCE_")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "no-gcloud"))
    # Nobody's, unless a test says otherwise; a machine of Google's has one.
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", True)
    with contextlib.closing(ObjectServer()) as server:
        yield Google(server)


Make = Callable[..., GcsSource]


@pytest.fixture
def source(google: Google) -> Iterator[Make]:
    made: list[GcsSource] = []
    with ThreadPoolExecutor(2) as workers:

        def make(**own: Any) -> GcsSource:
            own_settings = GcsSettings(endpoint=google.server.url, **own)
            made.append(GcsSource(SETTINGS, own_settings, lambda uid: workers, lambda reason: None))
            return made[-1]

        yield make
        for one in made:
            one.stop()


@pytest.fixture(scope="module")
def key() -> str:
    private = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    return private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


@pytest.fixture
def account_file(google: Google, key: str, tmp_path: Path) -> Path:
    """Of a service account."""
    info = {
        "type": "service_account",
        "project_id": "p",
        "private_key_id": "k1",
        "private_key": key,
        "client_email": "reader@p.iam.gserviceaccount.com",
        "client_id": "1",
        "token_uri": google.server.url + MINT,
    }
    return write(tmp_path / "account.json", info)


@pytest.fixture
def federation_file(google: Google, tmp_path: Path) -> Path:
    """Of workload identity federation: a token that Kubernetes mounts is exchanged, and then impersonates."""
    (tmp_path / "projected").write_text("a.token.of.kubernetes")
    info = {
        "type": "external_account",
        "audience": "//iam.googleapis.com/projects/1/locations/global/workloadIdentityPools/p/providers/k",
        "subject_token_type": "urn:ietf:params:oauth:token-type:jwt",
        "token_url": google.server.url + STS,
        "service_account_impersonation_url": google.server.url + IMPERSONATE,
        "credential_source": {"file": str(tmp_path / "projected")},
    }
    return write(tmp_path / "federation.json", info)


def write(path: Path, info: dict[str, Any]) -> Path:
    path.write_text(json.dumps(info))
    return path


def read(source: GcsSource) -> None:
    tokens.read(source, "gs://bucket/k")


def test_a_service_account_s_file_is_used_where_the_flag_names_it(
    google: Google, source: Make, account_file: Path
) -> None:
    read(source(credential_file=str(account_file)))
    assert google.minted_by == [MINT]
    assert set(google.authorizations) == {"Bearer ya29.secret-0"}


def test_it_is_used_where_google_s_own_variable_names_it(
    google: Google, source: Make, account_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(account_file))
    monkeypatch.setenv("GOOGLE_CLOUD_QUOTA_PROJECT", "payer")
    read(source())
    assert google.minted_by == [MINT]
    objects = [one for one in google.server.asked if "/bucket/" in one.target]
    assert {one.headers["x-goog-user-project"] for one in objects} == {"payer"}


def test_workload_identity_federation_exchanges_and_impersonates_and_looks_up_no_project(
    google: Google, source: Make, federation_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(federation_file))
    read(source())
    assert google.minted_by[:2] == [STS, IMPERSONATE]
    assert set(google.authorizations) <= {f"Bearer {token}" for token in google.issued}


def test_a_node_s_or_a_pod_s_account_comes_from_the_metadata_server(
    google: Google, source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = google.server.url.removeprefix("http://")
    monkeypatch.setattr(_metadata, "_NO_GCE_CHECK", False)
    monkeypatch.setattr(_metadata, "_GCE_METADATA_HOST", host)
    monkeypatch.setenv("GCE_METADATA_IP", host)
    read(source())
    assert len(google.issued) == 1
    assert set(google.authorizations) == {"Bearer ya29.secret-0"}


def test_without_credentials_nothing_is_sent_that_says_who_asks(google: Google, source: Make) -> None:
    read(source(anonymous=True))
    assert set(google.authorizations) == {""}


def test_a_token_that_ends_in_a_long_load_is_renewed(
    google: Google, source: Make, account_file: Path
) -> None:
    google.expires_in = 60
    read(source(credential_file=str(account_file)))
    assert len(google.issued) >= 3
    assert len(set(google.authorizations)) >= 2


def test_what_is_refused_for_its_token_is_asked_again_with_a_new_one(
    google: Google, source: Make, account_file: Path
) -> None:
    made = source(credential_file=str(account_file))
    read(made)
    google.revoked.add(google.issued[0])
    read(made)
    assert google.authorizations[-1] == "Bearer ya29.secret-1"


def test_a_store_that_refuses_every_token_is_asked_a_bounded_number_of_times(
    google: Google, source: Make, account_file: Path
) -> None:
    google.revoked.update(f"ya29.secret-{number}" for number in range(100))
    with pytest.raises(AccessDeniedError, match="HTTP 401") as raised:
        source(credential_file=str(account_file)).open("gs://bucket/k", ROOT)
    assert len(google.authorizations) == 3
    assert "ya29" not in str(raised.value)


def refuse(status: int, **body: Any) -> Callable[[Asked], None]:
    def answer(asked: Asked) -> None:
        asked.handler.rfile.read(int(asked.headers.get("content-length", "0")))
        asked.answer(status, json.dumps(body).encode(), Content_Type="application/json")

    return answer


def test_a_key_that_google_refuses_is_told_by_its_code_alone(
    google: Google, source: Make, account_file: Path
) -> None:
    google.refuses[MINT] = refuse(400, error="invalid_grant", error_description="quoted-secret")
    with pytest.raises(AccessDeniedError, match=r"service account's key \(invalid_grant\); check") as raised:
        source(credential_file=str(account_file)).open("gs://bucket/k", ROOT)
    assert "quoted-secret" not in str(raised.value)


def test_an_account_that_may_not_be_impersonated_is_told(
    google: Google, source: Make, federation_file: Path
) -> None:
    google.refuses[IMPERSONATE] = refuse(403, error={"code": 403, "status": "PERMISSION_DENIED"})
    with pytest.raises(AccessDeniedError, match="PERMISSION_DENIED"):
        source(credential_file=str(federation_file)).open("gs://bucket/k", ROOT)


def test_who_gives_tokens_and_does_not_answer_is_asked_again_and_then_named(
    google: Google, source: Make, account_file: Path
) -> None:
    info = json.loads(account_file.read_text())
    with contextlib.closing(ObjectServer()) as gone:
        info["token_uri"] = gone.url + MINT
    write(account_file, info)
    with pytest.raises(SourceUnavailableError, match=r"2 times in a row.*no token for penstockd"):
        source(credential_file=str(account_file)).open("gs://bucket/k", ROOT)


@pytest.mark.parametrize(
    "content", [None, "", "{", "[]", '{"type": "service_account"}', '{"type": "hunter2"}']
)
def test_a_file_that_cannot_be_used_is_told_by_the_setting_that_names_it(
    content: str | None, google: Google, source: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "hunter2.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(AccessDeniedError, match="--gcs-credential-file names is missing, or") as raised:
        source(credential_file=str(path)).open("gs://bucket/k", ROOT)
    assert "hunter2" not in str(raised.value)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(path))
    with pytest.raises(AccessDeniedError, match="GOOGLE_APPLICATION_CREDENTIALS"):
        source().open("gs://bucket/k", ROOT)


def test_where_there_are_no_credentials_the_ways_to_give_some_are_named(google: Google, source: Make) -> None:
    with pytest.raises(AccessDeniedError, match=r"has no Google credentials.*--gcs-anonymous 1"):
        source().open("gs://bucket/k", ROOT)


def test_a_missing_library_is_named_with_what_to_install(
    google: Google, source: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "google.auth.transport.requests", None)
    with pytest.raises(SourceUnavailableError, match=r"need google-auth and requests.*penstock\[gcs\]"):
        source().open("gs://bucket/k", ROOT)
    read(source(anonymous=True))
