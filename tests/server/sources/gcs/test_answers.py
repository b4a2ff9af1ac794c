"""What GCS's answers mean, and what is told of them."""

from __future__ import annotations

import json

import pytest

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    SourceUnavailableError,
)
from penstock.server.sources import ListingDeniedError
from penstock.server.sources.gcs import answers
from penstock.server.sources.gcs.account import Account
from penstock.server.sources.gcs.location import Location
from penstock.server.sources.gcs.settings import GcsSettings
from penstock.server.sources.objects.faults import Transient
from penstock.server.sources.objects.service import Answer, Ask, Entry, Page

LOCATION = Location("bucket", "k")


def failure(
    status: int, code: str = "", *, body: bytes | None = None, listing: bool = False, anonymous: bool = False
) -> PenstockError | Transient:
    if body is None:
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Details>secret</Details></Error>".encode()
    answer = Answer(status, {"x-guploader-uploadid": "ID1", "retry-after": "7"}, body)
    return answers.failure(answers.said(answer), LOCATION, listing=listing, anonymous=anonymous)


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (429, "SlowDown", "throttled"),
        (503, "SlowDown", "throttled"),
        (403, "rateLimitExceeded", "throttled"),
        (408, "", "timeout"),
        (500, "InternalError", "server_error"),
        (502, "", "server_error"),
        (503, "ServiceUnavailable", "server_error"),
    ],
)
def test_what_may_pass_is_asked_again_when_the_answer_says(status: int, code: str, reason: str) -> None:
    fault = failure(status, code)
    assert isinstance(fault, Transient)
    assert (fault.reason, fault.retry_after_seconds) == (reason, 7.0)


@pytest.mark.parametrize(
    ("status", "code", "kind", "remedy"),
    [
        (401, "AuthenticationRequired", AccessDeniedError, "storage.objects.get"),
        (403, "AccessDenied", AccessDeniedError, "storage.objects.get"),
        (403, "UserProjectAccessDenied", AccessDeniedError, "serviceusage.services.use"),
        (400, "UserProjectMissing", AccessDeniedError, "GOOGLE_CLOUD_QUOTA_PROJECT"),
        (403, "SecurityPolicyViolated", AccessDeniedError, "VPC Service Controls"),
        (404, "NoSuchKey", CheckpointNotFoundError, "it does not exist"),
        (404, "NoSuchBucket", CheckpointNotFoundError, "the bucket does not exist"),
        (412, "PreconditionFailed", CheckpointChangedError, "load it again"),
        (416, "InvalidRange", CheckpointChangedError, "load it again"),
        (301, "", SourceUnavailableError, "check the endpoint"),
        (400, "InvalidArgument", SourceUnavailableError, "check the endpoint"),
        (501, "NotImplemented", SourceUnavailableError, "check the endpoint"),
    ],
)
def test_what_is_final_names_the_object_the_code_and_a_remedy(
    status: int, code: str, kind: type[PenstockError], remedy: str
) -> None:
    error = failure(status, code)
    assert type(error) is kind
    assert "gs://bucket/k" in str(error)
    assert f"HTTP {status}" in str(error)
    assert code in str(error)
    assert "request id ID1" in str(error)
    assert remedy in str(error)
    assert "secret" not in str(error)


def test_a_list_that_is_denied_leaves_objects_that_may_be_readable() -> None:
    body = json.dumps(
        {"error": {"code": 403, "errors": [{"reason": "forbidden", "message": "secret"}]}}
    ).encode()
    error = failure(403, body=body, listing=True)
    assert type(error) is ListingDeniedError
    assert "HTTP 403 forbidden" in str(error)
    assert "storage.objects.list" in str(error)
    assert "secret" not in str(error)


def test_a_list_that_is_not_there_is_a_bucket_s() -> None:
    error = failure(404, body=b'{"error": {"errors": [{"reason": "notFound"}]}}', listing=True)
    assert isinstance(error, CheckpointNotFoundError)
    assert error.details["bucket"] == "bucket"


