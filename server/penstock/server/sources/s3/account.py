"""boto3's part: credentials, endpoints, regions, signatures and lists. Imported when first needed, since
it takes longer than everything else the daemon does at its start.

Requests for bytes are signed in their headers, each anew from the live credentials. A presigned URL costs
twice as much to make (benchmarks/s3_signing.py), and is a secret that servers and proxies write to their
logs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ...errors import (
    AccessDeniedError,
    InvalidRequestError,
    PenstockError,
    SourceUnavailableError,
)
from .faults import Answer, Transient
from .location import Location
from .settings import S3Settings

RENEW_SECONDS = 10.0

# At the level `debug` these log signatures and session tokens.
for _name in ("botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list."""

    names: list[str]
    next: str
    """What asks for the page after it; empty after the last."""


class Account:
    """One botocore session. Methods block, since credentials may come from a network."""

    def __init__(self, settings: S3Settings) -> None:
        """Raises SourceUnavailableError."""
        self._settings = settings
        self._lock = threading.Lock()
        self._clients: dict[tuple[str | None, bool], Any] = {}
        self._regions: dict[str, str] = {}
        """Of buckets that turned out to be elsewhere."""
        with _botocore_errors("S3"):
            self._start_session()
            self.tls = self._tls_context()
            self._client(None, signed=False)

    def url(self, location: Location) -> str:
        """Of the object, by botocore's rules for endpoints and addressing; nothing secret in it."""
        parameters = {"Bucket": location.bucket, "Key": location.key}
        if location.version_id is not None:
            parameters["VersionId"] = location.version_id
        with _botocore_errors(location.uri):
            client = self._client(self._regions.get(location.bucket), signed=False)
            url: str = client.generate_presigned_url("get_object", Params=parameters)
        return url

    def sign(self, method: str, url: str, headers: Mapping[str, str], location: Location) -> dict[str, str]:
        """The headers with what S3 wants to see of who asks."""
        headers = dict(headers)
        if self._settings.requester_pays:
            headers["x-amz-request-payer"] = "requester"
        if self._settings.unsigned:
            return headers
        with _botocore_errors(location.uri):
            from botocore.auth import S3SigV4Auth
            from botocore.awsrequest import AWSRequest

            request = AWSRequest(method=method, url=url, headers=headers)
            frozen = self._credentials(location)
            S3SigV4Auth(frozen, "s3", self.region(location.bucket)).add_auth(request)
            return dict(request.headers.items())

    def region(self, bucket: str) -> str:
        """Where it is taken to be."""
        region = self._regions.get(bucket)
        if region is None:
            region = self._client(None, signed=False).meta.region_name
        return "us-east-1" if region in (None, "aws-global") else region

    def move(self, bucket: str, region: str) -> None:
        """Remembers where a bucket turned out to be."""
        self._regions[bucket] = region

    def identity(self, location: Location) -> tuple[str, str]:
        """Who signs now: an access key and a session token, to be compared and told to nobody."""
        if self._settings.unsigned:
            return "", ""
        with _botocore_errors(location.uri):
            frozen = self._credentials(location)
            return frozen.access_key, frozen.token or ""

    def renewed(self, location: Location, identity: tuple[str, str]) -> bool:
        """There are other credentials than those. What botocore can renew, it renews by itself; but somebody
        else may have written new ones to a file."""
        with _botocore_errors(location.uri), self._lock:
            if time.monotonic() - self._began >= RENEW_SECONDS:
                self._start_session()
        return self.identity(location) != identity

    def list_page(self, directory: Location, token: str) -> Page | Answer:
        """Names directly below a key that ends in `/` or is empty, from where the page before said. Asked
        once. Raises Transient too."""
        parameters = {"Bucket": directory.bucket, "Prefix": directory.key, "Delimiter": "/"}
        if token:
            parameters["ContinuationToken"] = token
        if self._settings.requester_pays:
            parameters["RequestPayer"] = "requester"
        with _botocore_errors(directory.uri):
            region = self._regions.get(directory.bucket)
            client = self._client(region, signed=not self._settings.unsigned)
            from botocore.exceptions import ClientError

            try:
                page = client.list_objects_v2(**parameters)
            except ClientError as error:
                return _answer(error.response)
            except Exception as error:
                raise (_transient(error) or error) from error
        return _page(page, directory, token)

    # ---- inside ---------------------------------------------------------------------------------

    def _credentials(self, location: Location) -> Any:
        credentials = self._session.get_credentials()
        if credentials is None:
            raise _no_credentials(location.uri)
        return credentials.get_frozen_credentials()

    def _start_session(self) -> None:
        import boto3
        import botocore.session

        self._session = botocore.session.Session()
        # Once: a second one of the same session would add its methods to every client once more.
        self._boto3 = boto3.Session(botocore_session=self._session)
        if self._session.get_config_variable("region") is None and os.environ.get("AWS_REGION"):
            # Which every other SDK of AWS reads, and Kubernetes' service accounts set.
            self._session.set_config_variable("region", os.environ["AWS_REGION"])
        self._began = time.monotonic()
        self._clients.clear()

    def _client(self, region: str | None, *, signed: bool) -> Any:
        with self._lock:
            client = self._clients.get((region, signed))
            if client is None:
                client = self._make_client(region, signed=signed)
                self._clients[region, signed] = client
            return client

    def _make_client(self, region: str | None, *, signed: bool) -> Any:
        import botocore
        from botocore.config import Config

        settings = self._settings
        options: dict[str, Any] = {
            "connect_timeout": settings.timeout_seconds,
            "read_timeout": settings.timeout_seconds,
            "retries": {"mode": "standard", "total_max_attempts": 1},  # `Requests` has its own
        }
        if settings.addressing != "auto":
            options["s3"] = {"addressing_style": settings.addressing}
        if not signed:
            options["signature_version"] = botocore.UNSIGNED
        return self._boto3.client("s3", region_name=region, config=Config(**options))

    def _tls_context(self) -> ssl.SSLContext:
        """As botocore verifies: by AWS_CA_BUNDLE or the profile's ca_bundle, else by the bundle it brings."""
        from botocore.httpsession import get_cert_path

        path = self._session.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        try:
            if path and os.path.isdir(path):
                context = ssl.create_default_context(capath=path)
            else:
                context = ssl.create_default_context(cafile=path or get_cert_path(True))
        except (OSError, ssl.SSLError) as error:
            raise SourceUnavailableError(
                f"S3: the CA bundle {path} cannot be used: {error}; check AWS_CA_BUNDLE"
            ) from error
        context.set_alpn_protocols(["http/1.1"])
        return context


