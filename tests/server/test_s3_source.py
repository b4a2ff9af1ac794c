"""The S3 source against a real HTTP server: signatures, versions, ranges, what is retried and what is not."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit
from xml.sax.saxutils import escape

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from penstock.server.errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointNotFoundError,
    PenstockError,
    ShuttingDownError,
    SourceUnavailableError,
)
from penstock.server.sources import Access, Patient, RetryLater
from penstock.server.sources.objects import ObjectFile, ObjectSettings
from penstock.server.sources.objects import connection as s3_connection
from penstock.server.sources.objects import faults as s3_faults
from penstock.server.sources.objects import listing as s3_listing
from penstock.server.sources.objects import object as s3_object
from penstock.server.sources.objects import response as s3_response
from penstock.server.sources.objects.object import FIRST_BYTES
from penstock.server.sources.objects.service import Answer
from penstock.server.sources.s3 import account as s3_account
from penstock.server.sources.s3 import answers as s3_answers
from penstock.server.sources.s3.location import Location
from penstock.server.sources.s3.settings import S3Settings
from penstock.server.sources.s3.source import S3Source

from .objects import Asked, ObjectServer
from .support import ROOT

S3File = ObjectFile[Location]

KEY_ID, SECRET = "AKIDEXAMPLE", "SECRETEXAMPLE"
NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
CONTENT = random.Random(5).randbytes(FIRST_BYTES + 300_000)
AWKWARD = [
    "a b+c",
    "%41%2F",
    "#frag?query=1&x",
    "é漢🎉",
    "a//b",
    "/lead",
    "a/../b",
    "./a",
    "trail/.",
    "~*()'!@$;:,=",
]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "AWS_ACCESS_KEY_ID": KEY_ID,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "eu-west-3",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    # Retries are to be counted, not waited for.
    monkeypatch.setattr(s3_faults, "FIRST_DELAY_SECONDS", 0.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectServer]:
    server = ObjectServer()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url)
    yield server
    server.close()


Sources = Callable[..., S3Source]


@pytest.fixture
def retried() -> list[str]:
    return []


@pytest.fixture
def sources(retried: list[str]) -> Iterator[Sources]:
    made: list[S3Source] = []
    with ThreadPoolExecutor(2) as workers:

        def make(**settings: Any) -> S3Source:
            values: dict[str, Any] = {"retries": 3, "timeout_seconds": 20.0, "connections": 2}
            values.update({name: settings.pop(name) for name in set(values) & set(settings)})
            own = S3Settings(**settings)
            made.append(S3Source(ObjectSettings(**values), own, lambda uid: workers, retried.append))
            return made[-1]

        yield make
        for source in made:
            source.stop()


def read(file: S3File, start: int, end: int) -> bytes:
    buffer = bytearray(end - start)
    half = len(buffer) // 2
    Patient(file).read_into(start, [memoryview(buffer)[:half], memoryview(buffer)[half:]])
    return bytes(buffer)


def once(act: Callable[[Asked], object], *, method: str = "GET", skip: int = 0) -> Callable[[Asked], bool]:
    left = [skip + 1]

    def hook(asked: Asked) -> bool:
        if asked.method != method or not left[0]:
            return False
        left[0] -= 1
        if left[0]:
            return False
        act(asked)
        return True

    return hook


def always(act: Callable[[Asked], None]) -> Callable[[Asked], bool]:
    def hook(asked: Asked) -> bool:
        act(asked)
        return True

    return hook


def query_of(asked: Asked) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(asked.target).query, keep_blank_values=True))


def lists(directory: str, *keys: str, token: str = "", after: str = "") -> Callable[[Asked], bool]:
    """Answers what asks for that directory, from the page `token` on; `after` is the one that follows."""

    def hook(asked: Asked) -> bool:
        query = query_of(asked)
        if query.get("prefix") != directory or query.get("continuation-token", "") != token:
            return False
        contents = "".join(f"<Contents><Key>{quote(key)}</Key></Contents>" for key in keys)
        following = f"<NextContinuationToken>{escape(after)}</NextContinuationToken>" if after else ""
        body = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="{NAMESPACE}"><Name>bucket</Name>'
            f"<Prefix>{quote(directory)}</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys>"
            f"<EncodingType>url</EncodingType><IsTruncated>{str(bool(after)).lower()}</IsTruncated>"
            f"{following}{contents}</ListBucketResult>"
        )
        asked.answer(200, body.encode(), Content_Type="application/xml")
        return True

    return hook


def test_the_first_request_brings_the_state_and_the_first_bytes(
    server: ObjectServer, sources: Sources
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    assert (file.size_bytes, file.uri, file.kind) == (len(CONTENT), "s3://bucket/k", "s3")
    assert read(file, 0, FIRST_BYTES) == CONTENT[:FIRST_BYTES]
    assert [asked.range for asked in server.asked] == [(0, FIRST_BYTES - 1)]
    assert read(file, 1000, len(CONTENT)) == CONTENT[1000:]
    assert server.asked[-1].headers["if-match"] == server.etags["k"]
    assert read(file, 0, 5) == CONTENT[:5]


def test_an_object_known_already_is_asked_by_head(server: ObjectServer, sources: Sources) -> None:
    server.put("k", CONTENT)
    source = sources()
    first = source.open("s3://bucket/k", ROOT)
    again = source.open("s3://bucket/k", ROOT)
    assert [asked.method for asked in server.asked] == ["GET", "HEAD"]
    assert again.version == first.version
    assert read(again, 0, 100) == CONTENT[:100]
    server.put("k", CONTENT[::-1])
    assert source.open("s3://bucket/k", ROOT).version != first.version


@pytest.mark.parametrize("key", AWKWARD)
def test_every_request_is_signed_for_exactly_what_is_asked(
    key: str, server: ObjectServer, sources: Sources
) -> None:
    server.put(key, CONTENT)
    source = sources(requester_pays=True)
    file = source.open(f"s3://bucket/{key}", ROOT)
    assert read(file, 5, len(CONTENT)) == CONTENT[5:]
    source.open(f"s3://bucket/{key}", ROOT)
    assert [asked.method for asked in server.asked] == ["GET", "GET", "HEAD"]
    for asked in server.asked:
        assert asked.headers["x-amz-request-payer"] == "requester"
        assert asked.headers["authorization"] == signature_of(asked, server.url)


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


def test_unsigned_requests_carry_nothing_of_the_credentials(server: ObjectServer, sources: Sources) -> None:
    server.put("k", CONTENT)
    sources(unsigned=True).open("s3://bucket/k", ROOT)
    assert "authorization" not in server.asked[0].headers
    assert KEY_ID not in server.asked[0].target


def test_connections_are_kept(server: ObjectServer, sources: Sources) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    for start in range(0, 50_000, 10_000):
        read(file, start, start + 10_000)
    assert len({asked.handler.client_address for asked in server.asked}) == 1


def cut(asked: Asked, *, after: int) -> None:
    start, last = asked.range
    handler = asked.handler
    handler.send_response(206)
    handler.send_header("Content-Length", str(last - start + 1))
    handler.send_header("Content-Range", f"bytes {start}-{last}/{len(CONTENT)}")
    handler.end_headers()
    handler.wfile.write(CONTENT[start : start + after])
    handler.close_connection = True


def reset(asked: Asked) -> None:
    asked.handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    os.close(asked.handler.connection.detach())
    asked.handler.close_connection = True


@pytest.mark.parametrize("after", [0, 1, 4096, 99_999])
def test_what_was_cut_goes_on_from_the_byte_reached_without_a_sleeping_thread(
    after: int, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks.append(once(lambda asked: cut(asked, after=after)))
    buffer = memoryview(bytearray(100_000))
    with pytest.raises(RetryLater) as caught:
        file.read_into(200_000, [buffer[:7], buffer[7:]])
    assert caught.value.reached == 200_000 + after
    assert retried == ["short_body"]
    file.read_into(caught.value.reached, [buffer[after:]])
    assert server.asked[-1].range == (200_000 + after, 299_999)
    assert bytes(buffer) == CONTENT[200_000:300_000]


TRANSIENT: dict[str, tuple[str, Callable[[Asked], None]]] = {
    "reset": ("connection", reset),
    "500": ("server_error", lambda asked: asked.fail(500, "InternalError")),
    "503": ("throttled", lambda asked: asked.fail(503, "SlowDown")),
    "429": ("throttled", lambda asked: asked.fail(429, "")),
    "400": ("timeout", lambda asked: asked.fail(400, "RequestTimeout")),
    "200": ("bad_response", lambda asked: asked.answer(200, b"<html>" * 100)),
    "wrong range": ("bad_response", lambda asked: asked.answer(206, b"x", Content_Range="bytes 0-0/9")),
    "no range": ("bad_response", lambda asked: asked.answer(206, b"x")),
    "no HTTP": ("bad_response", lambda asked: no_http(asked)),
}


def no_http(asked: Asked) -> None:
    asked.handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")
    asked.handler.close_connection = True


@pytest.mark.parametrize("name", [name for name in TRANSIENT if name != "wrong range"])
def test_what_may_pass_is_asked_again_and_counted(
    name: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.put("k", CONTENT)
    reason, act = TRANSIENT[name]
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks += [once(act), once(act, skip=1)]
    assert read(file, 10, 20_000) == CONTENT[10:20_000]
    assert retried[0] == reason


@pytest.mark.parametrize("name", TRANSIENT)
def test_what_lasts_is_given_up_with_the_object_and_a_remedy(
    name: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.put("k", CONTENT)
    _, act = TRANSIENT[name]
    server.hooks.append(always(act))
    with pytest.raises(SourceUnavailableError, match=r"s3://bucket/k: .*3 times in a row.*--object-retries"):
        sources().open("s3://bucket/k", ROOT)
    assert (len(server.asked), len(retried)) == (3, 2)


FRAMES = ["Content-Length", "chunked", "until it closes"]


@pytest.fixture
def _a_second_for_each_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this machine, when it is slow, would be taken for a store that trickles."""
    seconds = [0]
    read_raw = s3_response._Timed.readinto

    def tick() -> None:
        seconds[0] += 1

    def readinto(raw: s3_response._Timed, buffer: object) -> int | None:
        tick()
        return read_raw(raw, buffer)

    clock = SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr(s3_object, "time", clock)
    monkeypatch.setattr(s3_response, "time", clock)
    monkeypatch.setattr(s3_response._Timed, "readinto", readinto)
    monkeypatch.setattr(s3_connection, "moved", tick)  # what goes past the parser's buffer


