"""How long the interpreter lock is held, as seen from outside, and what follows from it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest

from benchmarks import gil, interpreter_lock
from benchmarks.gil import Readers, Staged
from benchmarks.interpreter_lock import Child, Sampler, Watch


@pytest.fixture(scope="module")
def place() -> interpreter_lock.Place:
    return interpreter_lock.find()


@pytest.fixture
def child() -> Iterator[Child]:
    with closing(Child()) as child:
        yield child


def test_the_lock_of_another_process_is_seen_when_it_is_held_and_when_it_is_not(
    place: interpreter_lock.Place, child: Child
) -> None:
    with closing(Watch(child.pid, place)) as watch:
        for held in (False, True, True, False, True, False, False):
            child.hold(held)
            assert watch.is_held() == held


def test_a_share_is_that_of_all_watched_processes(place: interpreter_lock.Place, child: Child) -> None:
    with ExitStack() as stack:
        other = stack.enter_context(closing(Child()))
        watches = [stack.enter_context(closing(Watch(each.pid, place))) for each in (child, other)]
        for held, share in (((False, False), 0), ((True, False), 0.5), ((True, True), 1)):
            for each, holds in zip((child, other), held, strict=True):
                each.hold(holds)
            with Sampler(watches) as sampler:
                pass
            assert sampler.count > 0
            assert sampler.share == share


@pytest.mark.parametrize(
    ("lock_seconds", "cpu_seconds", "said"),
    [
        (0.02, 0.4, ("the cores: 16 of them read 40.0 GB/s", "the lock allows 50.0")),
        (
            0.2,
            1.6,
            ("the lock, at 5.0 GB/s", "16 cores could read 10.0", "8.0 of them keep", "2 processes"),
        ),
        (0.3, 1.6, ("the lock, at 3.3 GB/s", "5.3 of them keep", "3 processes")),
    ],
)
def test_the_limit_is_the_lock_or_the_cores_whichever_allows_less(
    lock_seconds: float, cpu_seconds: float, said: tuple[str, ...]
) -> None:
    text = gil.ceiling(lock_seconds, cpu_seconds, 16)
    assert [part for part in said if part not in text] == []


def test_conclusions_compare_daemons_with_one_that_has_all_their_threads() -> None:
    def measured(lock_seconds_a_gb: float, pair: float) -> gil.Rounds:
        def staged(daemons: int, seconds: float) -> list[Staged]:
            size_bytes = daemons * 10**9
            lock_seconds = lock_seconds_a_gb * daemons
            return [Staged(size_bytes, seconds, lock_seconds / seconds, lock_seconds, daemons * 1.0)]

        return {Readers(1, 2): staged(1, 1.0), Readers(1, 8): staged(1, 1.0), Readers(2, 4): staged(2, pair)}

    lines = gil.conclusions({"HTTP": measured(0.02, 2.0), "HTTPS": measured(0.12, 1.0)}, 16)
    assert "- HTTP, by the row of 1 daemon, 2 threads: the limit is the cores" in "\n".join(lines)
    assert "- HTTPS, by the row of 1 daemon, 8 threads: the limit is the lock, at 8.3 GB/s" in "\n".join(
        lines
    )
    assert [line for line in lines if "2 daemons, 4 threads each, read at 1.00 times" in line]
    assert [line for line in lines if "2 daemons, 4 threads each, read at 2.00 times" in line]
    assert [line for line in lines if "1 daemon, 8 threads: for each record of 16 KiB, HTTPS holds" in line]
    assert [line for line in lines if "the lock 1.6 µs longer" in line]
