"""A flag that is set once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from penstock.client.system.latch import Latch


def test_it_is_set_once_and_stays_so() -> None:
    latch = Latch()
    assert not latch.is_set()
    assert not latch.wait(0)
    for _ in range(2):
        latch.set()
        assert latch.is_set()
        assert latch.wait()
        assert latch.wait(0)


def test_all_who_wait_go_on() -> None:
    latch = Latch()
    with ThreadPoolExecutor(3) as threads:
        waits = [threads.submit(latch.wait) for _ in range(3)]
        waits.append(threads.submit(latch.wait, 60.0))
        assert not any(wait.done() for wait in waits)
        latch.set()
        assert all(wait.result() for wait in waits)
