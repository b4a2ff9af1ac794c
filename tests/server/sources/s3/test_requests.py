"""Requests as S3 expects them: signed for exactly what is asked, or not at all; lists put together."""

from __future__ import annotations

import time

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from penstock.server.sources.objects.object import FIRST_BYTES
from penstock.server.sources.s3 import account

from ...objects import Asked, ObjectServer
from ...support import ROOT
from ..hooks import (
    AWKWARD,
    CONTENT,
    KEY_ID,
    SECRET,
    Sources,
    always,
    lists,
    page,
    query_of,
    read,
)


def signature_of(asked: Asked, url: str) -> str:
    """By botocore, from what arrived."""
    signed = asked.headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
    assert {"host", "x-amz-date"} <= set(signed)
    headers = {name: asked.headers[name] for name in signed if name != "x-amz-date"}
    request = AWSRequest(method=asked.method, url=url + asked.target, headers=headers)
    request.context["timestamp"] = asked.headers["x-amz-date"]
    auth = S3SigV4Auth(Credentials(KEY_ID, SECRET), "s3", "eu-west-3")
    request.headers["X-Amz-Date"] = asked.headers["x-amz-date"]
    text = auth.string_to_sign(request, auth.canonical_request(request))
    return (
        f"AWS4-HMAC-SHA256 Credential={KEY_ID}/{auth.credential_scope(request)}, "
        f"SignedHeaders={';'.join(signed)}, Signature={auth.signature(text, request)}"
    )


@pytest.mark.parametrize("key", AWKWARD)
def test_every_request_is_signed_for_exactly_what_is_asked(
    key: str, server: ObjectServer, sources: Sources
) -> None:
    server.put(key, CONTENT)
    source = sources(requester_pays=True, checksums=True)
    file = source.open(f"s3://bucket/{key}", ROOT)
    assert read(file, 5, len(CONTENT)) == CONTENT[5:]
    source.open(f"s3://bucket/{key}", ROOT)
    assert [asked.method for asked in server.asked] == ["GET", "HEAD", "GET", "HEAD"]
    for asked in server.asked:
        assert asked.headers["x-amz-request-payer"] == "requester"
        assert asked.headers["authorization"] == signature_of(asked, server.url)


@pytest.mark.parametrize("key", AWKWARD)
def test_every_request_for_a_list_is_signed_for_exactly_what_is_asked(
    key: str, server: ObjectServer, sources: Sources
) -> None:
    token = "1/2+3==&x=é %2F"
    server.hooks += [lists(f"{key}/", f"{key}/b", after=token), lists(f"{key}/", f"{key}/{key}", token=token)]
    assert sources(requester_pays=True).list(f"s3://bucket/{key}/", ROOT) == sorted(["b", key])
    for asked in server.asked:
        assert asked.headers["x-amz-request-payer"] == "requester"
        assert asked.headers["authorization"] == signature_of(asked, server.url)
        query = query_of(asked)
        assert (query["list-type"], query["delimiter"], query["encoding-type"]) == ("2", "/", "url")


def test_unsigned_requests_carry_nothing_of_the_credentials(server: ObjectServer, sources: Sources) -> None:
    server.put("k", CONTENT)
    sources(unsigned=True).open("s3://bucket/k", ROOT)
    assert "authorization" not in server.asked[0].headers
    assert KEY_ID not in server.asked[0].target


def test_unsigned_lists_carry_nothing_of_the_credentials(server: ObjectServer, sources: Sources) -> None:
    server.hooks.append(lists("", "a"))
    assert sources(unsigned=True).list("s3://bucket/", ROOT) == ["a"]
    assert "authorization" not in server.asked[0].headers
    assert KEY_ID not in server.asked[0].target


def test_the_pages_of_a_list_are_put_together(server: ObjectServer, sources: Sources) -> None:
    server.hooks += [lists("m/", "m/b", "m/", after="t/2="), lists("m/", "m/a +%é", token="t/2=")]
    assert sources().list("s3://bucket/m/", ROOT) == ["a +%é", "b"]
    assert len(server.asked) == 2


def test_keys_are_taken_as_they_are_from_a_store_that_encodes_none(
    server: ObjectServer, sources: Sources
) -> None:
    server.hooks.append(always(lambda asked: asked.answer(200, page("m/a+b%20", "m/c"))))
    assert sources().list("s3://bucket/m/", ROOT) == ["a+b%20", "c"]


def test_a_signature_serves_all_blocks_of_an_object_that_are_read_within_a_minute(
    server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    sign, minute = account._signature, [1.0]

    def count(covered: account._Covered) -> dict[str, str]:
        made.append(covered)
        return sign(covered)

    monkeypatch.setattr(account, "_signature", count)
    monkeypatch.setattr(time, "time", lambda: minute[0] * 60)
    server.put("k", CONTENT)
    server.put("other", CONTENT)
    source = sources()
    files = [source.open(f"s3://bucket/{key}", ROOT) for key in ("k", "other")]
    for signatures in (2, 4):
        for file in files:
            for start in range(FIRST_BYTES, len(CONTENT), 1000):
                end = min(start + 1000, len(CONTENT))
                assert read(file, start, end) == CONTENT[start:end]
        assert len(made) == signatures
        minute[0] += 1
    for asked in server.asked:
        assert asked.headers["authorization"] == signature_of(asked, server.url)
