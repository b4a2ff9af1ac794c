from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch

from penstock.client.cuda.pinned import PinnedRing, RingClosedError

from ..fake_device import FakeDevice


def send(device: FakeDevice, ring: PinnedRing, target: torch.Tensor, value: int) -> torch.Tensor:
    """Fills a buffer, starts its copy, gives it back."""
    buffer = ring.take()
    buffer.fill_(value)
    device.copy([(target, buffer)])
    ring.put(buffer, device.record())
    return buffer


def test_a_buffer_is_not_used_again_before_the_device_has_read_it() -> None:
    device = FakeDevice()
    ring = PinnedRing(device, buffer_bytes=4096, count=2)
    targets = [device.allocate(4096) for _ in range(7)]
    for value, target in enumerate(targets):
        send(device, ring, target, value)
    device.settle()
    assert [set(device.read(target)) for target in targets] == [{value} for value in range(7)]
    assert device.peak_pinned_bytes == 8192
    ring.close()
    assert device.pinned_bytes == 0


def test_what_the_device_has_read_is_used_before_more_is_pinned() -> None:
    device = FakeDevice(laziness="eager")
    ring = PinnedRing(device, buffer_bytes=4096, count=8)
    target = device.allocate(4096)
    for value in range(5):
        send(device, ring, target, value)
    assert device.peak_pinned_bytes == 4096
    ring.close()


def test_whoever_finds_all_buffers_taken_waits_for_one() -> None:
    device = FakeDevice()
    ring = PinnedRing(device, buffer_bytes=4096, count=1)
    buffer = ring.take()
    got: list[torch.Tensor] = []
    taker = threading.Thread(target=lambda: got.append(ring.take()))
    taker.start()
    ring.put(buffer, None)
    taker.join(60)
    assert got[0] is buffer
    ring.put(buffer, None)
    ring.close()


def test_closing_wakes_who_waits_and_unpins_what_is_taken_when_it_comes_back() -> None:
    device = FakeDevice()
    ring = PinnedRing(device, buffer_bytes=4096, count=1)
    buffer = ring.take()
    outcome: list[type[BaseException]] = []

    def take() -> None:
        try:
            ring.take()
        except RingClosedError as error:
            outcome.append(type(error))

    taker = threading.Thread(target=take)
    taker.start()
    ring.close()
    ring.close()
    taker.join(60)
    assert outcome == [RingClosedError]
    assert device.pinned_bytes == 4096
    device.copy([(device.allocate(4096), buffer)])
    ring.put(buffer, device.record())
    assert device.pinned_bytes == 0
    assert device.violations == []


def test_closing_lets_copies_that_are_under_way_end_first() -> None:
    device = FakeDevice()
    ring = PinnedRing(device, buffer_bytes=4096, count=4)
    target = device.allocate(4096)
    send(device, ring, target, 7)
    ring.close()
    assert device.violations == []
    assert device.read(target) == b"\7" * 4096


def test_a_buffer_whose_event_fails_is_not_lost() -> None:
    class Broken:
        def query(self) -> bool:
            return False

        def synchronize(self) -> None:
            raise RuntimeError("the device fell off the bus")

    device = FakeDevice()
    ring = PinnedRing(device, buffer_bytes=4096, count=1)
    ring.put(ring.take(), Broken())
    with pytest.raises(RuntimeError, match="off the bus"):
        ring.take()
    ring.close()
    assert device.pinned_bytes == 0


def test_a_device_that_cannot_pin_says_so() -> None:
    ring = PinnedRing(FakeDevice(on_pin=refuse(RuntimeError("no memory"))), buffer_bytes=4096, count=1)
    with pytest.raises(RuntimeError, match="no memory"):
        ring.take()
    ring.close()


def refuse(error: Exception) -> Callable[[], None]:
    def raise_() -> None:
        raise error

    return raise_
