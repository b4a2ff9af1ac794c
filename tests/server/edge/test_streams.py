"""Messages of one request, found in its frames and charged to its user."""

from __future__ import annotations

import pytest

from penstock.server.edge.streams import STREAM_BYTES, UNAPPROVED_MESSAGE_BYTES, RequestStream
from penstock.server.system.quota import Quota

from ...attacks.http2 import grpc_message

MIB = 1 << 20


@pytest.mark.parametrize("size", [1, 3, 5, 6, 4096])
def test_messages_are_admitted_whole_however_they_are_cut(size: int) -> None:
    memory = Quota(8 * MIB)
    stream = RequestStream(0, memory, lambda: None, lambda: None)
    assert memory.take(0, STREAM_BYTES)
    said = grpc_message(b"") + grpc_message(b"abc") + grpc_message(bytes(UNAPPROVED_MESSAGE_BYTES))
    for at in range(0, len(said), size):
        part = said[at : at + size]
        assert stream.accept(part) == len(part)
    assert stream.messages == 3
    stream.end()
    assert memory.used == 0
