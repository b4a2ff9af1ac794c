"""The reader pool with real threads. Reads wait on events that the tests set, never on the clock."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from queue import Queue
from types import SimpleNamespace

import pytest

from penstock.server.sources import RetryLater
from penstock.server.staging.reading import reader
from penstock.server.staging.reading.accounts import STALL_SECONDS
from penstock.server.staging.reading.job import Cancelled, Job
from penstock.server.staging.reading.reader import ReaderPool, ReadQueue
from penstock.server.system import progress
from penstock.server.system.failure import NoThreadError
from penstock.server.system.progress import about_to_wait, beat

from ....e2e.support import wait_until


class Gate:
    """A read that says what it was asked for, and ends when told to."""

    def __init__(self) -> None:
        self.begun: Queue[tuple[int, int]] = Queue()
        self._go: Queue[BaseException | None] = Queue()

    def read(self, start: int, end: int) -> None:
        self.begun.put((start, end))
        error = self._go.get(timeout=60)
        if error is not None:
            raise error

    def let(self, count: int = 1, error: BaseException | None = None) -> None:
        for _ in range(count):
            self._go.put(error)


class Outcome:
    """Collects what `done` was called with: once, whatever happens."""

    def __init__(self) -> None:
        self.calls: list[BaseException | None] = []
        self._called = threading.Event()

    def done(self, error: BaseException | None) -> None:
        self.calls.append(error)
        self._called.set()

    def wait(self) -> BaseException | None:
        assert self._called.wait(60)
        return self.calls[0]


Pools = Callable[..., ReaderPool]


@pytest.fixture
def pools() -> Iterator[Pools]:
    """Without spare threads, unless a test wants some: where it is slow, the reads that it holds up stall."""
    made: list[ReaderPool] = []

    def make(threads: int, *, spare_threads: int = 0, copies_at_once: int | None = None) -> ReaderPool:
        pool = ReaderPool(threads, block_bytes=1, spare_threads=spare_threads, copies_at_once=copies_at_once)
        made.append(pool)
        return pool

    yield make
    for pool in made:
        pool.stop()
        for thread in pool.threads:
            thread.join(60)
            assert not thread.is_alive()


def nothing() -> None:
    pass


def job(
    outcome: Outcome,
    read: Callable[[int, int], None],
    count: int = 1,
    size: int = 10,
    check: Callable[[], None] = nothing,
) -> Job:
    return Job(((n * size, (n + 1) * size) for n in range(count)), read=read, check=check, done=outcome.done)


def settle(pool: ReaderPool) -> None:
    """Until every thread has come back for more: `done` of all that ended has been called then."""
    gate, outcome = Gate(), Outcome()
    gate.let(len(pool.threads))
    barrier = threading.Barrier(len(pool.threads))

    def read(start: int, end: int) -> None:
        barrier.wait(60)
        gate.read(start, end)

    pool.queue().submit(job(outcome, read, count=len(pool.threads)))
    outcome.wait()


def test_blocks_are_read_in_order_and_done_is_called_after_the_last(pools: Pools) -> None:
    pool, outcome, read = pools(1), Outcome(), list[tuple[int, int]]()
    checked: list[int] = []
    pool.queue().submit(
        job(outcome, lambda *block: read.append(block), count=3, check=lambda: checked.append(len(read)))
    )
    assert outcome.wait() is None
    assert read == [(0, 10), (10, 20), (20, 30)]
    assert checked == [3]
    assert pool.read_bytes == 30


def test_a_job_without_blocks_is_refused(pools: Pools) -> None:
    with pytest.raises(ValueError):
        pools(1).queue().submit(job(Outcome(), Gate().read, count=0))


def serve(pool: ReaderPool, queues: dict[str, ReadQueue], jobs: int, size: dict[str, int]) -> list[str]:
    """Queues `jobs` of one block for every queue behind a block that holds up the pool's only thread, and
    returns whose were read, in order."""
    order: list[str] = []
    gate, gated = Gate(), Outcome()
    holding = pool.queue()
    holding.submit(job(gated, gate.read, size=1))
    gate.begun.get(timeout=60)
    outcomes = []
    for name, queue in queues.items():
        for _ in range(jobs):
            outcomes.append(Outcome())

            def read(start: int, end: int, name: str = name) -> None:
                order.append(name)

            queue.submit(job(outcomes[-1], read, size=size[name]))
    gate.let()
    for outcome in (gated, *outcomes):
        assert outcome.wait() is None
    return order


def shares(order: list[str], size: dict[str, int], count: int) -> dict[str, float]:
    served = {name: sum(size[name] for one in order[:count] if one == name) for name in size}
    return {name: bytes_ / sum(served.values()) for name, bytes_ in served.items()}


@pytest.mark.parametrize("size", [{"a": 10, "b": 10}, {"a": 10, "b": 70}, {"a": 999, "b": 10}])
def test_two_queues_get_the_same_bytes(pools: Pools, size: dict[str, int]) -> None:
    pool = pools(1)
    queues = {name: pool.queue() for name in size}
    order = serve(pool, queues, 1000, size)
    until_one_is_out = min(max(i for i, name in enumerate(order) if name == queue) for queue in size)
    assert until_one_is_out > 100
    for share in shares(order, size, until_one_is_out).values():
        assert 0.4 <= share <= 0.6


def test_a_queue_that_comes_late_is_owed_nothing_and_owes_nothing(pools: Pools) -> None:
    pool = pools(1)
    size = {"old": 10, "new": 10}
    old = pool.queue()
    serve(pool, {"old": old}, 500, {"old": 10})
    order = serve(pool, {"old": old, "new": pool.queue()}, 100, size)
    assert 0.4 <= shares(order, size, 20)["old"] <= 0.6


def test_a_queue_that_ran_dry_is_not_starved_by_one_that_began_meanwhile(pools: Pools) -> None:
    """A window is dry whenever its client is slow; what it has read before must not count against it."""
    pool = pools(1)
    size = {"old": 10, "new": 10}
    old = pool.queue()
    serve(pool, {"old": old}, 500, {"old": 10})
    order = serve(pool, {"new": pool.queue(), "old": old}, 100, size)
    assert shares(order, size, 20)["old"] >= 0.4


def test_cancelling_forgets_what_was_not_begun(pools: Pools) -> None:
    pool, gate = pools(1), Gate()
    queue, running, waiting = pool.queue(), Outcome(), Outcome()
    queue.submit(job(running, gate.read, count=3))
    queue.submit(second := job(waiting, gate.read))
    gate.begun.get(timeout=60)
    assert queue.cancel() == [second]
    assert not running.calls
    gate.let()
    assert isinstance(running.wait(), Cancelled)
    settle(pool)
    assert gate.begun.empty()
    assert (len(running.calls), len(waiting.calls)) == (1, 0)


def test_cancelling_between_two_blocks_of_a_job_returns_it(pools: Pools) -> None:
    """None of its reads is in flight, so nobody else would ever end it."""
    pool, gate, other_gate = pools(1), Gate(), Gate()
    queue, outcome = pool.queue(), Outcome()
    queue.submit(only := job(outcome, gate.read, count=2, size=100))
    gate.begun.get(timeout=60)
    pool.queue().submit(job(Outcome(), other_gate.read, size=10))
    gate.let()
    other_gate.begun.get(timeout=60)
    assert queue.cancel() == [only]
    other_gate.let()
    settle(pool)
    assert not outcome.calls


def test_a_job_whose_last_block_is_being_read_when_cancelled_ends_well(pools: Pools) -> None:
    pool, gate, outcome = pools(1), Gate(), Outcome()
    queue = pool.queue()
    queue.submit(job(outcome, gate.read))
    gate.begun.get(timeout=60)
    assert queue.cancel() == []
    gate.let()
    assert outcome.wait() is None


def test_a_queue_works_again_after_a_cancel(pools: Pools) -> None:
    pool = pools(2)
    queue = pool.queue()
    assert queue.cancel() == []
    gate, first = Gate(), Outcome()
    queue.submit(job(first, gate.read, count=8))
    gate.begun.get(timeout=60)
    gate.begun.get(timeout=60)
    queue.cancel()
    gate.let(2)
    assert isinstance(first.wait(), Cancelled)
    second = Outcome()
    queue.submit(job(second, lambda *_: None, count=5))
    assert second.wait() is None
    settle(pool)
    assert len(first.calls) == len(second.calls) == 1


@pytest.mark.parametrize("threads", [1, 4])
def test_an_error_ends_the_job_once_and_leaves_its_other_blocks_unread(pools: Pools, threads: int) -> None:
    pool, gate, outcome = pools(threads), Gate(), Outcome()
    pool.queue().submit(job(outcome, gate.read, count=20))
    for _ in range(threads):
        gate.begun.get(timeout=60)
    boom = OSError("boom")
    gate.let(error=boom)
    gate.let(threads - 1, error=OSError("another"))
    error = outcome.wait()
    settle(pool)
    assert isinstance(error, OSError)
    assert len(outcome.calls) == 1
    assert gate.begun.empty()


def test_an_error_waits_for_the_reads_that_are_under_way(pools: Pools) -> None:
    """Their views are in use until then."""
    pool, gate, outcome = pools(2), Gate(), Outcome()
    pool.queue().submit(job(outcome, gate.read, count=2))
    gate.begun.get(timeout=60)
    gate.begun.get(timeout=60)
    gate.let(error=OSError("boom"))
    probe = Outcome()
    pool.queue().submit(job(probe, lambda *_: None))
    probe.wait()
    assert not outcome.calls
    gate.let()
    assert isinstance(outcome.wait(), OSError)


def test_a_failed_check_fails_the_job(pools: Pools) -> None:
    outcome = Outcome()

    def check() -> None:
        raise OSError("changed")

    pools(1).queue().submit(job(outcome, lambda *_: None, count=3, check=check))
    assert isinstance(outcome.wait(), OSError)


def test_a_failed_read_is_not_checked(pools: Pools) -> None:
    pool, outcome, gate = pools(1), Outcome(), Gate()
    checked = threading.Event()
    gate.let(error=OSError("boom"))
    pool.queue().submit(job(outcome, gate.read, check=checked.set))
    outcome.wait()
    assert not checked.is_set()


def test_other_jobs_go_on_after_one_failed(pools: Pools) -> None:
    pool, bad, good, gate = pools(1), Outcome(), Outcome(), Gate()
    queue = pool.queue()
    gate.let(error=MemoryError())
    queue.submit(job(bad, gate.read, count=3))
    queue.submit(job(good, lambda *_: None, count=3))
    assert isinstance(bad.wait(), MemoryError)
    assert good.wait() is None


def test_a_done_that_finds_its_loop_closed_does_not_end_the_thread(pools: Pools) -> None:
    pool, outcome = pools(1), Outcome()

    def closed(error: BaseException | None) -> None:
        raise RuntimeError("Event loop is closed")

    queue = pool.queue()
    queue.submit(Job([(0, 1)], read=lambda *_: None, check=nothing, done=closed))
    queue.submit(job(outcome, lambda *_: None))
    assert outcome.wait() is None


def test_stopping_ends_the_threads_after_the_read_they_are_in(pools: Pools) -> None:
    pool, gate, outcome = pools(2), Gate(), Outcome()
    pool.queue().submit(job(outcome, gate.read, count=10))
    gate.begun.get(timeout=60)
    gate.begun.get(timeout=60)
    pool.stop()
    gate.let(2)
    for thread in pool.threads:
        thread.join(60)
        assert not thread.is_alive()
    assert gate.begun.empty()
    assert not outcome.calls


def test_busy_counts_the_reads_under_way(pools: Pools) -> None:
    pool, gate, outcome = pools(3), Gate(), Outcome()
    pool.queue().submit(job(outcome, gate.read, count=2))
    gate.begun.get(timeout=60)
    gate.begun.get(timeout=60)
    assert pool.busy == 2
    gate.let(2)
    outcome.wait()
    assert pool.busy == 0
    assert pool.read_bytes == 20


# ---- copying and waiting ------------------------------------------------------------------------


class Copying:
    """A read that copies until it is told to go on, and then waits for storage until it is told to end."""

    def __init__(self) -> None:
        self.copying, self.waiting = Gate(), Gate()

    def read(self, start: int, end: int) -> None:
        self.copying.read(start, end)
        about_to_wait()
        self.waiting.read(start, end)


def test_no_more_reads_copy_at_once_than_may(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "STALL_SECONDS", 3600.0)  # none is taken for one that stands still
    pool, reads, outcome = pools(4, copies_at_once=2), Copying(), Outcome()
    pool.queue().submit(job(outcome, reads.read, count=8))
    reads.copying.let(4)
    for _ in range(4):
        reads.waiting.begun.get(timeout=60)
    reads.waiting.let(4)  # all four threads come back
    wait_until(
        lambda: pool.busy == 2 and pool._idle == 2, "two to read, and the others to wait for their turn"
    )
    reads.copying.let(4)
    reads.waiting.let(4)
    assert outcome.wait() is None


def test_a_read_that_begins_to_wait_lets_the_next_one_copy(pools: Pools) -> None:
    pool, reads, outcome = pools(4, copies_at_once=1), Copying(), Outcome()
    pool.queue().submit(job(outcome, reads.read, count=5))
    for _ in range(4):
        reads.copying.begun.get(timeout=60)
        reads.copying.let()
        reads.waiting.begun.get(timeout=60)
    assert pool.busy == 4
    reads.waiting.let(5)
    reads.copying.let()
    assert outcome.wait() is None


def test_a_read_that_stands_still_where_it_should_copy_holds_up_no_other_for_long(pools: Pools) -> None:
    pool, hanging, outcome, other = pools(3, copies_at_once=1), Gate(), Outcome(), Outcome()
    pool.queue().submit(job(outcome, hanging.read))
    hanging.begun.get(timeout=60)
    pool.queue().submit(job(other, lambda *_: None, count=10))
    assert other.wait() is None
    hanging.let()
    assert outcome.wait() is None


# ---- failing for now, and stalling --------------------------------------------------------------


class Flaky:
    """A read that puts the rest of each block off `times` times, a byte further each time."""

    def __init__(self, times: int, delay_seconds: float = 0.0) -> None:
        self.times = times
        self.delay_seconds = delay_seconds
        self.calls: list[tuple[int, int]] = []

    def read(self, start: int, end: int) -> None:
        self.calls.append((start, end))
        if len(self.calls) <= self.times:
            raise RetryLater(start + 1, self.delay_seconds)


def test_a_read_that_is_put_off_goes_on_where_it_was(pools: Pools) -> None:
    pool, outcome, flaky = pools(1), Outcome(), Flaky(3)
    pool.queue().submit(job(outcome, flaky.read))
    assert outcome.wait() is None
    assert flaky.calls == [(0, 10), (1, 10), (2, 10), (3, 10)]
    assert pool.read_bytes == 10


def test_a_read_that_is_put_off_holds_no_thread(pools: Pools) -> None:
    pool, put_off, other = pools(1), Outcome(), Outcome()
    queue = pool.queue()
    queue.submit(only := job(put_off, Flaky(1, delay_seconds=3600).read))
    pool.queue().submit(job(other, lambda *_: None, count=100))
    assert other.wait() is None
    assert queue.cancel() == [only]
    settle(pool)
    assert not put_off.calls


def test_a_queue_is_charged_only_for_what_was_read(pools: Pools) -> None:
    pool, outcome = pools(1), Outcome()
    queue = pool.queue()
    queue.submit(job(outcome, Flaky(5).read, size=100))
    outcome.wait()
    assert queue.served_bytes == 100


def test_a_job_that_fails_forgets_what_was_put_off(pools: Pools) -> None:
    pool, outcome, first = pools(2), Outcome(), Flaky(1, delay_seconds=3600)

    def read(start: int, end: int) -> None:
        if start:
            raise OSError("boom")
        first.read(start, end)

    queue = pool.queue()
    queue.submit(job(outcome, read, count=2))
    assert isinstance(outcome.wait(), OSError)
    assert queue.cancel() == []
    assert len(first.calls) <= 1


def test_a_read_that_is_put_off_after_a_cancel_ends_the_job(pools: Pools) -> None:
    pool, outcome, gate = pools(1), Outcome(), Gate()
    queue = pool.queue()
    queue.submit(job(outcome, gate.read))
    gate.begun.get(timeout=60)
    assert queue.cancel() == []
    gate.let(error=RetryLater(5, 0))
    assert isinstance(outcome.wait(), Cancelled)
    settle(pool)
    assert gate.begun.empty()


def test_stalled_reads_of_one_queue_hold_no_other_back_and_their_threads_end(pools: Pools) -> None:
    pool, gate, stalled, other = pools(2, spare_threads=2), Gate(), Outcome(), Outcome()
    dead = pool.queue()
    dead.submit(job(stalled, gate.read, count=10))
    gate.begun.get(timeout=60)
    gate.begun.get(timeout=60)
    pool.queue().submit(job(other, lambda *_: None, count=100))
    assert other.wait() is None
    assert gate.begun.empty()  # its share of threads is stalled: it gets no more of them
    assert pool.busy == 2
    assert len(pool.threads) > 2
    gate.let(10)
    assert stalled.wait() is None
    everyone = list(pool.threads)
    settled = Outcome()
    pool.queue().submit(job(settled, lambda *_: None, count=100))
    settled.wait()
    while len(pool.threads) > 2:
        for thread in everyone:
            if thread not in pool.threads:
                thread.join(60)
    assert len(pool.threads) == 2


def test_threads_are_started_when_the_first_block_is_to_be_read(pools: Pools) -> None:
    before = set(threading.enumerate())
    pool, outcome = pools(3), Outcome()
    queue = pool.queue()
    assert pool.threads == []
    assert set(threading.enumerate()) <= before
    queue.submit(job(outcome, lambda *_: None))
    assert outcome.wait() is None
    assert len(pool.threads) == 3


def refuse(thread: threading.Thread) -> None:
    """Stands for `Thread.start` where the system has no thread left."""
    raise RuntimeError("can't start new thread")


def test_a_pool_that_can_start_no_thread_says_so_and_starts_them_when_it_can(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, refused, outcome = pools(2), Outcome(), Outcome()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(NoThreadError):
            pool.queue().submit(job(refused, lambda *_: None))
    pool.queue().submit(job(outcome, lambda *_: None))
    assert outcome.wait() is None
    assert not refused.calls
    assert len(pool.threads) == 2


def test_where_no_thread_can_be_started_reads_go_on_without(
    pools: Pools, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pool, gate, stalled, other = pools(2, spare_threads=2), Gate(), Outcome(), Outcome()
    pool.queue().submit(job(stalled, gate.read, count=2))
    gate.begun.get(timeout=60)
    gate.begun.get(timeout=60)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    pool.queue().submit(job(other, lambda *_: None, count=10))
    while "pids limit" not in caplog.text:
        assert not other.calls
    gate.let(2)
    assert stalled.wait() is None
    assert other.wait() is None
    assert len(pool.threads) == 2


def test_a_read_that_moves_does_not_count_as_stalled(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    """One slow read of a pool of one: nothing overtakes it as long as bytes come."""
    seconds = [0.0]
    clock = SimpleNamespace(monotonic=lambda: seconds[0])
    monkeypatch.setattr(reader, "time", clock)
    monkeypatch.setattr(progress, "time", clock)
    pool, gate, slow, other = pools(1, spare_threads=1), Gate(), Outcome(), Outcome()
    order: list[str] = []

    def read(start: int, end: int) -> None:
        gate.begun.put((start, end))
        while not pool_looked.is_set():
            seconds[0] += STALL_SECONDS / 2
            beat()
        order.append("slow")

    pool_looked = threading.Event()
    looks = [0]
    look = pool._until_next_look

    def count_looks(now: float) -> float | None:
        looks[0] += 1
        if looks[0] >= 8:
            pool_looked.set()
        return look(now)

    pool.queue().submit(job(slow, read))
    gate.begun.get(timeout=60)
    pool._until_next_look = count_looks  # type: ignore[method-assign]
    pool.queue().submit(job(other, lambda *_: order.append("other")))
    assert slow.wait() is None
    assert other.wait() is None
    assert order == ["slow", "other"]
    assert len(pool.threads) == 1
