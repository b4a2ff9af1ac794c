"""The meaning of S3's error answers, beside those that all stores share. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from ...errors import AccessDeniedError, CheckpointNotFoundError, PenstockError, SourceUnavailableError
from ..checksums import CRC32C, CRC64NVME, Checksum, crc_in_base64
from ..objects import meaning
from ..objects.faults import Transient, retry_after
from ..objects.meaning import Words, first, plain_id
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
_WORDS = Words(
    store="S3",
    throttled=_THROTTLED,
    remedies=_REMEDIES,
    may_not_read=_MAY_NOT_READ,
    may_not_list=_MAY_NOT_LIST,
    missing={"NoSuchBucket": "the bucket", "NoSuchVersion": "that version of it"},
    container="bucket",
)
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9._-]{1,100})\s*</Code>")
_REGION = re.compile(r"<Region>\s*([a-z0-9-]{1,40})\s*</Region>")
_REQUEST_ID = re.compile(r"<RequestId>\s*([A-Za-z0-9+/=_.:-]{1,100})\s*</RequestId>")
_PLAIN_REGION = re.compile(r"[a-z0-9-]{1,40}")


@dataclass(frozen=True, slots=True)
class Said(meaning.Said):
    """The contents of an error answer."""

    region: str
    """The region of the bucket, if the answer has it."""

    @classmethod
    def of(cls, answer: Answer) -> Said:
        headers, text = answer.headers, answer.body.decode("utf-8", "replace")
        ids = [plain_id(headers.get(name, "")) for name in ("x-amz-request-id", "x-amz-id-2")]
        region = headers.get("x-amz-bucket-region", "")
        return cls(
            status=answer.status,
            code=first(_CODE, text),
            request_id="/".join(filter(None, ids)) or first(_REQUEST_ID, text),
            retry_after_seconds=retry_after(headers.get("retry-after", "")),
            region=region if _PLAIN_REGION.fullmatch(region) else first(_REGION, text),
        )


def failure(answer: Said, location: Location, *, listing: bool = False) -> PenstockError | Transient:
    """The meaning of an error answer to a GET or HEAD, or to a request for a list."""
    status, code, uri = answer.status, answer.code, location.uri
    meant = meaning.failure(answer, location, _WORDS, container=location.bucket, listing=listing)
    if isinstance(meant, Transient) or status in (412, 416):
        return meant
    if code in EXPIRED:
        remedy = "penstockd's credentials have expired and could not be renewed; refresh them"
        return AccessDeniedError(f"{uri}: S3 says {answer}; {remedy}", file=uri)
    if status == 405 and location.version_id is not None:
        return CheckpointNotFoundError(
            f"{uri}: S3 says {answer}: that version is a delete marker; name another", file=uri
        )
    if 300 <= status < 400 or code == "AuthorizationHeaderMalformed":
        remedy = (
            f"the bucket is elsewhere{' (' + answer.region + ')' if answer.region else ''}; set AWS_REGION"
        )
        return SourceUnavailableError(f"{uri}: S3 says {answer}; {remedy}", file=uri)
    return meant


def whole_checksums(headers: Mapping[str, str]) -> tuple[Checksum, ...]:
    """The checksums in an answer that are of the object's whole content.

    S3 says whether a checksum is of the full object or of its parts. If the answer does not say it, only a
    CRC64NVME counts, as S3 never computes one of parts. The value of a composite checksum ends in the number
    of its parts, but not every store writes that number.
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
