"""Answers that trickle: each byte comes in time, and the whole never."""

from __future__ import annotations

import contextlib
import time

import pytest

from penstock.server.errors import (
    SourceUnavailableError,
)
from penstock.server.sources.objects.object import FIRST_BYTES

from ...objects import Asked, ObjectServer
from ...support import ROOT
from ..hooks import (
    CONTENT,
    FRAMES,
    Sources,
    always,
    lists,
    once,
    read,
    trickle,
    trickle_body,
)


@pytest.mark.usefixtures("a_second_for_each_read")
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


@pytest.mark.usefixtures("a_second_for_each_read")
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


@pytest.mark.usefixtures("a_second_for_each_read")
def test_a_store_that_only_trickles_is_given_up(
    server: ObjectServer, sources: Sources, retried: list[str]
) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    server.hooks.append(always(trickle))
    with pytest.raises(SourceUnavailableError, match=r"3 times in a row.*too slowly.*--object-timeout"):
        read(file, FIRST_BYTES, len(CONTENT))
    assert retried == ["timeout", "timeout"]


@pytest.mark.usefixtures("a_second_for_each_read")
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
