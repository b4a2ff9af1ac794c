"""What GCS and Azure answer, and what is wrong with their URIs, flags and credentials."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from penstock.server.errors import PenstockError
from penstock.server.sources.azure import answers as azure
from penstock.server.sources.azure.account import Account as AzureAccount
from penstock.server.sources.azure.identity import AzureIdentity
from penstock.server.sources.azure.location import parse as parse_azure
from penstock.server.sources.azure.settings import AzureSettings, configured
from penstock.server.sources.azure.signatures import SharedKey
from penstock.server.sources.gcs import answers as gcs
from penstock.server.sources.gcs.account import Account as GcsAccount
from penstock.server.sources.gcs.credentials import FILE_VARIABLE, GoogleCredentials
from penstock.server.sources.gcs.location import parse as parse_gcs
from penstock.server.sources.gcs.settings import GcsSettings
from penstock.server.sources.objects.service import Answer, Ask

from ..support import configuration_of
from . import provoked, said


def flags(*arguments: str) -> Callable[[], object]:
    return lambda: configuration_of(*arguments)


def from_gcs(
    status: int, code: str = "", *, listing: bool = False, anonymous: bool = False
) -> Callable[[], object]:
    answer = Answer(status, {}, f"<Error><Code>{code}</Code></Error>".encode())
    location = parse_gcs("gs://b/k")
    return lambda: gcs.failure(gcs.said(answer), location, listing=listing, anonymous=anonymous)


def from_azure(status: int, code: str = "", *, listing: bool = False) -> Callable[[], object]:
    answer = Answer(status, {"x-ms-error-code": code}, b"")
    location = parse_azure("az://c/k")
    return lambda: azure.failure(azure.said(answer), location, listing=listing, unknown="check its key")


def gcs_state(headers: Mapping[str, str]) -> Callable[[], object]:
    account = GcsAccount(GcsSettings(anonymous=True), 1.0)
    return lambda: account.state(parse_gcs("gs://b/k"), headers, 1)


def google_file(content: str) -> Callable[[], object]:
    """Credentials from a file with that content."""

    def provoke() -> object:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "credentials.json"
            path.write_text(content)
            return GoogleCredentials(str(path), 1.0).fetch()

    return provoke


def in_environment(provoke: Callable[[], object], **variables: str) -> Callable[[], object]:
    def provoked_there() -> object:
        before = dict(os.environ)
        os.environ.update(variables)
        try:
            return provoke()
        finally:
            os.environ.clear()
            os.environ.update(before)

    return provoked_there


def no_credentials_of_google() -> PenstockError:
    credentials = GoogleCredentials("", 1.0)
    return credentials._none(ValueError())


def no_credentials_of_azure() -> PenstockError:
    return AzureIdentity(1.0)._none(ValueError())


EXAMPLES = [
    # ---- GCS
    provoked(lambda: parse_gcs("gs://B/k"), "gs://B/k", "is not of the form gs://bucket/key", "write it so"),
    provoked(flags("--gcs-endpoint", "x://y"), "--gcs-endpoint", "is no URL of the form", "write one"),
    provoked(
        flags("--gcs-anonymous", "1", "--gcs-credential-file", "/f"),
        "--gcs-anonymous",
        "cannot be asked with the credentials",
        "leave out one of the two",
    ),
    provoked(
        flags("--gcs-endpoint", "https://a", "--gcs-emulator", "b"),
        "--gcs-endpoint",
        "names another place",
        "leave out one",
    ),
    provoked(gcs_state({}), "gs://b/k", "gives it no generation", "use a store that does"),
    provoked(
        gcs_state({"x-goog-generation": "1", "x-goog-stored-content-encoding": "gzip"}),
        "gs://b/k",
        "is stored with a Content-Encoding of its own ('gzip')",
        "upload it again without",
    ),
    provoked(
        from_gcs(403, "AccessDenied"),
        "gs://b/k",
        "HTTP 403 AccessDenied",
        "give penstockd's account the role",
    ),
    provoked(
        from_gcs(403, "AccessDenied", listing=True), "gs://b/k", "HTTP 403 AccessDenied", "name the files"
    ),
    provoked(from_gcs(401, anonymous=True), "gs://b/k", "asks without credentials", "give it some"),
    provoked(from_gcs(400, "UserProjectMissing"), "gs://b/k", "the requester pays", "set GOOGLE_CLOUD_QUOTA"),
    provoked(google_file("{"), "--gcs-credential-file", "is missing, or is none", "correct it"),
    provoked(
        in_environment(no_credentials_of_google),
        "GCS",
        "has no Google credentials",
        "give it some",
    ),
    provoked(
        in_environment(no_credentials_of_google, **{FILE_VARIABLE: "/nowhere"}),
        FILE_VARIABLE,
        "is missing, or is none",
        "correct it",
    ),
    said(
        "GCS: gs:// sources",
        " need google-auth and requests (No module named 'google.auth'); ",
        "install penstock[gcs] where penstockd runs, or set --gcs-anonymous 1 for public buckets",
    ),
    said(
        "GCS: google-auth gets no token for penstockd",
        " from a service account's key (invalid_grant); ",
        "check what GOOGLE_APPLICATION_CREDENTIALS names, and the rights of that account",
    ),
    # ---- Azure
    provoked(lambda: parse_azure("az://C/k"), "az://C/k", "is not of the form az://", "write it so"),
    provoked(
        lambda: parse_azure("abfss://c@account.dfs.example.com/k"),
        "abfss://c@account",
        "is not of the form abfss://",
        "write it so",
    ),
    provoked(
        flags("--azure-account", "A!"), "--azure-account", "is no name of a storage account", "write one"
    ),
    provoked(flags("--azure-endpoint-suffix", "/"), "--azure-endpoint-suffix", "is no domain", "write one"),
    provoked(
        lambda: configured(AzureSettings(), {"AZURE_STORAGE_CONNECTION_STRING": "AccountKey=x"}),
        "AZURE_STORAGE_CONNECTION_STRING",
        "has neither AccountName nor a BlobEndpoint",
        "write it as the portal shows it",
    ),
    provoked(lambda: SharedKey("a", "?"), "the account key", "is no Base64", "copy it again"),
    provoked(
        lambda: AzureAccount(AzureSettings(anonymous=True), 1.0).sign(
            Ask("GET", parse_azure("az://c/k"), {})
        ),
        "az://c/k",
        "is in no account",
        "set AZURE_STORAGE_ACCOUNT_NAME",
    ),
    provoked(
        lambda: AzureAccount(AzureSettings(), 1.0).state(parse_azure("az://c/k"), {"etag": 'W/"x"'}, 1),
        "az://c/k",
        "gives it no strong ETag",
        "use a store that does",
    ),
    provoked(
        from_azure(403, "AuthenticationFailed"), "az://c/k", "HTTP 403 AuthenticationFailed", "check its key"
    ),
    provoked(from_azure(403), "az://c/k", "HTTP 403", "give penstockd's identity the role"),
    provoked(from_azure(403, listing=True), "az://c/k", "HTTP 403", "name the files"),
    provoked(from_azure(409, "BlobArchived"), "az://c/k", "it is archived", "move it to another tier"),
    provoked(no_credentials_of_azure, "Azure", "has no Azure credentials", "give it some"),
    provoked(
        in_environment(no_credentials_of_azure, AZURE_CLIENT_SECRET="x"),
        "Azure: a client's secret or certificate",
        "cannot be used",
        "check AZURE_CLIENT_ID",
    ),
    said(
        "Azure: tokens",
        " need azure-identity (No module named 'azure'); ",
        "install penstock[azure] where penstockd runs, or give it an account key, a SAS or a connection "
        "string, or set --azure-anonymous 1",
    ),
    said(
        "Azure: azure-identity gets no token for penstockd",
        " from workload identity (AADSTS700016); ",
        "check AZURE_CLIENT_ID, AZURE_TENANT_ID and AZURE_FEDERATED_TOKEN_FILE",
    ),
]
