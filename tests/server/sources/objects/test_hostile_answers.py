"""Answers that are made to cost much: in bytes, in headers, in what is remembered of them."""

from __future__ import annotations

import contextlib
import email.utils
import tracemalloc
from concurrent.futures import CancelledError
from dataclasses import replace

import pytest

from penstock.server.errors import CheckpointInvalidError, SourceUnavailableError, TooManyLoadsError
from penstock.server.sources import looking
from penstock.server.sources.looking import ListingCost
from penstock.server.sources.objects import markup, redirects
from penstock.server.sources.objects.faults import retry_after
from penstock.server.sources.objects.object import FIRST_BYTES, MAX_VERSION_CHARACTERS
from penstock.server.sources.objects.redirects import Redirects
from penstock.server.sources.objects.source import KNOWN_OBJECTS

from ...objects import Asked, ObjectServer
from ...support import ROOT, until_true
from ..hooks import CONTENT, Sources, always, page, query_of, read

MIB = 1 << 20
FLOOD_BYTES = 64 * MIB
"""What a server sends where it is let; many times what sockets hold."""
FEW_BYTES = 16 * MIB


def flood(asked: Asked, beginning: bytes, part: bytes, taken: list[int]) -> None:
    """Sends `part` again and again; `taken` gets how many bytes the daemon let it send."""
    asked.handler.close_connection = True
    sent = 0
    with contextlib.suppress(OSError):
        asked.handler.wfile.write(beginning)
        while sent < FLOOD_BYTES:
            asked.handler.wfile.write(part)
            sent += len(part)
    taken.append(sent)


@pytest.fixture
def taken() -> list[int]:
    return []


FLOODS = {
    "headers": (b"HTTP/1.1 206 x\r\n", b"X-Long: " + b"x" * 60_000 + b"\r\n"),
    "interim answers": (b"", b"HTTP/1.1 100 Continue\r\nX-Long: " + b"x" * 60_000 + b"\r\n\r\n"),
    "a chunk of less than no bytes": (
        b"HTTP/1.1 404 x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"x" * 65_536,
    ),
}


@pytest.mark.parametrize("kind", FLOODS)
def test_an_answer_without_end_is_left_after_a_few_bytes(
    kind: str, server: ObjectServer, sources: Sources, taken: list[int]
) -> None:
    beginning, part = FLOODS[kind]
    server.hooks.append(always(lambda asked: flood(asked, beginning, part, taken)))
    with pytest.raises(SourceUnavailableError, match="answered no valid HTTP"):
        sources().open("s3://bucket/k", ROOT)
    until_true(lambda: len(taken) == 3)  # a thread for each attempt
    assert max(taken) < FEW_BYTES


def test_a_list_in_chunks_of_less_than_no_bytes_is_left_too(
    server: ObjectServer, sources: Sources, taken: list[int]
) -> None:
    beginning = b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n"
    server.hooks.append(always(lambda asked: flood(asked, beginning, b"x" * 65_536, taken)))
    with pytest.raises(SourceUnavailableError, match="answered no valid HTTP"):
        sources().list("s3://bucket/d/", ROOT)
    until_true(lambda: len(taken) == 3)
    assert max(taken) < FEW_BYTES


