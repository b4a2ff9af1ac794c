"""boto3's part: credentials, endpoints, regions, signatures, and the parsing of lists. Imported when first
needed, since the import takes longer than everything else at the daemon's start.

Requests for bytes are signed in their headers, with the present credentials. A presigned URL takes twice as
long to make (benchmarks/s3_signing.py). It is also a secret that servers and proxies write to their logs. The
signature covers the object and not the range, as that of a presigned URL: so it serves for all blocks that
are read within a minute. S3 accepts it for 15.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import ssl
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote_plus

from ...errors import InvalidRequestError, PenstockError, SourceUnavailableError
from ..objects.exchange import MAX_ERROR_BODY_BYTES
from ..objects.faults import Transient
from ..objects.markup import is_costly
from ..objects.meaning import settled
from ..objects.memo import Memo
from ..objects.service import Answer, Ask, Entry, ObjectState, Page, Signed
from ..replies import StoreUnreachableError
from .answers import EXPIRED, Said, failure, whole_checksums
from .credentials import credentials_failure, no_credentials
from .location import Location
from .settings import S3Settings

RENEW_SECONDS = 10.0
MAX_REGIONS, MAX_BUCKETS = 64, 10_000
"""Most regions that have a client, and buckets of which the region is remembered: a store could name any."""
MAX_RENEWALS = 2
"""How often one request may get new credentials: a store may call all of them expired."""
REMEMBERED_BYTES = 4 << 20
"""Of the URLs of objects that are remembered, with what they are remembered by."""
_ENTRY_BYTES = 500
"""What one takes besides its texts."""
_SIGNED_SECONDS = 60
_SIGNATURE_BYTES = 3000
"""What the headers of a signature take, besides the token and the URL."""
_USER = re.compile(r"//\S*@")
"""The user and password in a URL, or in a text that should be one."""

# At the level `debug` these loggers write signatures and session tokens.
for _name in ("botocore", "urllib3"):
    logging.getLogger(_name).setLevel(logging.WARNING)
# Logs errors that the load reports anyway, with a traceback; an answer of STS may quote what was signed.
logging.getLogger("botocore.credentials").setLevel(logging.ERROR)


class Account:
    """One botocore session. Methods block, since credentials may come over a network."""

    def __init__(self, settings: S3Settings) -> None:
        """Raises SourceUnavailableError."""
        self._settings = settings
        self._lock = threading.Lock()
        self._clients: dict[str | None, Any] = {}
        self._urls = _urls()
        """The URLs of the last objects that were asked for, by region and location: botocore takes longer to
        find one than to sign it."""
        self._signatures = _signatures()
        """The headers that authenticate the last requests, by all that they cover."""
        self._regions: dict[str, str] = {}
        """The regions of buckets that turned out to be in another region."""
        with _botocore_errors("S3"):
            self._start_session()
            self.tls = self._tls_context()
            self._client(None)

    # ---- what the engine asks --------------------------------------------------------------------

    def sign(self, ask: Ask[Location]) -> Signed:
        """The URL, by botocore's rules for endpoints and addressing, and the headers that authenticate the
        daemon."""
        location = ask.location
        url = self._list_url(ask) if ask.is_list else self._object_url(location)
        # Amazon's own headers must be signed (Signature Version 4), and the others need not be.
        headers = {name: value for name, value in ask.headers.items() if not _is_amazons(name)}
        amazons = {name: value for name, value in ask.headers.items() if _is_amazons(name)}
        if self._settings.requester_pays:
            amazons["x-amz-request-payer"] = "requester"
        region = self._region(location.bucket)
        if self._settings.unsigned:
            return Signed(url, headers | amazons, (region, "", ""))
        with _botocore_errors(location.uri):
            frozen = self._credentials(location)
            covered = _Covered(
                ask.method, url, tuple(amazons.items()), region, frozen, int(time.time()) // _SIGNED_SECONDS
            )
            signed = (
                _signature(covered)
                if ask.is_list
                else self._signatures.get(covered, lambda: (_signature(covered), math.inf))
            )
            return Signed(url, headers | signed, (region, *_identity(frozen)))

    def changed(self, ask: Ask[Location], answer: Answer, tried: Sequence[Signed]) -> bool:
        """Whether to ask again: once in another region if the bucket turns out to be there, and once with new
        credentials if the old ones expired and were renewed meanwhile."""
        said = Said.of(answer)
        regions = {signed.identity[0] for signed in tried}
        identities = {signed.identity[1:] for signed in tried}
        if said.code in EXPIRED and not self._settings.unsigned and len(identities) <= MAX_RENEWALS:
            return self._renewed(ask.location, tried[-1])
        moved = answer.status in (301, 307, 400) and said.region not in ("", tried[-1].identity[0])
        if moved and len(regions) == 1:
            if len(self._regions) >= MAX_BUCKETS:
                self._regions.clear()
            self._regions[ask.location.bucket] = said.region
            return True
        return False

    def failure(self, ask: Ask[Location], answer: Answer) -> PenstockError | Transient:
        return failure(Said.of(answer), ask.location, listing=ask.is_list)

    def state(self, location: Location, headers: Mapping[str, str], size_bytes: int) -> ObjectState:
        identity = {name: headers.get(name, "") for name in ("etag", "x-amz-version-id", "last-modified")}
        conditions = {}
        # A weak ETag never matches (RFC 9110).
        if identity["etag"] and not identity["etag"].startswith("W/"):
            conditions["If-Match"] = identity["etag"]
        elif identity["last-modified"]:
            conditions["If-Unmodified-Since"] = identity["last-modified"]
        elif location.version_id is None:
            raise SourceUnavailableError(
                f"{location.uri}: the store gives it neither a strong ETag nor a Last-Modified, so that a "
                "change while it is read could not be noticed; use a store that does",
                file=location.uri,
            )
        return ObjectState(
            size_bytes,
            identity,
            conditions,
            _bare(identity["etag"]),
            whole_checksums(headers),
            settled="If-Match" in conditions or settled(headers),
        )

    def page(self, ask: Ask[Location], headers: Mapping[str, str], body: bytes) -> Page:
        page = self._parse_list(body)
        if page.get("Name") is None or page.get("IsTruncated") is None:
            # The parser makes an empty list of any XML, and of an empty body. S3 may also report an error
            # after a 200.
            said = Said.of(Answer(500, headers, body[:MAX_ERROR_BODY_BYTES]))
            if said.code:
                raise failure(said, ask.location, listing=True)
            raise Transient("bad_response", "HTTP 200 and not the list that was asked for")
        following = page.get("NextContinuationToken", "") if page["IsTruncated"] else ""
        if page["IsTruncated"] and (following == "" or not isinstance(following, str)):
            raise Transient("bad_response", "the list does not say where it goes on")
        decode = unquote_plus if page.get("EncodingType") == "url" else str
        entries = [
            Entry(decode(str(entry.get("Key", ""))), entry.get("Size"), _bare(str(entry.get("ETag", ""))))
            for entry in page.get("Contents", ())
        ]
        return Page(entries, following)

    # ---- inside ---------------------------------------------------------------------------------

    def _object_url(self, location: Location) -> str:
        parameters = {"Bucket": location.bucket, "Key": location.key}
        if location.version_id is not None:
            parameters["VersionId"] = location.version_id
        region = self._regions.get(location.bucket)
        return self._urls.get(
            (region, location), lambda: (self._url("get_object", parameters, location), math.inf)
        )

    def _list_url(self, ask: Ask[Location]) -> str:
        """The URL of a page of the list below a key that ends in `/` or is empty."""
        parameters = {"Bucket": ask.location.bucket, "Prefix": ask.location.key}
        if not ask.deep:
            parameters["Delimiter"] = "/"
        if ask.page:
            parameters["ContinuationToken"] = ask.page
        return self._url("list_objects_v2", parameters, ask.location)

    def _region(self, bucket: str) -> str:
        """The region in which the bucket is assumed to be."""
        region = self._regions.get(bucket)
        if region is None:
            region = self._client(None).meta.region_name
        return "us-east-1" if region in (None, "aws-global") else region

    def _renewed(self, location: Location, signed: Signed) -> bool:
        """Whether there are other credentials than those that signed. botocore renews what it can by itself,
        but new ones may also have been written to a file."""
        with _botocore_errors(location.uri):
            with self._lock:
                if time.monotonic() - self._began >= RENEW_SECONDS:
                    self._start_session()
            now = _identity(self._credentials(location))
        return (self._region(location.bucket), *now) != signed.identity

    def _parse_list(self, body: bytes) -> Mapping[str, Any]:
        """Returns the list with keys still encoded. Raises Transient."""
        from botocore.parsers import ResponseParserError, create_parser

        if is_costly(body):
            raise Transient("bad_response", "the answer is no list that can be read")
        model = self._client(None).meta.service_model.operation_model("ListObjectsV2")
        answer = {"status_code": 200, "headers": {}, "body": body}
        try:
            parsed: Mapping[str, Any] = create_parser("rest-xml").parse(answer, model.output_shape)
        except (
            ResponseParserError,
            TypeError,
            ValueError,
        ) as error:  # the latter two for odd dates and numbers
            raise Transient("bad_response", "the answer is no list that can be read") from error
        return parsed

    def _url(self, operation: str, parameters: Mapping[str, str], location: Location) -> str:
        with _botocore_errors(location.uri):
            client = self._client(self._regions.get(location.bucket))
            # Without a signature, since the client has none.
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
        # Only once: a second data loader of the same session would add its methods to every client again.
        self._boto3 = boto3.Session(botocore_session=self._session)
        if self._session.get_config_variable("region") is None and os.environ.get("AWS_REGION"):
            # Every other SDK of AWS reads this variable, and Kubernetes' service accounts set it.
            self._session.set_config_variable("region", os.environ["AWS_REGION"])
        self._began = time.monotonic()
        self._clients.clear()
        self._urls = _urls()

    def _client(self, region: str | None) -> Any:
        """A client that knows endpoints and shapes, and sends nothing."""
        with self._lock:
            client = self._clients.get(region)
            if client is None:
                if len(self._clients) >= MAX_REGIONS:
                    self._clients.clear()
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
        """Verifies as botocore does: by AWS_CA_BUNDLE or the profile's ca_bundle, else by botocore's own
        bundle."""
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


def _urls() -> Memo[tuple[str | None, Location], str]:
    return Memo(REMEMBERED_BYTES, lambda url: _ENTRY_BYTES + 2 * len(url))


class _Covered(NamedTuple):
    """What a signature depends on."""

    method: str
    url: str
    headers: tuple[tuple[str, str], ...]
    region: str
    credentials: Any
    """botocore's frozen ones."""
    minute: int
    """Of the clock, as the time is signed too: also after the machine was suspended it is that of today."""


