"""What is asked for again, from which byte, how often, and when it is given up."""

from __future__ import annotations

import pytest

from penstock.server.errors import (
    SourceUnavailableError,
)
from penstock.server.sources import RetryLater
from penstock.server.sources.objects import faults
from penstock.server.sources.objects.service import Answer
from penstock.server.sources.s3 import answers

from ...objects import ObjectServer
from ...support import ROOT
from ..hooks import (
    CONTENT,
    TRANSIENT,
    Sources,
    always,
    cut,
    once,
    read,
)


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


def test_an_answer_says_how_long_to_wait_within_bounds() -> None:
    def asked_for(value: str) -> float:
        return answers.Said.of(Answer(503, {"retry-after": value}, b"")).retry_after_seconds

    assert asked_for("7") == 7
    assert asked_for("86400") == asked_for("9" * 400) == faults.LONGEST_RETRY_AFTER_SECONDS
    assert asked_for("Fri, 31 Dec 9999 23:59:59 GMT") == faults.LONGEST_RETRY_AFTER_SECONDS
    for nonsense in ("", "soon", "-5", "Thu, 01 Jan 1970 00:00:00 GMT"):
        assert asked_for(nonsense) == 0
