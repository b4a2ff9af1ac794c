"""Objects in ranges: what is asked for, over which connections, and on what condition."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from penstock.server.errors import (
    CheckpointChangedError,
    SourceUnavailableError,
)
from penstock.server.sources import TELL_BYTES, RetryingReader, RetryLater
from penstock.server.sources.objects.object import FIRST_BYTES

from ...objects import Asked, ObjectServer
from ...support import ROOT
from ..hooks import (
    CONTENT,
    Sources,
    once,
    read,
)


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


def test_connections_are_kept(server: ObjectServer, sources: Sources) -> None:
    server.put("k", CONTENT)
    file = sources().open("s3://bucket/k", ROOT)
    for start in range(0, 50_000, 10_000):
        read(file, start, start + 10_000)
    assert len({asked.handler.client_address for asked in server.asked}) == 1


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


def test_an_empty_object_has_no_bytes(server: ObjectServer, sources: Sources) -> None:
    server.put("k", b"")
    file = sources().open("s3://bucket/k", ROOT)
    assert file.size_bytes == 0
    RetryingReader(file).read_into(0, [])


def test_of_what_is_fetched_the_first_answer_has_the_first_bytes_each_time(
    server: ObjectServer, sources: Sources
) -> None:
    """A round trip less than for a file whose header may be kept."""
    server.put("a", b"x" * 1000)
    source = sources()
    for _ in range(2):
        with contextlib.closing(source.open("s3://bucket/a", replace(ROOT, for_fetch=True))) as file:
            assert read(file, 0, 1000) == b"x" * 1000
    assert [asked.method for asked in server.asked] == ["GET", "GET"]


def test_what_has_come_is_told_while_the_rest_still_comes(server: ObjectServer, sources: Sources) -> None:
    content = random.Random(6).randbytes(3 * TELL_BYTES + 1000)
    server.put("k", content)
    file = sources().open("s3://bucket/k", ROOT)
    buffer = memoryview(bytearray(len(content) - FIRST_BYTES))
    told: list[int] = []

    def tell(reached: int) -> None:
        assert buffer[: reached - FIRST_BYTES] == content[FIRST_BYTES:reached]
        told.append(reached)

    file.read_and_tell(FIRST_BYTES, [buffer[:5000], buffer[5000:]], tell)
    assert buffer == content[FIRST_BYTES:]
    assert told == sorted(told)
    assert len(told) >= 2
    for before, after in pairwise([FIRST_BYTES, *told]):
        assert after - before >= TELL_BYTES


def test_nothing_is_told_beyond_where_a_read_goes_on(server: ObjectServer, sources: Sources) -> None:
    content = random.Random(7).randbytes(3 * TELL_BYTES)
    server.put("k", content)
    file = sources().open("s3://bucket/k", ROOT)
    sent = FIRST_BYTES + TELL_BYTES + 100_000

    def cut(asked: Asked) -> None:
        asked.handler.close_connection = True
        whole = len(content) - FIRST_BYTES
        about = {"Content-Length": str(whole), "ETag": server.etags["k"]}
        about["Content_Range"] = f"bytes {FIRST_BYTES}-{len(content) - 1}/{len(content)}"
        asked.answer(206, content[FIRST_BYTES:sent], **about)

    server.hooks.append(once(cut))
    told: list[int] = []
    buffer = memoryview(bytearray(len(content) - FIRST_BYTES))
    with pytest.raises(RetryLater) as later:
        file.read_and_tell(FIRST_BYTES, [buffer], told.append)
    assert told
    assert told[-1] <= later.value.reached == sent