def trickle(asked: Asked, frame: str = "Content-Length") -> None:
    """The answer that is due, byte by byte, for as long as it is read."""
    start, last = asked.range
    asked.handler.send_response(206)
    asked.handler.send_header("Content-Range", f"bytes {start}-{last}/{len(CONTENT)}")
    trickle_body(asked, CONTENT[start : last + 1], frame)


def trickle_body(asked: Asked, body: bytes, frame: str) -> None:
    if frame == "Content-Length":
        asked.handler.send_header("Content-Length", str(len(body)))
    if frame == "chunked":
        asked.handler.send_header("Transfer-Encoding", "chunked")
    asked.handler.end_headers()
    asked.handler.close_connection = True
    with contextlib.suppress(OSError):
        for at in range(len(body)):
            byte = body[at : at + 1]
            asked.handler.wfile.write(b"1\r\n" + byte + b"\r\n" if frame == "chunked" else byte)
            time.sleep(0.01)


@pytest.mark.usefixtures("_a_second_for_each_read")
@pytest.mark.parametrize("frame", FRAMES)
def test_a_body_that_trickles_is_asked_for_again_from_the_byte_reached(
    frame: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks.append(once(lambda asked: trickle(asked, frame)))
    assert read(file, FIRST_BYTES, len(CONTENT)) == CONTENT[FIRST_BYTES:]
    assert retried == ["timeout"]
    assert server.asked[-1].range[0] > FIRST_BYTES


@pytest.mark.usefixtures("_a_second_for_each_read")
@pytest.mark.parametrize("status", [206, 503])
def test_an_answer_whose_headers_or_error_trickle_is_asked_for_again(
    status: int, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    """A byte comes well within the time for each, and there is no end of them."""

    def slowly(asked: Asked) -> None:
        said = f"HTTP/1.1 {status} x\r\n" + ("Content-Length: 100000\r\n\r\n" if status == 503 else "X-")
        asked.handler.close_connection = True
        with contextlib.suppress(OSError):
            asked.handler.wfile.write(said.encode())
            while True:
                asked.handler.wfile.write(b"a")
                time.sleep(0.01)

    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks.append(once(slowly))
    assert read(file, FIRST_BYTES, len(CONTENT)) == CONTENT[FIRST_BYTES:]
    assert retried == ["timeout"]


@pytest.mark.usefixtures("_a_second_for_each_read")
def test_a_store_that_only_trickles_is_given_up(
    server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks.append(always(trickle))
    with pytest.raises(SourceUnavailableError, match=r"3 times in a row.*too slowly.*--object-timeout"):
        read(file, FIRST_BYTES, len(CONTENT))
    assert retried == ["timeout", "timeout"]


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


def test_an_object_that_is_replaced_is_noticed_also_where_conditions_are_ignored(
    server: ObjectServer, sources: Sources
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks.append(
        once(lambda asked: asked.answer(206, b"x" * 10, ETag='"other"', Content_Range="bytes 10-19/562144"))
    )
    with pytest.raises(CheckpointChangedError, match="s3://bucket/k was changed"):
        read(file, 10, 20)


def test_without_a_strong_etag_the_time_of_the_last_change_is_the_condition(
    server: ObjectServer, sources: Sources
) -> None:
    server.put("k", CONTENT, etag='W/"weak"')
    with pytest.raises(SourceUnavailableError, match="neither a strong ETag nor a Last-Modified"):
        sources().open("s3://bucket/k", ROOT)
    when = "Wed, 21 Oct 2026 07:28:00 GMT"
    about = {"ETag": 'W/"weak"', "Last_Modified": when}
    total = len(CONTENT)

    def serve(asked: Asked) -> bool:
        start, last = asked.range
        last = min(last, total - 1)
        part = CONTENT[start : last + 1]
        asked.answer(206, part, Content_Range=f"bytes {start}-{last}/{total}", **about)
        return True

    server.hooks.append(serve)
    file = sources().open("s3://bucket/k", ROOT)
    assert read(file, 10, 20) == CONTENT[10:20]
    assert server.asked[-1].headers["if-unmodified-since"] == when
    assert "if-match" not in server.asked[-1].headers
    about["Last_Modified"] = "Wed, 21 Oct 2026 07:28:01 GMT"
    with pytest.raises(CheckpointChangedError):
        read(file, 10, 20)


@pytest.mark.parametrize("first", ["object", "prefix"])
def test_a_bucket_elsewhere_is_asked_there_and_remembered(
    first: str, server: ObjectServer, sources: Sources
) -> None:
    server.put("k", CONTENT)

    def elsewhere(asked: Asked) -> bool:
        if "/us-west-2/" in asked.headers["authorization"]:
            return False
        asked.fail(301, "PermanentRedirect", x_amz_bucket_region="us-west-2")
        return True

    server.hooks += [elsewhere, lists("m/", "m/a")]
    source = sources()
    for what in ("object", "prefix") if first == "object" else ("prefix", "object"):
        if what == "object":
            assert read(source.open("s3://bucket/k", ROOT), 0, 9) == CONTENT[:9]
        else:
            assert source.list("s3://bucket/m/", ROOT) == ["a"]
    assert len(server.asked) == 3


def test_a_redirect_in_circles_ends(server: ObjectServer, sources: Sources) -> None:
    regions = iter(["us-west-1", "us-west-2", "us-west-1"])
    server.hooks.append(
        always(lambda asked: asked.fail(301, "PermanentRedirect", x_amz_bucket_region=next(regions)))
    )
    with pytest.raises(SourceUnavailableError, match="elsewhere"):
        sources().open("s3://bucket/k", ROOT)
    assert len(server.asked) == 2


def test_an_empty_object_has_no_bytes(server: ObjectServer, sources: Sources) -> None:
    server.put("k", b"")
    file = sources().open("s3://bucket/k", ROOT)
    assert file.size_bytes == 0
    Patient(file).read_into(0, [])


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


def test_without_credentials_the_error_says_how_to_do_without(
    server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(AccessDeniedError, match="--s3-unsigned"):
        sources().open("s3://bucket/k", ROOT)
    assert not server.asked


def test_the_pages_of_a_list_are_put_together(server: ObjectServer, sources: Sources) -> None:
    server.hooks += [lists("m/", "m/b", "m/", after="t/2="), lists("m/", "m/a +%é", token="t/2=")]
    assert sources().list("s3://bucket/m/", ROOT) == ["a +%é", "b"]
    assert len(server.asked) == 2


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


def test_unsigned_lists_carry_nothing_of_the_credentials(server: ObjectServer, sources: Sources) -> None:
    server.hooks.append(lists("", "a"))
    assert sources(unsigned=True).list("s3://bucket/", ROOT) == ["a"]
    assert "authorization" not in server.asked[0].headers
    assert KEY_ID not in server.asked[0].target


def test_keys_are_taken_as_they_are_from_a_store_that_encodes_none(
    server: ObjectServer, sources: Sources
) -> None:
    server.hooks.append(always(lambda asked: asked.answer(200, page("m/a+b%20", "m/c"))))
    assert sources().list("s3://bucket/m/", ROOT) == ["a+b%20", "c"]


def page(*keys: str, more: str = "") -> bytes:
    contents = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
    name = "<Name>b</Name><IsTruncated>false</IsTruncated>"
    return f"<ListBucketResult>{name}{more}{contents}</ListBucketResult>".encode()


LISTS: dict[str, tuple[str, Callable[[Asked], None]]] = {
    **{name: TRANSIENT[name] for name in ("reset", "500", "503", "429", "400")},
    "no HTTP": TRANSIENT["no HTTP"],
    "408": ("timeout", lambda asked: asked.fail(408, "")),
    "200 and HTML": ("bad_response", lambda asked: asked.answer(200, b"<html><body>Sorry</body></html>")),
    "200 and half a page": ("bad_response", lambda asked: asked.answer(200, b"<html>" * 100)),
    "200 and nothing": ("bad_response", lambda asked: asked.answer(200)),
    "200 and an error": ("server_error", lambda asked: asked.fail(200, "InternalError")),
    "200 and too many at once": ("throttled", lambda asked: asked.fail(200, "SlowDown")),
    "cut list": ("short_body", lambda asked: cut_list(asked)),
    "cut in mid-chunk": ("short_body", lambda asked: cut_list(asked, chunked=True)),
    "no numbers": ("bad_response", lambda asked: asked.answer(200, page(more="<MaxKeys>x</MaxKeys>"))),
    "another directory": ("bad_response", lambda asked: asked.answer(200, page("other/a"))),
    "entries without a key": ("bad_response", lambda asked: asked.answer(200, page(more="<Contents/>"))),
    "no next page": ("bad_response", lambda asked: endless(asked, "")),
    "the same page": ("bad_response", lambda asked: endless(asked, "t")),
}


def cut_list(asked: Asked, *, chunked: bool = False) -> None:
    asked.handler.send_response(200)
    framing = ("Transfer-Encoding", "chunked") if chunked else ("Content-Length", "1000")
    asked.handler.send_header(*framing)
    asked.handler.end_headers()
    asked.handler.wfile.write((b"1000\r\n" if chunked else b"") + b"<ListBucketResult>")
    asked.handler.close_connection = True


def endless(asked: Asked, token: str) -> None:
    """Says that there is more where the page before said it, or does not say where."""
    body = (
        f"<Name>b</Name><IsTruncated>true</IsTruncated><NextContinuationToken>{token}</NextContinuationToken>"
    )
    asked.answer(200, f"<ListBucketResult>{body}</ListBucketResult>".encode())


@pytest.mark.parametrize("name", LISTS)
def test_a_page_that_fails_is_asked_for_again_and_counted(
    name: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    reason, act = LISTS[name]
    server.hooks += [once(act, skip=1), once(act, skip=1)]
    server.hooks += [lists("m/", "m/b", after="t"), lists("m/", "m/a", token="t")]
    assert sources().list("s3://bucket/m/", ROOT) == ["a", "b"]
    assert retried == [reason, reason]
    assert len(server.asked) == 4, "the first page was asked for again"


@pytest.mark.parametrize("name", LISTS)
def test_a_list_that_keeps_failing_is_given_up_with_a_remedy(
    name: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.hooks += [lists("m/", "m/b", after="t"), always(LISTS[name][1])]
    with pytest.raises(SourceUnavailableError, match=r"bucket/m/: listing it .*3 times.*--object-retries"):
        sources().list("s3://bucket/m/", ROOT)
    assert (len(server.asked), len(retried)) == (4, 2)


@pytest.mark.usefixtures("_a_second_for_each_read")
@pytest.mark.parametrize("frame", FRAMES)
def test_a_list_that_trickles_is_asked_for_again_and_given_up(
    frame: str, server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    """A byte comes well within the time for each."""

    def slowly(asked: Asked) -> None:
        asked.handler.send_response(200)
        trickle_body(asked, b" " * 100_000, frame)

    source = sources()
    server.hooks += [once(slowly), lists("m/", "m/a")]
    assert source.list("s3://bucket/m/", ROOT) == ["a"]
    assert retried == ["timeout"]
    server.hooks[:] = [always(slowly)]
    with pytest.raises(SourceUnavailableError, match=r"m/: listing it .*3 times.*slowly.*--object-timeout"):
        source.list("s3://bucket/m/", ROOT)


@pytest.mark.parametrize("announced", [True, False])
def test_a_page_longer_than_any_is_not_kept(
    announced: bool,
    server: ObjectServer,
    sources: Sources,
    retried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def long(asked: Asked) -> None:
        if announced:
            asked.answer(200, page("m/a"))
            return
        asked.handler.send_response(200)
        asked.handler.end_headers()
        asked.handler.wfile.write(page("m/a"))
        asked.handler.close_connection = True

    monkeypatch.setattr(s3_listing, "MAX_PAGE_BYTES", len(page("m/a")))
    server.hooks.append(always(long))
    assert sources().list("s3://bucket/m/", ROOT) == ["a"]
    monkeypatch.setattr(s3_listing, "MAX_PAGE_BYTES", len(page("m/a")) - 1)
    with pytest.raises(SourceUnavailableError, match=f"more than {len(page('m/a')) - 1} bytes"):
        sources().list("s3://bucket/m/", ROOT)
    assert retried == ["bad_response"] * 2


def assert_a_list_ends_with(source: S3Source, met: threading.Event) -> None:
    """With the daemon, which stops when the server has been `met`."""
    with ThreadPoolExecutor(1) as pool:
        listing = pool.submit(source.list, "s3://bucket/m/", ROOT)
        assert met.wait(20)
        source.stop()
        with pytest.raises(ShuttingDownError):
            listing.result(20)


def test_a_list_that_trickles_ends_with_the_daemon(server: ObjectServer, sources: Sources) -> None:
    met = threading.Event()

    def slowly(asked: Asked) -> None:
        asked.handler.send_response(200)
        met.set()
        trickle_body(asked, b" " * 100_000, "Content-Length")

    server.hooks.append(always(slowly))
    source = sources(timeout_seconds=600.0)
    assert_a_list_ends_with(source, met)


def test_a_list_waits_as_long_as_it_is_told_and_no_longer_than_the_daemon_runs(
    server: ObjectServer, sources: Sources
) -> None:
    met = threading.Event()

    def throttle(asked: Asked) -> None:
        asked.fail(503, "SlowDown", Retry_After="30")
        met.set()

    server.hooks.append(always(throttle))
    source = sources()
    assert_a_list_ends_with(source, met)
    assert len(server.asked) == 1


@pytest.mark.parametrize("way", ["object", "prefix"])
def test_credentials_that_expired_and_were_written_anew_are_read_again(
    way: str, server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shared = tmp_path / "credentials"
    text = f"[default]\naws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
    shared.write_text(text)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    monkeypatch.setattr(s3_account, "RENEW_SECONDS", 0.0)
    server.put("models/k", CONTENT)
    source = sources()
    expired = False

    def serve(asked: Asked) -> bool:
        if expired and f"={KEY_ID}/" in asked.headers["authorization"]:
            asked.fail(400, "ExpiredToken")
            return True
        return lists("models/", "models/k")(asked)

    def ask() -> None:
        if way == "object":
            assert read(source.open("s3://bucket/models/k", ROOT), 0, 9) == CONTENT[:9]
        else:
            assert source.list("s3://bucket/models/", ROOT) == ["k"]

    server.hooks.append(serve)
    ask()
    expired = True
    with pytest.raises(AccessDeniedError, match=r"s3://bucket/models/.*ExpiredToken.*REQ1.*refresh them"):
        ask()
    shared.write_text(text.replace(KEY_ID, "AKIDRENEWED"))
    ask()
    asked = len(server.asked)
    ask()
    assert all("=AKIDRENEWED/" in later.headers["authorization"] for later in server.asked[asked:])


@pytest.mark.parametrize("way", ["object", "prefix"])
def test_a_store_that_calls_every_new_token_expired_is_not_asked_for_ever(
    way: str, server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As with a clock that is far off, and credentials that are made anew whenever they are read."""
    shared = tmp_path / "credentials"
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(shared))
    monkeypatch.setattr(s3_account, "RENEW_SECONDS", 0.0)

    def write() -> None:
        key_id = f"AKID{len(server.asked)}"
        shared.write_text(f"[default]\naws_access_key_id = {key_id}\naws_secret_access_key = {SECRET}\n")

    def expire(asked: Asked) -> None:
        if len(server.asked) > 20:
            asked.fail(403, "AccessDenied")
            return
        write()
        asked.fail(400, "ExpiredToken")

    write()
    server.hooks.append(always(expire))
    source = sources()
    ask = source.open if way == "object" else source.list
    with pytest.raises(AccessDeniedError, match=r"s3://bucket/models/.*ExpiredToken.*REQ1.*refresh them"):
        ask("s3://bucket/models/", ROOT)
    assert len(server.asked) == 3


def test_a_version_that_is_a_delete_marker_is_named_and_nothing_else_is_taken_for_one() -> None:
    answer = Answer(405, {}, b"<Error><Code>MethodNotAllowed</Code></Error>")
    marker = s3_answers.failure(s3_answers.Said(answer), Location("bucket", "k", "v1"))
    assert isinstance(marker, CheckpointNotFoundError)
    assert "delete marker" in str(marker)
    for listing in (False, True):
        refused = s3_answers.failure(s3_answers.Said(answer), Location("bucket", "k"), listing=listing)
        assert isinstance(refused, SourceUnavailableError)
        assert "delete marker" not in str(refused)
        assert "MethodNotAllowed" in str(refused)


def test_a_password_in_the_endpoint_is_told_to_nobody(
    server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo

    def know_no_name(host: str, *more: Any, **named: Any) -> Any:
        """A resolver may know them, or take long to say that it does not."""
        if host != "127.0.0.1":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return resolve(host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", know_no_name)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        closed = f"127.0.0.1:{probe.getsockname()[1]}"
    for endpoint, said in {
        f"http://user:secretword@{closed}": closed,
        "http://user:secretword@not a host": "not a host",
        "http://user:/secretword@host": "host",
        "http://user:secretword@host:port": "host:port",
    }.items():
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        source = sources()
        for ask in (source.open, source.list):
            with pytest.raises(SourceUnavailableError, match=said) as caught:
                ask("s3://bucket/k", ROOT)
            assert "secretword" not in str(caught.value)
    server.put("k", CONTENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", server.url.replace("//", "//user:secretword@"))
    sources().open("s3://bucket/k", ROOT)
    assert "secretword" not in str(server.asked[0].headers)


def test_an_answer_says_how_long_to_wait_within_bounds() -> None:
    def asked_for(value: str) -> float:
        return s3_answers.Said(Answer(503, {"retry-after": value}, b"")).retry_after_seconds

    assert asked_for("7") == 7
    assert asked_for("86400") == asked_for("9" * 400) == s3_faults.LONGEST_RETRY_AFTER_SECONDS
    assert asked_for("Fri, 31 Dec 9999 23:59:59 GMT") == s3_faults.LONGEST_RETRY_AFTER_SECONDS
    for nonsense in ("", "soon", "-5", "Thu, 01 Jan 1970 00:00:00 GMT"):
        assert asked_for(nonsense) == 0


def test_nothing_of_an_error_page_is_told_but_code_region_and_request_id() -> None:
    body = b"<Error><Code>Odd\nCode</Code><StringToSign>SECRET</StringToSign></Error>"
    answer = Answer(400, {"x-amz-request-id": "bad id\n"}, body)
    assert str(s3_answers.Said(answer)) == "HTTP 400 (request id not given)"
