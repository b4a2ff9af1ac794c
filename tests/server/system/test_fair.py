"""Threads that serve users in turn, however many calls one of them queues."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

import pytest

from penstock.server.sources.file.store import HEADER_READERS as FILE_READERS
from penstock.server.sources.file.store import RESOLVERS as FILE_RESOLVERS
from penstock.server.sources.objects.store import HEADER_READERS as OBJECT_READERS
from penstock.server.sources.objects.store import RESOLVERS as OBJECT_RESOLVERS
from penstock.server.sources.resolvers import MIXED_RESOLVERS
from penstock.server.system.fair import FIRST_CALLS, FairExecutor

from ..support import until_true

GREEDY, SECOND, MODEST = 70001, 70002, 70003
PATIENCE_SECONDS = 60


@pytest.fixture
def executor() -> Iterator[FairExecutor]:
    made = FairExecutor(4, "test")
    yield made
    made.shutdown()


def test_it_gives_back_what_calls_return_and_raise(executor: FairExecutor) -> None:
    def fails() -> None:
        raise LookupError("no such thing")

    assert executor.submit(GREEDY, divmod, 7, 2).result(PATIENCE_SECONDS) == (3, 1)
    with pytest.raises(LookupError, match="no such thing"):
        executor.of(MODEST).submit(fails).result(PATIENCE_SECONDS)


def test_calls_of_one_user_that_hang_leave_threads_to_others_and_one_to_root(executor: FairExecutor) -> None:
    hung = threading.Event()
    try:
        for uid in (GREEDY, SECOND):
            for _ in range(50):
                executor.submit(uid, hung.wait, PATIENCE_SECONDS)
        assert executor.submit(0, str, "root").result(PATIENCE_SECONDS) == "root"
    finally:
        hung.set()


@pytest.mark.parametrize(
    "count", [FILE_READERS, FILE_RESOLVERS, OBJECT_READERS, OBJECT_RESOLVERS, MIXED_RESOLVERS]
)
def test_whatever_seven_users_have_waiting_for_storage_an_eighth_finds_a_thread(count: int) -> None:
    executor, hung = FairExecutor(count, "test", first_calls=FIRST_CALLS), threading.Event()
    try:
        for uid in range(70001, 70008):
            for _ in range(count):
                executor.submit(uid, hung.wait)
            # Each takes all that it can get before the next one comes.
            until_true(lambda: not executor._quota.left(uid))  # noqa: B023
        assert executor.submit(70008, str, "served").result(PATIENCE_SECONDS) == "served"
        assert executor.submit(0, str, "root").result(PATIENCE_SECONDS) == "root"
    finally:
        hung.set()
        executor.shutdown()


def test_a_user_s_first_call_does_not_wait_for_all_that_others_have_queued() -> None:
    executor = FairExecutor(1, "test")
    order: list[int] = []
    begun, go_on = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        go_on.wait(PATIENCE_SECONDS)

    try:
        calls: list[Future[None]] = [executor.submit(GREEDY, first)]
        assert begun.wait(PATIENCE_SECONDS)
        calls += [executor.submit(uid, order.append, uid) for uid in (GREEDY, SECOND) for _ in range(20)]
        calls.append(executor.submit(MODEST, order.append, MODEST))
        go_on.set()
        for call in calls:
            call.result(PATIENCE_SECONDS)
        assert order.index(MODEST) <= 2
        assert len(order) == 41
    finally:
        go_on.set()
        executor.shutdown()


def test_as_many_calls_as_there_are_threads_run_at_once(executor: FairExecutor) -> None:
    together = threading.Barrier(4)
    calls = [executor.submit(0, together.wait, PATIENCE_SECONDS) for _ in range(4)]
    assert sorted(call.result(PATIENCE_SECONDS) for call in calls) == [0, 1, 2, 3]


def test_a_call_that_waits_can_be_cancelled_and_shutdown_cancels_the_rest() -> None:
    executor = FairExecutor(1, "test")
    hung, begun = threading.Event(), threading.Event()

    def hang() -> None:
        begun.set()
        hung.wait(PATIENCE_SECONDS)

    try:
        running = executor.submit(GREEDY, hang)
        assert begun.wait(PATIENCE_SECONDS)
        cancelled, waiting = executor.submit(GREEDY, int), executor.submit(MODEST, int)
        assert cancelled.cancel()
        executor.shutdown()
        with pytest.raises(CancelledError):
            waiting.result(PATIENCE_SECONDS)
        with pytest.raises(RuntimeError, match="stopped"):
            executor.submit(GREEDY, int)
    finally:
        hung.set()
    running.result(PATIENCE_SECONDS)


def test_no_thread_at_all_is_an_error_and_fewer_than_wanted_is_not(
    executor: FairExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        with pytest.raises(RuntimeError, match="new thread"):
            executor.submit(GREEDY, int)
    assert executor.submit(GREEDY, int).result(PATIENCE_SECONDS) == 0
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", no_thread)
        calls = [executor.submit(GREEDY, int) for _ in range(8)]
        assert [call.result(PATIENCE_SECONDS) for call in calls] == [0] * 8


def test_nothing_of_a_call_is_kept_once_it_ended(executor: FairExecutor) -> None:
    class Argument:
        pass

    def fails(_: Argument) -> None:
        raise LookupError

    gc.disable()
    try:
        argument = Argument()
        gone = weakref.ref(argument)
        future = executor.submit(GREEDY, fails, argument)
        assert isinstance(future.exception(PATIENCE_SECONDS), LookupError)
        del future, argument
        until_true(lambda: gone() is None)  # the thread lets go of it a moment after the future is done
    finally:
        gc.enable()
