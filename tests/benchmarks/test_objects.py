"""The answers of the servers of objects for benchmarks."""

from __future__ import annotations

import pytest

from benchmarks import objects


@pytest.mark.parametrize(
    ("method", "headers", "head", "part"),
    [
        ("GET", {"range": "bytes=2-4"}, ["206 Partial Content", "Content-Range: bytes 2-4/10"], (2, 5)),
        ("GET", {"range": "bytes=8-99"}, ["206 Partial Content", "Content-Range: bytes 8-9/10"], (8, 10)),
        ("GET", {}, ["200 OK", "Content-Length: 10"], (0, 10)),
        ("HEAD", {}, ["200 OK", "Content-Length: 10"], (0, 0)),
        ("GET", {"range": "bytes=2-4", "if-match": '"other"'}, ["412 Precondition Failed"], (2, 2)),
        ("GET", {"range": "bytes=2-4", "if-match": '"e"'}, ["206 Partial Content"], (2, 5)),
    ],
)
def test_a_server_of_objects_answers_with_the_range_of_the_version_that_was_asked_for(
    method: str, headers: dict[str, str], head: list[str], part: tuple[int, int]
) -> None:
    answer = objects.answer(method, headers, 10, '"e"')
    assert all(line in answer.head.decode() for line in [*head, 'ETag: "e"'])
    assert (answer.start, answer.end) == part
    assert answer.head.decode().startswith(f"HTTP/1.1 {answer.status} ")
