"""What Azure's answers mean, and what is told of them."""

from __future__ import annotations

import pytest

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from penstock.server.sources import ListingDeniedError
from penstock.server.sources.azure import answers
from penstock.server.sources.azure.location import Location
from penstock.server.sources.objects.faults import Transient
from penstock.server.sources.objects.service import Answer

LOCATION = Location("c", "k")


def failure(
    status: int, code: str = "", *, by_header: bool = True, listing: bool = False
) -> PenstockError | Transient:
    headers = {"x-ms-request-id": "ID1", "retry-after": "7"}
    if by_header:
        headers["x-ms-error-code"] = code
    body = f"<Error><Code>{code}</Code><AuthenticationErrorDetail>secret</AuthenticationErrorDetail></Error>"
    answer = Answer(status, headers, body.encode())
    return answers.failure(answers.said(answer), LOCATION, listing=listing, unknown="check the key")


@pytest.mark.parametrize("by_header", [True, False])
@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (429, "TooManyRequests", "throttled"),
        (503, "ServerBusy", "throttled"),
        (500, "OperationTimedOut", "server_error"),
        (500, "InternalError", "server_error"),
        (408, "", "timeout"),
    ],
)
def test_what_may_pass_is_asked_again_when_the_answer_says(
    status: int, code: str, reason: str, by_header: bool
) -> None:
    fault = failure(status, code, by_header=by_header)
    assert isinstance(fault, Transient)
    assert (fault.reason, fault.retry_after_seconds) == (reason, 7.0)


@pytest.mark.parametrize("by_header", [True, False])
@pytest.mark.parametrize(
    ("status", "code", "kind", "remedy"),
    [
        (401, "NoAuthenticationInformation", AccessDeniedError, "check the key"),
        (401, "InvalidAuthenticationInfo", AccessDeniedError, "check the key"),
        (403, "AuthenticationFailed", AccessDeniedError, "check the key"),
        (403, "AuthorizationFailure", AccessDeniedError, "account's firewall"),
        (403, "AuthorizationPermissionMismatch", AccessDeniedError, "Storage Blob Data Reader"),
        (403, "KeyBasedAuthenticationNotPermitted", AccessDeniedError, "give penstockd an identity"),
        (409, "PublicAccessNotPermitted", AccessDeniedError, "check the key"),
        (409, "BlobArchived", AccessDeniedError, "move it to another tier"),
        (404, "BlobNotFound", CheckpointNotFoundError, "it does not exist"),
        (404, "ContainerNotFound", CheckpointNotFoundError, "the container does not exist"),
        (409, "ContainerBeingDeleted", CheckpointNotFoundError, "the container does not exist"),
        (412, "ConditionNotMet", CheckpointChangedError, "load it again"),
        (416, "InvalidRange", CheckpointChangedError, "load it again"),
        (400, "InvalidHeaderValue", SourceUnavailableError, "check the endpoint"),
    ],
)
def test_what_is_final_names_the_blob_the_code_and_a_remedy(
    status: int, code: str, kind: type[PenstockError], remedy: str, by_header: bool
) -> None:
    error = failure(status, code, by_header=by_header)
    assert type(error) is kind
    for part in ("az://c/k", f"HTTP {status} {code}", "request id ID1", remedy):
        assert part in str(error)
    assert "secret" not in str(error)


@pytest.mark.parametrize("code", ["AuthorizationPermissionMismatch", "AuthorizationResourceTypeMismatch"])
def test_a_list_that_is_denied_leaves_blobs_that_may_be_readable(code: str) -> None:
    assert type(failure(403, code, listing=True)) is ListingDeniedError


def test_a_container_that_is_missing_is_in_the_details() -> None:
    error = failure(404, "ContainerNotFound", listing=True)
    assert isinstance(error, CheckpointNotFoundError)
    assert error.details["container"] == "c"
