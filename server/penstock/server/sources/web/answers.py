"""The meaning of web servers' error answers: which requests are repeated, and which errors are final.
Pure."""

from __future__ import annotations

from ...errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from ..objects.faults import Transient, retry_after
from ..objects.reach import MAX_REDIRECTS, REDIRECTS
from ..objects.service import Answer

_THROTTLED = (429, 503)
_NO_ERROR_BUT_ONE_FOR_EVER = (501, 505)


def failure(answer: Answer, uri: str) -> PenstockError | Transient:
    """Errors show nothing of the body: it comes from the server and may hold anything."""
    status = answer.status
    said = f"HTTP {status}"
    wait = retry_after(answer.headers.get("retry-after", ""))
    if status in _THROTTLED:
        return Transient("throttled", said, retry_after_seconds=wait)
    if status == 408:
        return Transient("timeout", said, retry_after_seconds=wait)
    if status >= 500 and status not in _NO_ERROR_BUT_ONE_FOR_EVER:
        return Transient("server_error", said, retry_after_seconds=wait)
    said = f"{uri}: the server says {said}"
    if status == 401:
        return AccessDeniedError(
            f"{said}: it wants a login; put one for the host into penstockd's netrc file", file=uri
        )
    if status == 403:
        return AccessDeniedError(
            f"{said}: penstockd may not read it; check its login in the netrc file, and the server's rules",
            file=uri,
        )
    if status in (404, 410):
        return CheckpointNotFoundError(f"{said}: it does not exist; check the URL", file=uri)
    if status in (412, 416):
        return CheckpointChangedError(
            f"{uri} was changed while it was read: the server says HTTP {status}; load it again", file=uri
        )
    if status in REDIRECTS:
        return SourceUnavailableError(
            f"{said}: it leads on more than {MAX_REDIRECTS} times, or to no URL that can be asked for; name "
            "the URL that it ends at",
            file=uri,
        )
    return SourceUnavailableError(
        f"{said}: it refuses the request, and would again; check the URL and the server", file=uri
    )


def no_ranges(uri: str) -> SourceUnavailableError:
    """The error for a server that answers a request for a part with the whole file."""
    return SourceUnavailableError(
        f"{uri}: the server gives no parts of a file (it ignores Range), so that it cannot be read by "
        "several connections, nor go on where one broke off; use a server that does, such as nginx, or copy "
        "the file",
        file=uri,
    )


def no_version(uri: str) -> SourceUnavailableError:
    return SourceUnavailableError(
        f"{uri}: the server gives it neither a strong ETag nor a Last-Modified, so that a change while it is "
        "read could not be noticed; make the server send one of them",
        file=uri,
    )
