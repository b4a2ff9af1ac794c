"""The meaning of Azure's error answers. Pure."""

from __future__ import annotations

import re
from dataclasses import replace

from ...errors import PenstockError
from ..objects import meaning
from ..objects.faults import Transient, retry_after
from ..objects.meaning import Said, Words, first, plain_id
from ..objects.service import Answer
from .location import Location

_ROLE = "role Storage Blob Data Reader"
_UNKNOWN = (
    "AuthenticationFailed",
    "InvalidAuthenticationInfo",
    "NoAuthenticationInformation",
    "PublicAccessNotPermitted",
    "ResourceNotFound",
)
"""The store does not know who asks, or requires a login. It sends the last one also for private
containers."""
_SAS = "the SAS of penstockd does not allow it; make one that allows to read and to list blobs"
_WORDS = Words(
    store="Azure",
    throttled=frozenset({"ServerBusy", "TooManyRequests", "IngressLimitExceeded", "EgressLimitExceeded"}),
    remedies={
        "AuthorizationSourceIPMismatch": "the SAS of penstockd is for other addresses; make one for it",
        "AuthorizationProtocolMismatch": _SAS,
        "AuthorizationServiceMismatch": _SAS,
        "KeyBasedAuthenticationNotPermitted": "the account forbids account keys and the SAS made with them; "
        f"give penstockd an identity with the {_ROLE}",
        "AccountIsDisabled": "the account is disabled; check its subscription",
        "BlobArchived": "it is archived; move it to another tier first",
    },
    may_not_read=f"give penstockd's identity the {_ROLE} for the container, or a SAS that allows to read",
    may_not_list=f"give penstockd's identity the {_ROLE} for the container, or a SAS that allows to list, or "
    "name the files or their index",
    missing={
        "ContainerNotFound": "the container",
        "ContainerBeingDeleted": "the container",
        "ContainerDisabled": "the container",
    },
    container="container",
)
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9._-]{1,100})\s*</Code>")
_PLAIN_CODE = re.compile(r"[A-Za-z0-9._-]{1,100}")


def said(answer: Answer) -> Said:
    code = answer.headers.get("x-ms-error-code", "")
    return Said(
        status=answer.status,
        code=code if _PLAIN_CODE.fullmatch(code) else first(_CODE, answer.body.decode("utf-8", "replace")),
        request_id=plain_id(answer.headers.get("x-ms-request-id", "")),
        retry_after_seconds=retry_after(answer.headers.get("retry-after", "")),
    )


def failure(answer: Said, location: Location, *, listing: bool, unknown: str) -> PenstockError | Transient:
    """The meaning of an error answer to a GET or HEAD, or to a request for a list. `unknown` is the remedy if
    the store does not know who asks."""
    remedies = {
        **_WORDS.remedies,
        **dict.fromkeys(_UNKNOWN, unknown),
        "AuthorizationFailure": f"{unknown}; if that is right, allow this node in the account's firewall",
    }
    words = replace(_WORDS, remedies=remedies)
    return meaning.failure(answer, location, words, container=location.container, listing=listing)
