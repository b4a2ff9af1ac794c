"""What flags and variables say of GCS, Run:ai's and those of emulators among them."""

from __future__ import annotations

import pytest

from penstock.server.errors import ConfigError
from penstock.server.sources.gcs.settings import ENDPOINT, GcsSettings

from ...support import configuration_of


def settings(*flags: str, **variables: str) -> GcsSettings:
    return GcsSettings.of(configuration_of(*flags, **variables))


def test_without_any_google_is_asked_with_what_is_found() -> None:
    assert settings() == GcsSettings(ENDPOINT, False, "")


@pytest.mark.parametrize("variable", ["PENSTOCK_GCS_CREDENTIAL_FILE", "RUNAI_STREAMER_GCS_CREDENTIAL_FILE"])
def test_a_file_of_credentials_may_be_named_by_a_variable(variable: str) -> None:
    assert settings(**{variable: "/f"}).credential_file == "/f"
    assert settings("--gcs-credential-file", "/g", **{variable: "/f"}).credential_file == "/g"


@pytest.mark.parametrize("value", ["1", "true", "True"])
def test_run_ai_s_variable_for_public_buckets_counts(value: str) -> None:
    assert settings(RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS=value).anonymous
    assert not settings(RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS="False").anonymous


@pytest.mark.parametrize("variable", ["STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"])
@pytest.mark.parametrize("value", ["localhost:4443", "http://localhost:4443/"])
def test_an_emulator_is_asked_without_credentials_unless_a_file_is_named(variable: str, value: str) -> None:
    emulated = settings(**{variable: value})
    assert (emulated.endpoint, emulated.anonymous) == ("http://localhost:4443", True)
    assert not settings("--gcs-credential-file", "/f", **{variable: value}).anonymous


def test_another_endpoint_is_asked_with_credentials() -> None:
    private = settings("--gcs-endpoint", "https://storage-me.p.googleapis.com/")
    assert (private.endpoint, private.anonymous) == ("https://storage-me.p.googleapis.com", False)


@pytest.mark.parametrize(
    "url", ["ftp://x", "http://", "http://user:hunter2@x:y", "https://x?y", "http://x:99999"]
)
def test_an_endpoint_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match="--gcs-endpoint") as raised:
        settings("--gcs-endpoint", url)
    assert "hunter2" not in str(raised.value)
