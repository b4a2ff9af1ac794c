"""Which frames of a client pass, without any socket."""

from __future__ import annotations

import pytest

from penstock.server.edge.allowance import Allowance
from penstock.server.edge.frame_filter import STREAM, STREAM_HEADER, TURN, WORK, FrameFilter, Violation
from penstock.server.edge.frames import literal_field
from penstock.server.edge.streams import STREAM_BYTES, RequestStream
from penstock.server.system.quota import Quota

from ...attacks.http2 import (
    PREFACE,
    Flag,
    Kind,
    call_fields,
    frame,
    grpc_message,
    parse_frames,
    reset,
    settings,
)

UID = 1201
HELLO = PREFACE + settings({})
CALL = frame(Kind.HEADERS, Flag.END_HEADERS, 1, call_fields("/a/b"))
MESSAGE = frame(Kind.DATA, Flag.END_STREAM, 1, grpc_message(b"question"))


class Owner:
    """A connection with a filter, and what passed it."""

    def __init__(self, *, memory_bytes: int = 1 << 20, burst: float = 1000.0) -> None:
        self.memory = Quota(memory_bytes)
        self.work = Allowance(10.0, burst, 0.0)
        self.filter = FrameFilter(UID, self.memory, self.work, 0.0)
        self.passed: list[bytes] = []
        self.turn = True
        self.streams: list[RequestStream] = []

    def may_open(self) -> bool:
        return self.turn

    def open_stream(self) -> RequestStream:
        self.streams.append(RequestStream(UID, self.memory, lambda: None, lambda: None))
        return self.streams[-1]

    def end_stream(self, number: int) -> None:
        self.filter.streams.pop(number).end()

    def say(self, data: bytes, now: float = 0.0) -> str | None:
        """What the next frame waits for."""
        self.filter.held += data
        waits = self.filter.take(self, self.passed, now)
        self.filter.charge()
        return None if waits is None else waits[0]

    def kinds(self) -> list[int]:
        return [each.kind for each in parse_frames(b"".join(self.passed))]


@pytest.mark.parametrize("size", [1, 2, 8, 9, 10, 1000])
def test_the_same_frames_pass_however_the_bytes_are_cut(size: int) -> None:
    owner, said = Owner(), HELLO + CALL + MESSAGE + HELLO[len(PREFACE) :]
    for at in range(0, len(said), size):
        assert owner.say(said[at : at + size]) is None
    passed = parse_frames(b"".join(owner.passed))
    assert [each.kind for each in passed] == [Kind.SETTINGS, Kind.HEADERS, Kind.DATA, Kind.SETTINGS]
    key = owner.streams[0].key
    assert passed[1].payload == call_fields("/a/b") + literal_field(STREAM_HEADER, key.encode())
    assert passed[2].payload == grpc_message(b"question")
    assert not owner.filter.held


def test_a_call_and_all_behind_it_wait_for_its_turn() -> None:
    owner = Owner()
    owner.turn = False
    assert owner.say(HELLO + CALL + MESSAGE) == TURN
    assert owner.kinds() == [Kind.SETTINGS]
    owner.turn = True
    assert owner.say(b"") is None
    assert owner.kinds() == [Kind.SETTINGS, Kind.HEADERS, Kind.DATA]


def test_a_reset_waits_until_its_call_was_taken() -> None:
    owner = Owner()
    assert owner.say(HELLO + CALL + reset(1)) == STREAM
    assert owner.kinds() == [Kind.SETTINGS, Kind.HEADERS]
    owner.streams[0].take_up()
    assert owner.say(b"") is None
    assert owner.kinds() == [Kind.SETTINGS, Kind.HEADERS, Kind.RST_STREAM]
    assert owner.streams[0].ended


def test_work_beyond_the_allowance_waits_until_it_is_refilled() -> None:
    owner = Owner(burst=1.0)
    assert owner.say(HELLO + CALL + MESSAGE) == WORK
    assert owner.kinds() == [Kind.SETTINGS, Kind.HEADERS]
    assert owner.say(b"", now=60.0) is None
    assert owner.kinds() == [Kind.SETTINGS, Kind.HEADERS, Kind.DATA]


def test_held_bytes_are_charged_until_they_pass_or_are_dropped() -> None:
    owner = Owner()
    owner.say(HELLO + CALL[:-1])
    assert owner.memory.used_by(UID) == len(CALL) - 1
    owner.say(CALL[-1:])
    assert owner.memory.used_by(UID) == STREAM_BYTES
    owner.say(MESSAGE[:-1])
    assert owner.memory.used_by(UID) == STREAM_BYTES + len(MESSAGE) - 1
    owner.filter.clear()
    assert owner.memory.used_by(UID) == STREAM_BYTES


def test_bytes_for_which_there_is_no_memory_end_the_connection() -> None:
    owner = Owner(memory_bytes=64)
    with pytest.raises(Violation) as broken:
        owner.say(HELLO + CALL[:9] + bytes(60))
    assert broken.value.reason == "memory"
