"""What the store's refusals mean, and what of them is told."""

from __future__ import annotations

import pytest

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from penstock.server.sources import Access
from penstock.server.sources.objects.service import Answer
from penstock.server.sources.s3 import answers
from penstock.server.sources.s3.location import Location

from ...objects import ObjectServer
from ...support import ROOT
from ..hooks import (
    CONTENT,
    Sources,
    always,
    once,
    read,
)


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "AccessDenied", AccessDeniedError, "s3:GetObject"),
        (403, "RequestTimeTooSkewed", AccessDeniedError, "clock"),
        (403, "SignatureDoesNotMatch", AccessDeniedError, "secret key"),
        (400, "ExpiredToken", AccessDeniedError, "expired"),
        (404, "NoSuchBucket", CheckpointNotFoundError, "the bucket does not exist"),
        (404, "NoSuchVersion", CheckpointNotFoundError, "that version"),
        (412, "PreconditionFailed", CheckpointChangedError, "changed"),
        (400, "InvalidRequest", SourceUnavailableError, "refuses"),
        (501, "NotImplemented", SourceUnavailableError, "refuses"),
        (302, "", SourceUnavailableError, "AWS_REGION"),
    ],
)
def test_what_would_be_the_same_again_fails_at_once(
    status: int,
    code: str,
    error: type[PenstockError],
    says: str,
    server: ObjectServer,
    sources: Sources,
    retried: list[str],
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks.append(once(lambda asked: asked.fail(status, code)))
    with pytest.raises(error, match=says) as caught:
        read(file, 10, 20)
    assert "s3://bucket/k" in caught.value.message
    assert not retried
    if status != 412:
        assert "REQ1" in caught.value.message


def test_a_head_that_is_refused_is_asked_again_for_a_reason(server: ObjectServer, sources: Sources) -> None:
    server.put("k", CONTENT)
    source = sources()
    source.open("s3://bucket/k", ROOT)
    server.hooks.append(always(lambda asked: asked.fail(403, "RequestTimeTooSkewed")))
    with pytest.raises(AccessDeniedError, match="clock"):
        source.open("s3://bucket/k", ROOT)


def test_what_is_not_allowed_is_not_asked_for(server: ObjectServer, sources: Sources) -> None:
    access = Access(uid=1000, privileged=False, prefixes=("s3://bucket/models",))
    source = sources()
    for uri in ("s3://bucket/other/x.safetensors", "s3://bucket/models/../x.safetensors"):
        with pytest.raises(AccessDeniedError, match="uid 1000"):
            source.open(uri, access)
        with pytest.raises(AccessDeniedError, match="uid 1000"):
            source.list(uri, access)
    assert not server.asked


def test_a_version_that_is_a_delete_marker_is_named_and_nothing_else_is_taken_for_one() -> None:
    answer = Answer(405, {}, b"<Error><Code>MethodNotAllowed</Code></Error>")
    marker = answers.failure(answers.Said.of(answer), Location("bucket", "k", "v1"))
    assert isinstance(marker, CheckpointNotFoundError)
    assert "delete marker" in str(marker)
    for listing in (False, True):
        refused = answers.failure(answers.Said.of(answer), Location("bucket", "k"), listing=listing)
        assert isinstance(refused, SourceUnavailableError)
        assert "delete marker" not in str(refused)
        assert "MethodNotAllowed" in str(refused)


def test_nothing_of_an_error_page_is_told_but_code_region_and_request_id() -> None:
    body = b"<Error><Code>Odd\nCode</Code><StringToSign>SECRET</StringToSign></Error>"
    answer = Answer(400, {"x-amz-request-id": "bad id\n"}, body)
    assert str(answers.Said.of(answer)) == "HTTP 400 (request id not given)"
