"""The threads that wait for the disk: several calls at once, some of which fail or hang."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from penstock.server.tier.threads import READERS, DiskThreads, Ticket, UnavailableError


@pytest.fixture
def threads(request: pytest.FixtureRequest) -> Iterator[DiskThreads]:
    threads = DiskThreads(hang_seconds=getattr(request, "param", 60))
    yield threads
    threads.shutdown()


def gives(value: int) -> Callable[[Ticket], int]:
    return lambda ticket: value


def raises(error: Exception) -> Callable[[Ticket], int]:
    def work(ticket: Ticket) -> int:
        raise error

    return work


def test_calls_give_their_results_in_order_up_to_the_first_that_fails(threads: DiskThreads) -> None:
    works = [gives(number) for number in range(2 * READERS)]
    assert threads.calls(0, works) == list(range(2 * READERS))
    failing = [gives(1), raises(OSError("rot")), gives(3), raises(ValueError())]
    assert threads.calls(0, failing) == [1]


def test_calls_raise_what_the_first_raised(threads: DiskThreads) -> None:
    with pytest.raises(RuntimeError, match="it broke"):
        threads.calls(0, [raises(RuntimeError("it broke")), gives(2)])


@pytest.mark.parametrize("threads", [0.2], indirect=True)
def test_of_calls_of_which_one_hangs_none_touches_memory_afterwards(threads: DiskThreads) -> None:
    """They end as one: whoever asked has the memory back."""
    answers, touched, ended = threading.Event(), list[str](), threading.Semaphore(0)

    def hangs(ticket: Ticket) -> int:
        assert answers.wait(60)
        ticket.held(lambda: touched.append("late"))
        ended.release()
        return 1

    def quick(ticket: Ticket) -> int:
        ticket.held(lambda: touched.append("in time"))
        ended.release()
        return 1

    with pytest.raises(UnavailableError):
        threads.calls(0, [quick, hangs, hangs])
    before = list(touched)
    assert ended.acquire(timeout=60)
    with pytest.raises(UnavailableError):
        threads.calls(0, [quick])
    answers.set()
    for _ in range(2):
        assert ended.acquire(timeout=60)
    assert touched == before
