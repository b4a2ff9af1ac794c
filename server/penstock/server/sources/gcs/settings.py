"""The daemon's flags and variables for GCS alone. google-auth reads the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from ...config import values
from ...config.options import Option
from ...config.settings import Config
from ...errors import ConfigError

ENDPOINT = "https://storage.googleapis.com"


def _endpoint(text: str) -> str:
    """Empty, or a URL without a slash at its end. The URL of an emulator may lack its scheme."""
    text = text.strip()
    if not text:
        return ""
    url = (text if "://" in text else f"http://{text}").rstrip("/")
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query or parts.fragment:
        shown = text.rpartition("@")[2][:100]  # without a password
        raise ValueError(f"{shown!r} is no URL of the form https://HOST or https://HOST:PORT; write one")
    return url


OPTIONS = (
    Option(
        "--gcs-credential-file",
        "",
        str.strip,
        "file of a service account, of workload identity federation or of another kind that google-auth "
        "knows; without it application default credentials are looked for",
        "FILE",
        ("RUNAI_STREAMER_GCS_CREDENTIAL_FILE",),
    ),
    Option(
        "--gcs-anonymous",
        "0",
        values.switch,
        "1: ask GCS without credentials, for public buckets",
        "0|1",
        ("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS",),
    ),
    Option(
        "--gcs-endpoint",
        "",
        _endpoint,
        f"where GCS is, such as a private endpoint, instead of {ENDPOINT}",
        "URL",
    ),
    Option(
        "--gcs-emulator",
        "",
        _endpoint,
        "where something is that stands for GCS: asked without credentials, unless --gcs-credential-file "
        "names some",
        "URL",
        ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"),
    ),
)


def check(given: Mapping[str, Any]) -> None:
    """Raises ConfigError where flags contradict each other."""
    if given["gcs_anonymous"] and given["gcs_credential_file"]:
        raise ConfigError(
            "--gcs-anonymous: GCS cannot be asked with the credentials of --gcs-credential-file and without "
            "any; leave out one of the two"
        )
    if given["gcs_endpoint"] and given["gcs_emulator"]:
        raise ConfigError(
            "--gcs-endpoint: --gcs-emulator (STORAGE_EMULATOR_HOST) names another place; leave out one"
        )


@dataclass(frozen=True, slots=True)
class GcsSettings:
    endpoint: str = ENDPOINT
    anonymous: bool = False
    credential_file: str = ""
    """Empty: application default credentials are used."""

    @classmethod
    def of(cls, config: Config) -> GcsSettings:
        options = config.store_options
        emulator, file = options["gcs_emulator"], options["gcs_credential_file"]
        return cls(
            endpoint=options["gcs_endpoint"] or emulator or ENDPOINT,
            anonymous=options["gcs_anonymous"] or bool(emulator and not file),
            credential_file=file,
        )
