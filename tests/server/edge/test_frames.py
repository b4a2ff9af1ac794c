"""Frames of HTTP/2, found in a stream of bytes."""

from __future__ import annotations

import pytest

from penstock.server.edge.frames import EndedStreams

from ...attacks.http2 import Flag, Kind, frame, ping, reset, settings


@pytest.mark.parametrize("size", [1, 2, 3, 7, 9, 10, 1000])
def test_ended_streams_are_found_wherever_the_bytes_are_cut(size: int) -> None:
    said = (
        settings({1: 2})
        + frame(Kind.HEADERS, Flag.END_HEADERS, 1, b"x" * 20)
        + frame(Kind.DATA, 0, 1, b"y" * 100)
        + frame(Kind.HEADERS, Flag.END_HEADERS | Flag.END_STREAM, 1, b"x" * 300)
        + frame(Kind.DATA, Flag.END_STREAM, 3, b"")
        + ping()
        + reset(5)
    )
    found = EndedStreams()
    ended = [number for at in range(0, len(said), size) for number in found.feed(said[at : at + size])]
    assert ended == [1, 3, 5]
    assert found.between_frames
