"""What S3's error answers mean: what is asked again, and what is final. Pure.

transient  throttled, timeout, server_error
final      403, 404, 412 and every other answer that would be the same again
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ...errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from .. import ListingDeniedError
from ..checksums import CRC32C, CRC64NVME, Checksum, crc_in_base64
from ..objects.faults import Transient, retry_after
from ..objects.service import Answer
from .location import Location

_THROTTLED = frozenset(
    {
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestThrottled",
        "RequestThrottledException",
        "RequestLimitExceeded",
        "TooManyRequests",
        "TooManyRequestsException",
        "BandwidthLimitExceeded",
        "ProvisionedThroughputExceededException",
        "EC2ThrottledException",
    }
)
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired"})
_MAY_NOT_READ = (
    "give penstockd's credentials s3:GetObject for it (and s3:ListBucket for the bucket: without that a "
    "missing key looks like this too)"
)
_MAY_NOT_LIST = (
    "give penstockd's credentials s3:ListBucket for the bucket (and s3:GetObject for what lies in it), or "
    "name the files or their index"
)
_REMEDIES = {
    "AllAccessDisabled": "the bucket's owner has disabled all access to it",
    "InvalidAccessKeyId": "S3 does not know penstockd's access key; check its credentials and its endpoint",
    "SignatureDoesNotMatch": "check penstockd's secret key, and that no proxy changes requests",
    "InvalidToken": "penstockd's session token is not valid; refresh its credentials",
    "RequestTimeTooSkewed": "this node's clock is wrong; set it (NTP)",
    "InvalidObjectState": "it is archived; restore it first",
    "KMS.DisabledException": "the key that encrypts it is disabled",
}
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9._-]{1,100})\s*</Code>")
_REGION = re.compile(r"<Region>\s*([a-z0-9-]{1,40})\s*</Region>")
_REQUEST_ID = re.compile(r"<RequestId>\s*([A-Za-z0-9+/=_.:-]{1,100})\s*</RequestId>")
_PLAIN_ID = re.compile(r"[A-Za-z0-9+/=_.:-]{1,200}")
_PLAIN_REGION = re.compile(r"[a-z0-9-]{1,40}")


class Said:
    """What an error answer says. Nothing else of it is kept, since bodies quote what was signed."""

    def __init__(self, answer: Answer) -> None:
        headers, text = answer.headers, answer.body.decode("utf-8", "replace")
        self.status = answer.status
        self.code = _first(_CODE, text)
        region = headers.get("x-amz-bucket-region", "")
        self.region = region if _PLAIN_REGION.fullmatch(region) else _first(_REGION, text)
        ids = [headers.get(name, "") for name in ("x-amz-request-id", "x-amz-id-2")]
        ids = [one for one in ids if _PLAIN_ID.fullmatch(one)]
        self.request_id = "/".join(ids) or _first(_REQUEST_ID, text)
        self.retry_after_seconds = retry_after(headers.get("retry-after", ""))

    def __str__(self) -> str:
        code = f" {self.code}" if self.code else ""
        return f"HTTP {self.status}{code} (request id {self.request_id or 'not given'})"


def failure(answer: Said, location: Location, *, listing: bool = False) -> PenstockError | Transient:
    """What an error answer to a GET or HEAD means, or to a request for a list."""
    status, code = answer.status, answer.code
    if status == 429 or code in _THROTTLED:
        return Transient("throttled", str(answer), retry_after_seconds=answer.retry_after_seconds)
    if status == 408 or code == "RequestTimeout":
        return Transient("timeout", str(answer), retry_after_seconds=answer.retry_after_seconds)
    if status >= 500 and status not in (501, 505):
        return Transient("server_error", str(answer), retry_after_seconds=answer.retry_after_seconds)
    said = f"{location.uri}: S3 says {answer}"
    if status in (412, 416) and not listing:
        return CheckpointChangedError(
            f"{location.uri} was changed while it was read: S3 says {answer}; load it again",
            file=location.uri,
        )
    if code in EXPIRED:
        remedy = "penstockd's credentials have expired and could not be renewed; refresh them"
        return AccessDeniedError(f"{said}; {remedy}", file=location.uri)
    if status in (401, 403) or code in _REMEDIES:
        if listing and code not in _REMEDIES:
            return ListingDeniedError(f"{said}; {_MAY_NOT_LIST}", file=location.uri)
        remedy = _REMEDIES.get(code, _MAY_NOT_READ)
        return AccessDeniedError(f"{said}; {remedy}", file=location.uri)
    if status == 404:
        what, details = "it", {"file": location.uri}
        if code == "NoSuchBucket":
            what, details["bucket"] = "the bucket", location.bucket
        elif code == "NoSuchVersion":
            what = "that version of it"
        return CheckpointNotFoundError(
            f"{said}: {what} does not exist; check the URI and the endpoint", **details
        )
    if status == 405 and location.version_id is not None:
        return CheckpointNotFoundError(
            f"{said}: that version is a delete marker; name another", file=location.uri
        )
    if 300 <= status < 400 or code == "AuthorizationHeaderMalformed":
        remedy = (
            f"the bucket is elsewhere{' (' + answer.region + ')' if answer.region else ''}; set AWS_REGION"
        )
        return SourceUnavailableError(f"{said}; {remedy}", file=location.uri)
    return SourceUnavailableError(
        f"{said}; S3 refuses the request, and would again; check the endpoint", file=location.uri
    )


def whole_checksums(headers: Mapping[str, str]) -> tuple[Checksum, ...]:
    """What an answer says of the object's whole content, and not of its parts.

    S3 says which it is. Without that only a CRC64NVME counts, which S3 never computes of parts. The value of
    a composite checksum ends in the number of its parts, but not every store says that number.
    """
    kind = headers.get("x-amz-checksum-type", "").strip().upper()
    found = []
    for algorithm in (CRC64NVME, CRC32C):
        value = headers.get(f"x-amz-checksum-{algorithm.lower()}", "").strip()
        counts = kind == "FULL_OBJECT" or (not kind and algorithm == CRC64NVME)
        checksum = crc_in_base64(algorithm, value) if counts and value else None
        if checksum is not None:
            found.append(checksum)
    return tuple(found)


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return match[1] if match else ""
