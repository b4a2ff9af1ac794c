"""Lists of names in parts that fit into messages."""

from __future__ import annotations

import pytest

from penstock.client.ring.name_parts import parts
from penstock.v1 import streamer_pb2 as pb

NAMES = [f"model.layers.{number:06d}." + "w" * 90 for number in range(5000)]


@pytest.mark.parametrize("limit_bytes", [1 << 20, 20_000])
def test_parts_fit_into_messages_and_lose_nothing(limit_bytes: int) -> None:
    given = [*NAMES, "\U0001f600" * 100, ""]
    found = list(parts(given, limit_bytes))
    assert [name for part in found for name in part] == given
    for part in found:
        request = pb.LoadRequest(select=pb.SelectTensors(names=part, more=True))
        assert request.ByteSize() < limit_bytes
    assert list(parts([], limit_bytes)) == [[]]


def test_a_daemon_that_takes_no_parts_gets_one_message() -> None:
    assert list(parts(NAMES, 0)) == [NAMES]
