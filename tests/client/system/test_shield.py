"""Work that an exception of a signal handler does not break off."""

from __future__ import annotations

import contextvars
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import pytest

from penstock.client.system import shield

PATIENCE_SECONDS = 60.0


class Interruption(BaseException):
    pass


@pytest.fixture(autouse=True)
def interrupted() -> Iterator[threading.Event]:
    """Set when a signal handler has raised, which it does once."""
    interrupted = threading.Event()

    def interrupt(*_: object) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise Interruption

    before = signal.signal(signal.SIGUSR1, interrupt)
    yield interrupted
    signal.signal(signal.SIGUSR1, before)


def interrupt(interrupted: threading.Event) -> None:
    """The handler runs on the main thread. A signal that comes right before a wait begins does not end it."""
    while not interrupted.wait(0.01):
        os.kill(os.getpid(), signal.SIGUSR1)


@pytest.mark.parametrize("run", [shield.shielded, shield.end])
def test_work_of_the_main_thread_runs_on_another_and_that_of_others_stays(run: object) -> None:
    ran_on: list[int] = []

    def work() -> None:
        ran_on.append(threading.get_ident())

    run(work)  # type: ignore[operator]
    with ThreadPoolExecutor(1) as other:
        other.submit(run, work).result()  # type: ignore[arg-type]
        there = other.submit(threading.get_ident).result()
    assert ran_on[0] != threading.main_thread().ident
    assert ran_on[1] == there


def test_results_errors_and_context_are_those_of_the_work() -> None:
    variable = contextvars.ContextVar("variable", default="")
    variable.set("of the caller")
    assert shield.shielded(variable.get) == "of the caller"

    def fail() -> NoReturn:
        raise KeyError("wrong")

    for run in (shield.shielded, shield.end):
        with pytest.raises(KeyError, match="wrong"):
            run(fail)


def test_an_interruption_is_raised_at_once_and_the_work_goes_on(interrupted: threading.Event) -> None:
    go, over = threading.Event(), threading.Event()

    def work() -> None:
        interrupt(interrupted)
        go.wait(PATIENCE_SECONDS)
        over.set()

    with pytest.raises(Interruption):
        shield.shielded(work)
    assert not over.is_set()
    go.set()
    assert over.wait(PATIENCE_SECONDS)


def test_work_that_can_be_aborted_has_ended_when_the_interruption_is_raised(
    interrupted: threading.Event,
) -> None:
    aborted, over = threading.Event(), threading.Event()

    def work() -> None:
        interrupt(interrupted)
        aborted.wait(PATIENCE_SECONDS)
        over.set()

    def abort() -> bool:
        aborted.set()
        return True

    with pytest.raises(Interruption):
        shield.shielded(work, abort=abort)
    assert over.is_set()


def test_an_end_that_does_not_come_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shield, "END_SECONDS", 0.01)
    go = threading.Event()

    def work() -> None:
        go.wait(PATIENCE_SECONDS)

    assert not shield.end(work)
    go.set()


def test_work_is_done_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    assert shield.shielded(lambda: 1) == 1
    try:
        raise KeyError
    except KeyError:  # as where something is closed after an error
        assert shield.end(lambda: done.append(2))
    assert done == [2]


def test_an_interruption_that_breaks_the_start_of_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(self: threading.Thread) -> NoReturn:
        try:
            raise Interruption
        finally:
            threading.RLock().release()  # raises RuntimeError

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(Interruption):
        shield.shielded(lambda: None)
    with pytest.raises(Interruption):
        shield.end(lambda: None)
