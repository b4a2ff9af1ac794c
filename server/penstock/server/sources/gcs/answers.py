"""The meaning of GCS's error answers. Its XML interface sends XML for objects, its JSON interface JSON for
lists. Pure."""

from __future__ import annotations

import re
from dataclasses import replace

from ...errors import PenstockError
from ..objects import meaning
from ..objects.faults import Transient, retry_after
from ..objects.meaning import Said, Words, first, plain_id
from ..objects.service import Answer
from .location import Location

_RIGHTS = "role Storage Object Viewer, or storage.objects.get"
_PAYS = "the requester pays for the bucket; set GOOGLE_CLOUD_QUOTA_PROJECT to a project that does"
_WORDS = Words(
    store="GCS",
    throttled=frozenset(
        {"SlowDown", "TooManyRequests", "rateLimitExceeded", "userRateLimitExceeded", "quotaExceeded"}
    ),
    remedies={
        "InvalidToken": "penstockd's token is not valid; check its credentials and this node's clock (NTP)",
        "UserProjectMissing": _PAYS,
        "required": _PAYS,
        "UserProjectAccessDenied": "give penstockd's account serviceusage.services.use for the project of "
        "GOOGLE_CLOUD_QUOTA_PROJECT",
        "SecurityPolicyViolated": "a perimeter of VPC Service Controls forbids it; allow penstockd's account "
        "and network in it",
        "vpcServiceControls": "a perimeter of VPC Service Controls forbids it; allow penstockd's account "
        "and network in it",
        "accountDisabled": "the project's account is disabled; check its billing",
        "AccountProblem": "the project's account has a problem; check its billing",
    },
    may_not_read=f"give penstockd's account the {_RIGHTS} (and storage.objects.list for the bucket: without "
    "that a missing key looks like this too)",
    may_not_list="give penstockd's account storage.objects.list for the bucket (role Storage Object Viewer), "
    "or name the files or their index",
    missing={"NoSuchBucket": "the bucket"},
    container="bucket",
)
_ANONYMOUS = "penstockd asks without credentials; give it some, or leave out --gcs-anonymous"
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9._-]{1,100})\s*</Code>")
_REASON = re.compile(r'"reason"\s*:\s*"([A-Za-z0-9._-]{1,100})"')


def said(answer: Answer) -> Said:
    text = answer.body.decode("utf-8", "replace")
    return Said(
        status=answer.status,
        code=first(_CODE, text) or first(_REASON, text),
        request_id=plain_id(answer.headers.get("x-guploader-uploadid", "")),
        retry_after_seconds=retry_after(answer.headers.get("retry-after", "")),
    )


def failure(answer: Said, location: Location, *, listing: bool, anonymous: bool) -> PenstockError | Transient:
    """The meaning of an error answer to a GET or HEAD, or to a request for a list."""
    words = _WORDS
    if anonymous:
        words = replace(
            words,
            remedies={},
            may_not_read=_ANONYMOUS,
            may_not_list=f"{_ANONYMOUS}, or name the files or their index",
        )
    if answer.status == 404 and listing:  # only the bucket can be missing
        answer = replace(answer, code="NoSuchBucket")
    return meaning.failure(answer, location, words, container=location.bucket, listing=listing)