def test_an_answer_may_have_as_many_headers_as_stores_send(server: ObjectServer, sources: Sources) -> None:
    """And one in many chunks is whole."""
    server.put("k", CONTENT)

    def verbose(asked: Asked) -> None:
        start, last = asked.range
        handler = asked.handler
        handler.send_response(206)
        handler.send_header("Content-Range", f"bytes {start}-{last}/{len(CONTENT)}")
        handler.send_header("Transfer-Encoding", "chunked")
        for number in range(60):
            handler.send_header(f"X-Meta-{number}", "x" * 900)
        handler.send_header("ETag", '"e"')
        handler.end_headers()
        for at in range(start, last + 1, 10_000):
            some = CONTENT[at : min(at + 10_000, last + 1)]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(some), some))
        handler.wfile.write(b"0\r\n\r\n")

    server.hooks.append(always(verbose))
    file = sources().open("s3://bucket/k", ROOT)
    assert read(file, 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_version_that_a_store_names_at_length_is_refused(
    method: str, server: ObjectServer, sources: Sources
) -> None:
    """A load keeps the version of each of its files, of which there may be thousands."""
    server.put("k", CONTENT, etag='"' + "x" * MAX_VERSION_CHARACTERS + '"')
    source = sources()
    if method == "HEAD":
        source.remember("s3://bucket/k")
    with pytest.raises(SourceUnavailableError, match=r"s3://bucket/k: .* names its version by \d+ charact"):
        source.open("s3://bucket/k", ROOT)


def test_bytes_that_came_with_the_version_are_dropped_when_nobody_will_read_them(
    server: ObjectServer, sources: Sources
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    file = sources().open("s3://bucket/k", ROOT)
    held = tracemalloc.get_traced_memory()[0] - before
    file.drop_first_bytes()
    left = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert held - left >= FIRST_BYTES
    assert read(file, 0, 100) == CONTENT[:100]


def test_what_is_remembered_of_objects_takes_little_however_long_their_names_are(sources: Sources) -> None:
    source = sources()
    tracemalloc.start()
    for number in range(KNOWN_OBJECTS):
        source.remember(f"s3://bucket/{number:01024d}")
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 4 * MIB


def test_redirects_are_remembered_within_a_bound_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redirects, "REMEMBERED_BYTES", 100_000)
    led = Redirects()
    for number in range(100):
        led.lead(f"https://h/{number}", f"https://other/{'x' * 8000}{number}")
        led.lead("https://h/again", f"https://other/{number}")
        assert led.remembered_bytes <= 100_000
    assert led.get("https://h/99") == f"https://other/{'x' * 8000}99"
    assert led.get("https://h/again") == "https://other/99"
    assert led.get("https://h/0") is None
    for asked in ["https://h/again", *(f"https://h/{number}" for number in range(100))]:
        led.forget(asked)
    assert led.remembered_bytes == 0


@pytest.mark.parametrize(
    "text",
    [
        "Mon, 1 Jan 99999 00:00:00 GMT",
        "Mon, 1 Jan 9999999999999 00:00:00",
        "Mon, 1 Jan " + "9" * 5000 + " 00:00:00 GMT",
        "Mon, 99 Jan 2026 99:99:99 +9999999999",
        "\u00b2",
        "-1",
        "",
    ],
)
def test_a_time_to_wait_for_that_makes_no_sense_is_none(text: str) -> None:
    assert retry_after(text) == 0.0


def test_a_time_to_wait_for_is_bounded() -> None:
    assert retry_after("9" * 5000) == retry_after(email.utils.formatdate(2**32)) == 30.0


def junk_page(junk: str) -> bytes:
    return page("d/a.safetensors", more=junk)


COSTLY = {
    "elements": junk_page("<a/>" * (2 * markup.MAX_ELEMENTS)),
    "attributes": junk_page("<a " + " ".join(f'a{number}=""' for number in range(20_000)) + "/>"),
    "entities": b'<!DOCTYPE l [<!ENTITY a "a">]>' + junk_page("<a>&a;</a>"),
}


@pytest.mark.parametrize("kind", COSTLY)
def test_a_list_that_would_cost_its_parser_much_is_not_parsed(
    kind: str, server: ObjectServer, sources: Sources
) -> None:
    """Each is a list that the parser would take."""
    server.hooks.append(always(lambda asked: asked.answer(200, COSTLY[kind])))
    with pytest.raises(SourceUnavailableError, match="no list that can be read"):
        sources().list("s3://bucket/d/", ROOT)


def long_names(asked: Asked) -> None:
    """A page of a thousand long names, and another one after it, for ever."""
    number = int(query_of(asked).get("continuation-token", "0"))
    keys = [f"d/{number:06d}{at:04d}{'x' * 900}" for at in range(1000)]
    following = f"<NextContinuationToken>{number + 1}</NextContinuationToken>"
    asked.answer(200, page(*keys, more=following).replace(b"<IsTruncated>false<", b"<IsTruncated>true<", 1))


def test_names_of_a_list_are_charged_while_they_come(server: ObjectServer, sources: Sources) -> None:
    """To the one who asks, before all are there; and given back."""
    charged: list[int] = []

    def resize(size_bytes: int) -> None:
        charged.append(size_bytes)
        if size_bytes > 10 * MIB:
            raise TooManyLoadsError("there is no more")

    server.hooks.append(always(long_names))
    access = replace(ROOT, listing=ListingCost(resize))
    with pytest.raises(TooManyLoadsError):
        sources().list("s3://bucket/d/", access)
    access.listing.release()
    assert charged[-1] == 0
    assert len(server.asked) < 10


def test_a_list_of_names_that_are_too_long_together_is_refused(
    server: ObjectServer, sources: Sources, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(looking, "MAX_TREE_NAME_BYTES", 3 * MIB)
    server.hooks.append(always(long_names))
    with pytest.raises(CheckpointInvalidError, match="s3://bucket/d/ holds more than"):
        sources().list("s3://bucket/d/", ROOT)
    assert len(server.asked) < 10


@pytest.mark.parametrize("deep", [False, True])
def test_a_list_that_nobody_waits_for_ends(deep: bool, server: ObjectServer, sources: Sources) -> None:
    access = replace(ROOT, listing=ListingCost())

    def until_third(asked: Asked) -> None:
        if len(server.asked) == 3:
            access.listing.stop()
        long_names(asked)

    server.hooks.append(always(until_third))
    source = sources()
    ask = (
        (lambda: list(source.tree("s3://bucket/d/", access, lambda name: False)))
        if deep
        else (lambda: source.list("s3://bucket/d/", access))
    )
    with pytest.raises(CancelledError):
        ask()
    assert len(server.asked) == 3
