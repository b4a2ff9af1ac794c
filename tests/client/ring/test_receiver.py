"""The messages of a call, as another thread receives them."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from penstock.client.ring.receiver import AHEAD, Receiver
from penstock.v1 import streamer_pb2 as pb

PATIENCE_SECONDS = 60.0


def message(number: int) -> pb.LoadResponse:
    return pb.LoadResponse(manifest=pb.Manifest(tensor_count=number))


def started(call: Iterator[pb.LoadResponse]) -> Receiver:
    receiver = Receiver()
    receiver.start(lambda: call)
    return receiver


def test_messages_come_in_order_and_the_end_again_and_again() -> None:
    receiver = started(message(number) for number in range(3 * AHEAD))
    for number in range(3 * AHEAD):
        assert receiver.next() == message(number)
    assert receiver.next() is None
    assert receiver.next() is None


def test_an_error_comes_after_the_messages_before_it_and_again() -> None:
    def call() -> Iterator[pb.LoadResponse]:
        yield message(1)
        raise ValueError("broken")

    receiver = started(call())
    assert receiver.next() == message(1)
    for _ in range(2):
        with pytest.raises(ValueError, match="broken"):
            receiver.next()


def test_a_call_that_does_not_begin_raises_what_it_met() -> None:
    def begin() -> Iterator[pb.LoadResponse]:
        raise ConnectionError("nobody there")

    receiver = Receiver()
    receiver.start(begin)
    with pytest.raises(ConnectionError, match="nobody there"):
        receiver.next()


def test_a_few_messages_are_received_ahead_until_it_is_stopped() -> None:
    sent: list[int] = []
    enough, over = threading.Event(), threading.Event()

    def call() -> Iterator[pb.LoadResponse]:
        for number in range(2 * AHEAD):
            sent.append(number)
            if len(sent) > AHEAD:
                enough.set()
            yield message(number)
        over.set()

    receiver = started(call())
    assert enough.wait(PATIENCE_SECONDS)
    assert not over.is_set()
    assert len(sent) == AHEAD + 1
    receiver.stop()
    assert over.wait(PATIENCE_SECONDS)


def test_an_error_keeps_nothing_of_the_call_alive() -> None:
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)

    def begin(held: Held = held) -> Iterator[pb.LoadResponse]:
        raise ValueError("broken")

    receiver = Receiver()
    receiver.start(begin)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="broken") as raised:
            receiver.next()
        del begin, held, raised, receiver
        deadline = time.monotonic() + PATIENCE_SECONDS
        while gone() is not None:  # until the thread has ended
            assert time.monotonic() < deadline
            time.sleep(0.001)
    finally:
        gc.enable()
