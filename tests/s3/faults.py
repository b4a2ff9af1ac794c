"""What can go wrong between a daemon and its object storage, as functions of an `Exchange` of the proxy."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from pathlib import Path

from .proxy import Answer, Exchange, Fault, Headers

REQUEST_ID, HOST_ID = "4442587FB7D0A2F9", "vlR7PnpV2Ce81l0PRw6jlUpck7Jo5ZsQjryTjKlc5aLWGVHPZLj5NeC6qMa0emYB"


def error(status: int, code: str, *headers: tuple[str, str], message: str = "As the test wants it.") -> Fault:
    """An error as S3 sends it: XML, with ids."""
    return raw_answer(error_answer(status, code, *headers, message=message))


def error_answer(
    status: int, code: str, *headers: tuple[str, str], message: str = "As the test wants it."
) -> Answer:
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>'
        f"<RequestId>{REQUEST_ID}</RequestId><HostId>{HOST_ID}</HostId></Error>"
    )
    ids: Headers = [("x-amz-request-id", REQUEST_ID), ("x-amz-id-2", HOST_ID)]
    return Answer(status, [("Content-Type", "application/xml"), *ids, *headers], body.encode())


def raw_answer(answer: Answer) -> Fault:
    return lambda exchange: exchange.send(answer)


def reset(exchange: Exchange) -> None:
    """Before a byte of the answer."""
    exchange.reset()


def close(exchange: Exchange) -> None:
    """In good order, before a byte of the answer: what an idle connection may meet at any time."""
    exchange.drop()


def stall(exchange: Exchange) -> None:
    """Before a byte of the answer."""
    exchange.stall()


def cut(after_bytes: int, *, by_reset: bool = False) -> Fault:
    """The body ends after so many bytes, and the connection with it."""

    def fault(exchange: Exchange) -> None:
        _send_part(exchange, after_bytes)
        if by_reset:
            exchange.reset()
        exchange.drop()

    return fault


def cut_at_random(seed: int) -> Fault:
    """Every range once, after another number of bytes each time, by a reset every other time."""
    chance = random.Random(seed)
    lock = threading.Lock()
    cut_before: set[tuple[int, int]] = set()

    def fault(exchange: Exchange) -> None:
        first, last = exchange.request.range or (0, 0)
        with lock:
            passes = (first, last) in cut_before
            cut_before.add((first, last))
            after_bytes, by_reset = chance.randrange(last - first + 1), chance.random() < 0.5
        if passes:
            exchange.pass_on()
        else:
            cut(after_bytes, by_reset=by_reset)(exchange)

    return fault


def stall_after(after_bytes: int) -> Fault:
    """In the middle of the body."""

    def fault(exchange: Exchange) -> None:
        _send_part(exchange, after_bytes)
        exchange.stall()

    return fault


def short_body(missing_bytes: int) -> Fault:
    """A well-formed answer with fewer bytes than were asked for; `Content-Length` says so."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.upstream()
        body = answer.body[:-missing_bytes]
        exchange.send(
            Answer(answer.status, answer.with_header("Content-Length", str(len(body))).headers, body)
        )

    return fault


def long_body(extra: bytes) -> Fault:
    """More bytes than were asked for; `Content-Length` says so, `Content-Range` does not."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.upstream()
        body = answer.body + extra
        exchange.send(
            Answer(answer.status, answer.with_header("Content-Length", str(len(body))).headers, body)
        )

    return fault


def trailing_garbage(extra: bytes) -> Fault:
    """Bytes after the body that nobody announced, where the next answer would begin. They come with it: when
    the next request is sent, they are there."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.upstream()
        announced = answer.with_header("Content-Length", str(len(answer.body)))
        exchange.send(replace(announced, body=answer.body + extra))

    return fault


def whole_object(exchange: Exchange) -> None:
    """200 and everything, as a server does that knows no ranges."""
    del exchange.request.headers["Range"]
    exchange.pass_on()


def other_range(shift: int) -> Fault:
    """The right number of bytes from another place, and `Content-Range` says it."""

    def fault(exchange: Exchange) -> None:
        first, last = exchange.request.range or (0, 0)
        exchange.request.headers.replace_header("Range", f"bytes={first + shift}-{last + shift}")
        exchange.pass_on()

    return fault


def content_range(value: str) -> Fault:
    """The right bytes, and a `Content-Range` that says otherwise."""
    return lambda exchange: exchange.send(exchange.upstream().with_header("Content-Range", value))


def short_lists(entries: int, page: Fault = Exchange.pass_on) -> Fault:
    """A server that lists so many objects at a time; what `page` makes of that."""

    def fault(exchange: Exchange) -> None:
        request = exchange.request
        page(replace(exchange, request=replace(request, target=f"{request.target}&max-keys={entries}")))

    return fault


def html(status: int) -> Fault:
    """What a load balancer or a captive portal says."""
    body = b"<!DOCTYPE html><html><head><title>Gateway</title></head><body><h1>Sorry</h1></body></html>"
    return raw_answer(Answer(status, [("Content-Type", "text/html; charset=utf-8")], body))


def serve_file(path: Path) -> Fault:
    """No fault: the ranges of a file, which need not be in memory."""
    size_bytes = path.stat().st_size

    def fault(exchange: Exchange) -> None:
        first, last = exchange.request.range or (0, size_bytes - 1)
        last = min(last, size_bytes - 1)
        ranged = exchange.request.range is not None
        headers = [("ETag", '"a-file"'), ("Content-Length", str(last - first + 1))]
        headers += [("Content-Range", f"bytes {first}-{last}/{size_bytes}")] if ranged else []
        exchange.send_head(Answer(206 if ranged else 200, headers, b""))
        if exchange.request.method != "HEAD":
            with path.open("rb") as file:
                file.seek(first)
                exchange.send_body(file.read(last - first + 1))

    return fault


def _send_part(exchange: Exchange, size_bytes: int) -> None:
    answer = exchange.upstream()
    exchange.send_head(answer)
    exchange.send_body(answer.body[:size_bytes])


def flipped(at: int) -> Fault:
    """One bit of that byte of the object is another, and everything else is right."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.upstream()
        start, last = exchange.request.range or (0, -1)
        if start <= at <= last and exchange.request.method == "GET":
            body = bytearray(answer.body)
            body[at - start] ^= 1
            answer = replace(answer, body=bytes(body))
        exchange.send(answer)

    return fault


def with_headers(*headers: tuple[str, str]) -> Fault:
    """The true answer with these headers, or without those that are empty."""

    def fault(exchange: Exchange) -> None:
        answer = exchange.upstream()
        for name, value in headers:
            answer = answer.with_header(name, value)
        kept = [pair for pair in answer.headers if pair[1] or pair[0] not in dict(headers)]
        exchange.send(replace(answer, headers=kept))

    return fault
