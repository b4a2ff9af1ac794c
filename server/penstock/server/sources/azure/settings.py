"""The daemon's flags and variables for Azure alone. Secrets come by variables only, since everybody can see
the arguments of a process. azure-identity reads its own variables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ...config import values
from ...config.options import Option
from ...config.settings import Config
from ...errors import SourceUnavailableError
from .location import SUFFIXES

CONNECTION_STRING = "AZURE_STORAGE_CONNECTION_STRING"
ACCOUNT_KEY = "AZURE_STORAGE_ACCOUNT_KEY"
SAS_TOKEN = "AZURE_STORAGE_SAS_TOKEN"
_ACCOUNT = re.compile(r"[a-z0-9]{3,24}", re.ASCII)
_SUFFIX = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,198}[a-z0-9])?", re.ASCII)


def _account(text: str) -> str:
    if text and not _ACCOUNT.fullmatch(text):
        raise ValueError(f"{text[:50]!r} is no name of a storage account (3 to 24 of a-z and 0-9); write one")
    return text


def _suffix(text: str) -> str:
    text = text.removeprefix("blob.")  # Run:ai's variable begins with it
    if not _SUFFIX.fullmatch(text):
        raise ValueError(f"{text[:50]!r} is no domain such as core.windows.net; write one")
    return text


OPTIONS = (
    Option(
        "--azure-account",
        "",
        _account,
        "storage account that az:// URIs are in, unless AZURE_STORAGE_CONNECTION_STRING names it",
        "NAME",
        ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT"),
    ),
    Option(
        "--azure-endpoint-suffix",
        SUFFIXES[0],
        _suffix,
        "domain of the account's endpoints, for other clouds than the public one",
        "DOMAIN",
        ("AZURE_STORAGE_ENDPOINT_SUFFIX",),
    ),
    Option(
        "--azure-anonymous",
        "0",
        values.switch,
        "1: ask Azure without credentials, for public containers",
        "0|1",
        ("AZURE_STORAGE_ANON",),
    ),
)


@dataclass(frozen=True, slots=True)
class AzureSettings:
    account: str = ""
    suffix: str = SUFFIXES[0]
    anonymous: bool = False

    @classmethod
    def of(cls, config: Config) -> AzureSettings:
        return cls(
            account=config.store_options["azure_account"],
            suffix=config.store_options["azure_endpoint_suffix"],
            anonymous=config.store_options["azure_anonymous"],
        )


@dataclass(frozen=True, slots=True)
class Configured:
    """The account of `az://` URIs, and its secrets."""

    account: str
    endpoint: str
    """Without a slash at its end. Both are empty if no account is configured."""
    host: str
    """The host name by which abfss:// URIs name the account."""
    key: str = field(default="", repr=False)
    sas: str = field(default="", repr=False)


def configured(settings: AzureSettings, environment: Mapping[str, str]) -> Configured:
    """Raises SourceUnavailableError. The error names variables but no values."""
    text = environment.get(CONNECTION_STRING, "").strip()
    if text:
        return _from_connection_string(text, settings)
    account = settings.account
    return Configured(
        account,
        f"https://{account}.blob.{settings.suffix}" if account else "",
        f"{account}.dfs.{settings.suffix}",
        environment.get(ACCOUNT_KEY, "").strip(),
        _sas(environment.get(SAS_TOKEN, "")),
    )


def _from_connection_string(text: str, settings: AzureSettings) -> Configured:
    pairs = [part.strip().partition("=") for part in text.split(";") if part.strip()]
    said = {name.strip().lower(): value.strip() for name, _, value in pairs}
    account = said.get("accountname", settings.account)
    scheme = said.get("defaultendpointsprotocol", "https").lower()
    suffix = said.get("endpointsuffix", settings.suffix)
    endpoint = said.get("blobendpoint", f"{scheme}://{account}.blob.{suffix}" if account else "").rstrip("/")
    try:
        parts = urlsplit(endpoint)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.username is not None or parts.query:
        raise SourceUnavailableError(
            f"Azure: {CONNECTION_STRING} has neither AccountName nor a BlobEndpoint that is a URL; write it "
            "as the portal shows it"
        )
    # The first label of the host name; emulators have the account in the path.
    account = account or parts.path.strip("/") or str(parts.hostname).partition(".")[0]
    return Configured(
        account,
        endpoint,
        f"{account}.dfs.{suffix}",
        said.get("accountkey", ""),
        _sas(said.get("sharedaccesssignature", "")),
    )


def _sas(text: str) -> str:
    return text.strip().removeprefix("?")
