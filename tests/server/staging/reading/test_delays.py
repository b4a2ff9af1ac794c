"""Blocks that are read again later: in the order in which they are due, and counted where they wait."""

from __future__ import annotations

from collections.abc import Iterator

from penstock.server.staging.reading.accounts import FaultDomain, QueueState, Read, User
from penstock.server.staging.reading.delays import DelayedBlocks
from penstock.server.staging.reading.job import Job


def failed_reads(count: int, *, queue: QueueState | None = None) -> list[Read]:
    """Reads of one job, of 10 bytes each."""
    user, queue, domain = User(1, 0), queue or QueueState(1), FaultDomain(None)
    job = Job([], read=lambda start, end: None, check=lambda: None, done=lambda error: None)
    return [Read(user, queue, domain, job, 10 * number, 10 * number + 10) for number in range(count)]


def taken(delayed: DelayedBlocks, now: float) -> Iterator[tuple[int, int]]:
    while delayed.next_due is not None and delayed.next_due <= now:
        block = delayed.take()
        yield block.start, block.end


def counts(read: Read) -> list[int]:
    return [counted.delayed for counted in (read.user, read.queue, read.job, read.domain)]


def test_blocks_come_when_they_are_due_and_of_equal_ones_the_first_put_off_comes_first() -> None:
    delayed = DelayedBlocks()
    late, early, equal = failed_reads(3)
    delayed.add(late, 3, due=9.0)
    delayed.add(early, 10, due=5.0)
    delayed.add(equal, 20, due=5.0)
    assert delayed.next_due == 5.0
    assert list(taken(delayed, 4.9)) == []
    assert list(taken(delayed, 5.0)) == [(10, 20), (20, 30)]
    assert delayed.next_due == 9.0
    assert list(taken(delayed, 9.0)) == [(3, 10)]
    assert delayed.next_due is None


def test_a_delayed_block_counts_for_its_user_its_queue_its_job_and_its_domain() -> None:
    delayed = DelayedBlocks()
    one, other = failed_reads(2)
    delayed.add(one, 0, due=1.0)
    delayed.add(other, 10, due=2.0)
    assert counts(one) == [2, 2, 2, 2]
    assert delayed.take().read is one
    assert counts(one) == [1, 1, 1, 1]
    assert [block.read for block in delayed.remove(one.job)] == [other]
    assert counts(one) == [0, 0, 0, 0]
    assert delayed.next_due is None


def test_the_blocks_of_other_jobs_stay_in_order_when_one_job_is_removed() -> None:
    delayed = DelayedBlocks()
    queue = QueueState(1)
    (gone,), (stays,) = failed_reads(1, queue=queue), failed_reads(1)
    delayed.add(gone, 0, due=1.0)
    delayed.add(stays, 4, due=3.0)
    delayed.add(stays, 2, due=2.0)
    assert delayed.jobs_of(queue) == [gone.job]
    assert len(delayed.remove(gone.job)) == 1
    assert delayed.jobs_of(queue) == []
    assert list(taken(delayed, 3.0)) == [(2, 10), (4, 10)]
