"""The meaning of error answers of the Hub and of its storage: which requests are repeated, and which errors
are final. Pure.

The Hub names what is missing in X-Error-Code. Errors show nothing else of an answer.
"""

from __future__ import annotations

import re

from ...errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from ..objects.faults import Transient, retry_after
from ..objects.service import Answer
from .location import Location, is_commit

LONGEST_WAIT_SECONDS = 300.0
"""The Hub counts requests in windows of five minutes, and reports how long the present one still lasts."""
_RATE_LIMIT = re.compile(r";\s*t\s*=\s*(\d{1,9})\b")
_CODE = re.compile(r"[A-Za-z]{1,60}")
_FOR_EVER = (501, 505)


def wait_seconds(answer: Answer) -> float:
    """The delay that an answer asks for, within bounds; 0 if it asks for none."""
    limit = _RATE_LIMIT.search(answer.headers.get("ratelimit", ""))
    if answer.status == 429 and limit is not None:
        return min(float(limit[1]), LONGEST_WAIT_SECONDS)
    return retry_after(answer.headers.get("retry-after", ""), longest_seconds=LONGEST_WAIT_SECONDS)


def failure(answer: Answer, location: Location, host: str, *, has_token: bool) -> PenstockError | Transient:
    """For answers of the Hub at `host`. `has_token`: the request had a token."""
    status, code = answer.status, answer.headers.get("x-error-code", "")
    code = code if _CODE.fullmatch(code) else ""
    passing = _passing(answer)
    if passing is not None:
        return passing
    uri = location.uri
    said = f"{uri}: {host} says HTTP {status}{' ' + code if code else ''}"
    if code == "GatedRepo":
        return AccessDeniedError(
            f"{said}: {location.repository} is gated; ask for access at {host}/{location.repository}, and "
            "give penstockd the token of the account that has it (HF_TOKEN)",
            file=uri,
        )
    if code == "RepoNotFound" or (status == 401 and not has_token):
        remedy = (
            "check the token's rights" if has_token else "give penstockd a token (HF_TOKEN) if it is private"
        )
        return CheckpointNotFoundError(
            f"{said}: there is no repository {location.repository}, or penstockd may not see it; check the "
            f"name, and {remedy}",
            file=uri,
            repository=location.repository,
        )
    was_there = location.content or not is_commit(location.wanted_revision)
    if code in ("RevisionNotFound", "EntryNotFound") and location.commit and was_there:
        return CheckpointChangedError(
            f"{said}: the commit {location.commit[:12]} has gone, as somebody has rewritten the history of "
            f"{location.repository}; load it again",
            file=uri,
        )
    if code == "RevisionNotFound":
        return CheckpointNotFoundError(
            f"{said}: {location.repository} has no revision {location.wanted_revision[:100]!r}; name a "
            "branch, a tag or a commit that it has",
            file=uri,
        )
    if status == 401:
        return AccessDeniedError(f"{said}: it does not accept penstockd's token; set HF_TOKEN anew", file=uri)
    if status == 403:
        return AccessDeniedError(
            f"{said}: penstockd may not read {location.repository}; check the rights of its token "
            "(HF_TOKEN), and whether the repository is disabled",
            file=uri,
        )
    if status == 404:
        return CheckpointNotFoundError(f"{said}: it does not exist; check the URI", file=uri)
    return SourceUnavailableError(
        f"{said}: it refuses the request, and would again; check HF_ENDPOINT", file=uri
    )


def storage_failure(answer: Answer, location: Location) -> PenstockError | Transient:
    """For answers of the storage to which the Hub redirects, when a new address did not help."""
    passing = _passing(answer)
    if passing is not None:
        return passing
    said = f"{location.uri}: the Hub's storage says HTTP {answer.status}"
    if answer.status in (412, 416):
        return CheckpointChangedError(
            f"{location.uri} was changed while it was read: the Hub's storage says HTTP {answer.status}; "
            "load it again",
            file=location.uri,
        )
    return SourceUnavailableError(
        f"{said} to the address that the Hub gave for it; check that no proxy changes requests, and the "
        "node's clock",
        file=location.uri,
    )


def other_content(location: Location) -> CheckpointChangedError:
    return CheckpointChangedError(
        f"{location.uri} was changed while it was read: the Hub has another content for it now than it "
        f"listed for the commit {location.commit[:12]}; load it again",
        file=location.uri,
    )


def no_such_file(location: Location) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"{location.uri}: {location.repository} has no such file at revision "
        f"{location.wanted_revision[:100]!r} (commit {location.commit[:12]}); check the path",
        file=location.uri,
    )


def not_cached(location: Location) -> CheckpointNotFoundError:
    return CheckpointNotFoundError(
        f"{location.uri} is not in the Hub's cache on this machine (HF_HUB_CACHE), and HF_HUB_OFFLINE keeps "
        "penstockd from asking the Hub; fetch it into the cache, or unset HF_HUB_OFFLINE",
        file=location.uri,
    )


def _passing(answer: Answer) -> Transient | None:
    status, wait = answer.status, wait_seconds(answer)
    if status == 429:
        return Transient("throttled", f"HTTP {status}", retry_after_seconds=wait)
    if status == 408:
        return Transient("timeout", f"HTTP {status}", retry_after_seconds=wait)
    if status >= 500 and status not in _FOR_EVER:
        return Transient("server_error", f"HTTP {status}", retry_after_seconds=wait)
    return None
