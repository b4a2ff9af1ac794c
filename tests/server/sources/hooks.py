"""How a store of objects answers otherwise than it should: hooks for `ObjectServer`, and what they serve."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Callable
from urllib.parse import parse_qsl, quote, urlsplit
from xml.sax.saxutils import escape

from penstock.server.sources import RetryingReader
from penstock.server.sources.objects import ObjectFile
from penstock.server.sources.objects.object import FIRST_BYTES
from penstock.server.sources.s3.location import Location
from penstock.server.sources.s3.source import S3Source

from ..objects import Asked

S3File = ObjectFile[Location]
Sources = Callable[..., S3Source]

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


def read(file: S3File, start: int, end: int) -> bytes:
    buffer = bytearray(end - start)
    half = len(buffer) // 2
    RetryingReader(file).read_into(start, [memoryview(buffer)[:half], memoryview(buffer)[half:]])
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


def no_http(asked: Asked) -> None:
    asked.handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")
    asked.handler.close_connection = True


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
FRAMES = ["Content-Length", "chunked", "until it closes"]


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


def query_of(asked: Asked) -> dict[str, str]:
    return dict(parse_qsl(urlsplit(asked.target).query, keep_blank_values=True))


def lists(
    directory: str, *keys: str, token: str = "", after: str = "", about: str = "<Size>1</Size>"
) -> Callable[[Asked], bool]:
    """Answers what asks for that directory, from the page `token` on; `after` is the one that follows, and
    `about` stands beside each key."""

    def hook(asked: Asked) -> bool:
        query = query_of(asked)
        if query.get("prefix") != directory or query.get("continuation-token", "") != token:
            return False
        contents = "".join(f"<Contents><Key>{quote(key)}</Key>{about}</Contents>" for key in keys)
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


def page(*keys: str, more: str = "") -> bytes:
    contents = "".join(f"<Contents><Key>{key}</Key></Contents>" for key in keys)
    name = "<Name>b</Name><IsTruncated>false</IsTruncated>"
    return f"<ListBucketResult>{name}{more}{contents}</ListBucketResult>".encode()