def _signature(covered: _Covered) -> dict[str, str]:
    """The signed headers, and those that say so."""
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest

    request = AWSRequest(method=covered.method, url=covered.url, headers=dict(covered.headers))
    S3SigV4Auth(covered.credentials, "s3", covered.region).add_auth(request)
    return dict(request.headers.items())


def _signatures() -> Memo[_Covered, dict[str, str]]:
    return Memo(
        REMEMBERED_BYTES, lambda signed: _SIGNATURE_BYTES + 4 * sum(len(value) for value in signed.values())
    )


def _is_amazons(header: str) -> bool:
    return header.lower().startswith("x-amz-")


def _bare(etag: str) -> str:
    """The ETag without quotes: lists of some stores leave out the quotes that headers have."""
    return etag.removeprefix("W/").strip('"')


def _identity(frozen: Any) -> tuple[str, str]:
    """An access key and a session token, for comparison only; they are never shown."""
    return frozen.access_key, frozen.token or ""


@contextlib.contextmanager
def _botocore_errors(what: str) -> Iterator[None]:
    """Turns botocore's errors into errors for clients."""
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
    # botocore's texts name files, profiles, providers and endpoints. URLs of these may hold a password.
    text = _USER.sub("//", str(error))[:500]
    failed = SourceUnavailableError(f"{what}: {type(error).__name__}: {text}; {remedy}")
    if isinstance(error, exceptions.HTTPClientError) and not isinstance(error, exceptions.SSLError):
        raise StoreUnreachableError(failed.message) from None  # who gives credentials cannot be asked
    raise failed from None