@contextlib.contextmanager
def _botocore_errors(what: str) -> Iterator[None]:
    """Turns what botocore raises into what clients are told."""
    try:
        yield
    except (PenstockError, Transient):
        raise
    except Exception as error:
        _raise_told(error, what)


def _answer(response: Mapping[str, Any]) -> Answer:
    """What botocore read out of an error, as S3 wrote it."""
    meta, error = response.get("ResponseMetadata", {}), response.get("Error", {})
    said = {"Region": error.get("Region"), "RequestId": meta.get("RequestId")}
    if not str(error.get("Code", "")).isdecimal():  # else it is botocore's, where the answer has none
        said["Code"] = error.get("Code")
    body = "".join(f"<{name}>{value}</{name}>" for name, value in said.items() if value)
    return Answer(meta.get("HTTPStatusCode", 0), meta.get("HTTPHeaders", {}), body.encode())


def _page(page: Mapping[str, Any], directory: Location, token: str) -> Page:
    """Raises Transient for what is no list: botocore takes any XML, and an empty body, for an empty one."""
    if page.get("Name") is None or page.get("IsTruncated") is None:
        raise Transient("bad_response", "HTTP 200 and not the list that was asked for")
    following = page.get("NextContinuationToken", "") if page["IsTruncated"] else ""
    if page["IsTruncated"] and following in ("", token):
        raise Transient("bad_response", "the list does not say where it goes on")
    return Page([entry["Key"][len(directory.key) :] for entry in page.get("Contents", ())], following)


def _transient(error: Exception) -> Transient | None:
    """What the network or a server that is no S3 did to a list. Without texts that a server could have put
    there."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    about: dict[str, Any] = getattr(error, "kwargs", {})
    asked = about.get("proxy_url") or about.get("endpoint_url")  # without a password of the proxy's
    where = str(asked or "the endpoint").partition("?")[0]
    # ssl's error and urllib3's for a certificate are a ValueError too; those for a broken handshake are not.
    causes = getattr(about.get("error"), "args", ())
    if isinstance(error, exceptions.SSLError) and any(isinstance(cause, ValueError) for cause in causes):
        return None
    if isinstance(error, exceptions.ConnectTimeoutError | exceptions.ReadTimeoutError):
        return Transient("timeout", f"no byte from {where} for the time that --s3-timeout allows")
    if isinstance(error, exceptions.ConnectionError | exceptions.HTTPClientError):
        return Transient("connection", f"the connection to {where} failed: {type(error).__name__}")
    if isinstance(error, ResponseParserError):
        return Transient("bad_response", "the answer is no list that can be read")
    return None


def _raise_told(error: Exception, what: str) -> NoReturn:
    if isinstance(error, ImportError):
        raise SourceUnavailableError(
            f"{what}: s3:// sources need boto3 ({error}); install penstock[server] where penstockd runs"
        ) from error
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError | exceptions.PartialCredentialsError):
        raise _no_credentials(what) from None
    if isinstance(error, exceptions.ParamValidationError):
        raise InvalidRequestError(
            f"sources: {what[:200]!r} cannot be asked of S3: it is no bucket or key"
        ) from None
    remedy = ""
    if isinstance(error, exceptions.SSLError):
        remedy = "; if the certificate's authority is private, name its bundle in AWS_CA_BUNDLE"
    # botocore's texts name files, profiles, providers and endpoints, and no secret.
    raise SourceUnavailableError(f"{what}: {type(error).__name__}: {str(error)[:500]}{remedy}") from None


def _no_credentials(what: str) -> AccessDeniedError:
    return AccessDeniedError(
        f"{what}: penstockd has no AWS credentials; give it some in any way that boto3 knows, or set "
        "--s3-unsigned 1 for public buckets"
    )
