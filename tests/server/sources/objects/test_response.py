"""Answers as they come over a socket: what the standard library makes of them, and what it lets pass."""

from __future__ import annotations

import http.client
import socket
from typing import TypeVar

import pytest

from penstock.server.sources.objects.response import Fields, Response

OK = b"HTTP/1.1 200 OK\r\n"
R = TypeVar("R", bound=http.client.HTTPResponse)


def answer(kind: type[R], said: bytes, method: str = "GET") -> R:
    """What a server says, as far as its headers; the connection has ended after it."""
    near, far = socket.socketpair()
    with far:
        far.sendall(said)
    with near:
        response = kind(near, method=method)
        response.begin()
        return response


WHOLE = {
    "a body of a length": OK + b'Content-Length: 5\r\nETag: "a:b"\r\n\r\nhello',
    "two lengths that are equal": OK + b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello",
    "a body until the end": OK + b"X:\r\n\r\nhello",
    "chunks": OK + b"Transfer-Encoding: Chunked\r\nContent-Length: 9\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    "nothing to say": b"HTTP/1.1 204 None\r\nContent-Length: 5\r\n\r\n",
    "unchanged": b"HTTP/1.1 304 Same\r\nContent-Length: 5\r\n\r\n",
    "the end is told": OK + b"Connection: Close\r\nContent-Length: 5\r\n\r\nhello",
    "an old server": b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "an old one that keeps": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\nContent-Length: 5\r\n\r\nhello",
    "bare line feeds": b"HTTP/1.1 206 Part\nContent-Length:5\n\nhello",
    "go on first": b"HTTP/1.1 100 Continue\r\nA: b\r\n\r\n" + OK + b"Content-Length: 5\r\n\r\nhello",
    "a header in two lines": OK + b"A: b\r\n  c\r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("what", WHOLE)
def test_an_answer_is_taken_as_the_standard_library_takes_it(what: str, method: str) -> None:
    ours = answer(Response, WHOLE[what], method)
    theirs = answer(http.client.HTTPResponse, WHOLE[what], method)
    assert (ours.status, ours.reason, ours.version) == (theirs.status, theirs.reason, theirs.version)
    assert (ours.length, ours.chunked) == (theirs.length, theirs.chunked)
    assert ours.will_close == theirs.will_close
    assert set(ours.fields) == {name.lower() for name in theirs.headers}
    assert ours.read() == theirs.read()
    assert ours.isclosed()


def test_headers_are_found_by_their_names_in_lower_case_and_joined_when_they_come_twice() -> None:
    fields = Fields([b"ETag:  x \r\n", b"Link: a\r\n", b"link: b\r\n", b"Long: c\r\n", b"\td\r\n", b"\r\n"])
    assert fields == {"etag": "x", "link": "a, b", "long": "c d"}


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n",
        b"Content-Length: 5, 6\r\n",
        b"Content-Length: -5\r\n",
        b"Content-Length: 5x\r\n",
        b"Content-Length: \xb2\r\n",  # a digit, says Python
        b"Content-Length:\r\n",
        b"Content-Length: " + b"5" * 5000 + b"\r\n",  # more digits than Python reads
        b"no header\r\n",
        b": nameless\r\n",
        b"Content-Length : 5\r\n",
        b" goes on with nothing\r\n",
        b"A: b\r\n" * 101,
        b"A: " + b"b" * 70_000 + b"\r\n",
    ],
)
def test_headers_that_two_readers_could_take_for_different_answers_are_refused(headers: bytes) -> None:
    with pytest.raises(http.client.HTTPException):
        answer(Response, OK + headers + b"\r\nhello")


@pytest.mark.parametrize("end", [b"", b"Content-Length: 5", b"Content-Length: 50\r\nETa"])
def test_headers_that_are_cut_off_are_refused(end: bytes) -> None:
    with pytest.raises(http.client.HTTPException, match="end early"):
        answer(Response, OK + b"A: b\r\n" + end)


@pytest.mark.parametrize("said", [b"", b"HTTP/2 200\r\n\r\n", b"SSH-2.0-x\r\n", b"HTTP/1.1 two\r\n\r\n"])
def test_what_is_no_answer_is_refused(said: bytes) -> None:
    with pytest.raises(http.client.HTTPException):
        answer(Response, said)
