"""boto3's part: credentials, endpoints, regions, signatures, and what lists say. Imported when first needed,
since it takes longer than everything else the daemon does at its start.

Requests for bytes are signed in their headers, each anew from the live credentials. A presigned URL costs
twice as much to make (benchmarks/s3_signing.py), and is a secret that servers and proxies write to their
logs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ...errors import (
    InvalidRequestError,
    PenstockError,
    SourceUnavailableError,
)
from .credentials import credentials_failure, no_credentials
from .faults import Transient
from .location import Location
from .settings import S3Settings

RENEW_SECONDS = 10.0
_USER = re.compile(r"//\S*@")
"""In a URL, or in what should be one."""

# At the level `debug` these log signatures and session tokens.
for _name in ("botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# Warns, with a traceback, of what is told to the load: an answer of STS may quote what was signed.
logging.getLogger("botocore.credentials").setLevel(logging.ERROR)


class Account:
    """One botocore session. Methods block, since credentials may come from a network."""

    def __init__(self, settings: S3Settings) -> None:
        """Raises SourceUnavailableError."""
        self._settings = settings
        self._lock = threading.Lock()
        self._clients: dict[str | None, Any] = {}
        self._regions: dict[str, str] = {}
        """Of buckets that turned out to be elsewhere."""
        with _botocore_errors("S3"):
            self._start_session()
            self.tls = self._tls_context()
            self._client(None)

    def url(self, location: Location) -> str:
        """Of the object, by botocore's rules for endpoints and addressing."""
        parameters = {"Bucket": location.bucket, "Key": location.key}
        if location.version_id is not None:
            parameters["VersionId"] = location.version_id
        return self._url("get_object", parameters, location)

    def list_url(self, directory: Location, token: str) -> str:
        """Of the page `token`, or the first one, of what lies directly below a key that ends in `/` or is
        empty."""
        parameters = {"Bucket": directory.bucket, "Prefix": directory.key, "Delimiter": "/"}
        if token:
            parameters["ContinuationToken"] = token
        return self._url("list_objects_v2", parameters, directory)

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
            region = self._client(None).meta.region_name
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

    def parse_list(self, body: bytes) -> Mapping[str, Any]:
        """What an answer to a request for a list says, keys still encoded. Raises Transient."""
        from botocore.parsers import ResponseParserError, create_parser

        model = self._client(None).meta.service_model.operation_model("ListObjectsV2")
        answer = {"status_code": 200, "headers": {}, "body": body}
        try:
            parsed: Mapping[str, Any] = create_parser("rest-xml").parse(answer, model.output_shape)
        except (ResponseParserError, TypeError, ValueError) as error:  # the latter for odd dates and numbers
            raise Transient("bad_response", "the answer is no list that can be read") from error
        return parsed

    # ---- inside ---------------------------------------------------------------------------------

    def _url(self, operation: str, parameters: Mapping[str, str], location: Location) -> str:
        with _botocore_errors(location.uri):
            client = self._client(self._regions.get(location.bucket))
            # Without a signature, as the client has none.
            url: str = client.generate_presigned_url(operation, Params=parameters)
        return url

    def _credentials(self, location: Location) -> Any:
        credentials = self._session.get_credentials()
        if credentials is None:
            raise no_credentials(location.uri)
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

    def _client(self, region: str | None) -> Any:
        """It knows endpoints and shapes, and sends nothing."""
        with self._lock:
            client = self._clients.get(region)
            if client is None:
                client = self._make_client(region)
                self._clients[region] = client
            return client

    def _make_client(self, region: str | None) -> Any:
        import botocore
        from botocore.config import Config

        options: dict[str, Any] = {"signature_version": botocore.UNSIGNED}
        if self._settings.addressing != "auto":
            options["s3"] = {"addressing_style": self._settings.addressing}
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


def _raise_told(error: Exception, what: str) -> NoReturn:
    if isinstance(error, ImportError):
        raise SourceUnavailableError(
            f"{what}: s3:// sources need boto3 ({error}); install penstock[server] where penstockd runs"
        ) from error
    from botocore import exceptions

    if isinstance(error, exceptions.NoCredentialsError):
        raise no_credentials(what) from None
    if isinstance(error, exceptions.ParamValidationError):
        raise InvalidRequestError(
            f"sources: {what[:200]!r} cannot be asked of S3: it is no bucket or key; correct it"
        ) from None
    failure = credentials_failure(error, what)
    if failure is not None:
        raise failure from None
    remedy = "check penstockd's AWS configuration"
    if isinstance(error, exceptions.SSLError):
        remedy = "if the certificate's authority is private, name its bundle in AWS_CA_BUNDLE"
    # botocore's texts name files, profiles, providers and endpoints, whose URLs may hold a password.
    text = _USER.sub("//", str(error))[:500]
    raise SourceUnavailableError(f"{what}: {type(error).__name__}: {text}; {remedy}") from None