@pytest.mark.parametrize("status", [401, 403])
def test_without_credentials_the_remedy_is_to_give_some(status: int) -> None:
    assert "leave out --gcs-anonymous" in str(failure(status, "AccessDenied", anonymous=True))


@pytest.fixture
def account() -> Account:
    return Account(GcsSettings(anonymous=True), 1.0)


@pytest.mark.parametrize(
    ("hashes", "crc32c"),
    [
        ("crc32c=4waSgw==,md5=JfnnlDI7RTiF9RgfG2JNCw==", 0xE3069283),
        ("md5=JfnnlDI7RTiF9RgfG2JNCw==, crc32c=4waSgw==", 0xE3069283),
        ("crc32c=AAAAAA==", 0),
        ("md5=JfnnlDI7RTiF9RgfG2JNCw==", None),
        ("crc32c=nonsense", None),
        ("xcrc32c=4waSgw==", None),
        ("", None),
    ],
)
def test_the_checksum_of_the_whole_object_is_kept(hashes: str, crc32c: int | None, account: Account) -> None:
    headers = {"x-goog-generation": "1", "x-goog-hash": hashes}
    assert account.state(LOCATION, headers, 9).crc32c == crc32c


@pytest.mark.parametrize("name", ["x-goog-stored-content-encoding", "content-encoding"])
def test_what_is_stored_with_gzip_is_refused_with_a_remedy(name: str, account: Account) -> None:
    with pytest.raises(SourceUnavailableError, match=r"'gzip'.*upload it again without"):
        account.state(LOCATION, {"x-goog-generation": "1", name: "gzip"}, 9)


@pytest.mark.parametrize("generation", ["", "x", "1\n", "12345678901234567890"])
def test_without_a_generation_a_change_could_not_be_noticed(generation: str, account: Account) -> None:
    with pytest.raises(SourceUnavailableError, match="gives it no generation"):
        account.state(LOCATION, {"x-goog-generation": generation}, 9)


def test_objects_are_asked_for_as_they_are_stored_and_lists_plainly(account: Account) -> None:
    asked = account.sign(Ask("GET", Location("b", "a b/%+?#é", "5"), {"Range": "bytes=0-1"}))
    assert asked.url == "https://storage.googleapis.com/b/a%20b/%25%2B%3F%23%C3%A9?generation=5"
    assert asked.headers == {"Range": "bytes=0-1", "Accept-Encoding": "gzip"}
    listed = account.sign(Ask("GET", Location("b", "p q/"), {}, page="t&"))
    assert listed.url.startswith("https://storage.googleapis.com/storage/v1/b/b/o?prefix=p%20q%2F&")
    assert listed.url.endswith("&delimiter=%2F&pageToken=t%26")
    assert not listed.headers


ASK = Ask("GET", LOCATION, {}, page="")


def test_a_list_gives_names_sizes_and_generations(account: Account) -> None:
    items = [{"name": "a", "size": "3", "generation": "7"}, {"name": "é b", "size": "\u0663"}]
    body = json.dumps({"kind": "storage#objects", "items": items, "nextPageToken": "t", "more": 1}).encode()
    assert account.page(ASK, {}, body) == Page([Entry("a", 3, "7"), Entry("é b", None, "")], "t")
    assert account.page(ASK, {}, b'{"kind": "storage#objects"}') == Page([], "")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<x/>",
        b"[]",
        b"{}",
        b'{"kind": "storage#object"}',
        b'{"kind": "storage#objects", "items": 5}',
        b'{"kind": "storage#objects", "items": [{}]}',
        b'{"kind": "storage#objects", "items": [{"name": "\xff"}]}',
        b'{"kind": "storage#objects", "items": [{"name": "\\ud800"}]}',
        b'{"kind": "storage#objects", "x": ' + b"[" * 100_000,
    ],
    ids=lambda body: body[:60],
)
def test_what_is_no_list_is_asked_for_again(body: bytes, account: Account) -> None:
    with pytest.raises(Transient, match="not the list that was asked for"):
        account.page(ASK, {}, body)
