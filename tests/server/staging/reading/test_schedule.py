"""The order of reads, and who gets how many threads, on a clock of the test's own."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter

import pytest

from penstock.server.sources.file.store import HUNG_MOUNTS
from penstock.server.staging.reading.accounts import STALL_SECONDS, QueueState, Read
from penstock.server.staging.reading.job import Job
from penstock.server.staging.reading.schedule import Schedule
from penstock.server.system import progress

MIB = 1 << 20


class Clock:
    """What `time.monotonic` is to the modules that are told no time."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


class Machine:
    """A schedule with threads that read at given speeds; nothing ends before its time."""

    def __init__(self, clock: Clock, threads: int) -> None:
        """With as many spare threads as the daemon has for files."""
        self.clock = clock
        self.schedule = Schedule(threads, HUNG_MOUNTS * threads)
        self.read_bytes: Counter[object] = Counter()
        self.most: Counter[object] = Counter()
        """Most reads that each user had under way at once."""
        self._names: dict[QueueState, object] = {}
        self._speeds: dict[object, float] = {}
        self._ends: list[tuple[float, int, Read]] = []
        self._numbers = itertools.count()

    def queue(
        self,
        name: object,
        uid: int | None,
        *,
        blocks: int = 10_000,
        block_bytes: int = MIB,
        bytes_per_second: float = 100 * MIB,
        domain: str = "disk",
    ) -> QueueState:
        """A queue with so much to read. A speed of 0 is a mount that hangs."""
        queue = QueueState(uid)
        self._names[queue] = name
        self._speeds[domain] = bytes_per_second
        ranges = [(number * block_bytes, (number + 1) * block_bytes) for number in range(blocks)]
        job = Job(ranges, read=lambda *_: None, check=lambda: None, done=lambda _: None, domain=domain)
        self.schedule.submit(queue, job, self.clock.seconds)
        return queue

    def run(self, seconds: float) -> None:
        end = self.clock.seconds + seconds
        while True:
            self._begin()
            looks = self.clock.seconds + STALL_SECONDS / 4
            due = min(self._ends[0][0] if self._ends else end, looks, end)
            self.clock.seconds = due
            if due >= end:
                return
            while self._ends and self._ends[0][0] <= due:
                read = heapq.heappop(self._ends)[2]
                self.schedule.read_over(read, None, due)
                self.schedule.leave(read, due)
                self.read_bytes[self._names[read.queue]] += read.end - read.start
            self.schedule.look(due)

    def under_way(self) -> Counter[object]:
        return Counter(self._names[read.queue] for read in self.schedule.reading)

    def _begin(self) -> None:
        while len(self.schedule.reading) < self.schedule.wanted_threads:
            read = self.schedule.begin(self.clock.seconds)
            if read is None:
                break
            speed = self._speeds[read.domain.key]
            if speed:
                ends = self.clock.seconds + (read.end - read.start) / speed
                heapq.heappush(self._ends, (ends, next(self._numbers), read))
        for name, count in self.under_way().items():
            self.most[name] = max(self.most[name], count)


@pytest.mark.parametrize("threads", [1, 4, 16])
@pytest.mark.parametrize("users", [2, 3, 5])
def test_each_of_n_users_gets_an_nth_of_the_bytes(clock: Clock, threads: int, users: int) -> None:
    """One with many entries, one with large blocks, one with small ones, one that came first: the same."""
    machine = Machine(clock, threads)
    for number in range(20):
        machine.queue(1, 1, block_bytes=(1 + number % 3) * MIB)
    machine.run(1)
    machine.read_bytes.clear()
    for uid in range(2, users + 1):
        machine.queue(uid, uid, block_bytes=MIB << (uid % 4))
    machine.run(10)
    total = machine.read_bytes.total()
    for uid in range(1, users + 1):
        assert machine.read_bytes[uid] == pytest.approx(total / users, rel=0.15)


def test_queues_of_one_user_share_its_part(clock: Clock) -> None:
    machine = Machine(clock, 4)
    machine.queue("a", 1, block_bytes=MIB)
    machine.queue("b", 1, block_bytes=4 * MIB)
    machine.queue("other", 2)
    machine.run(10)
    total = machine.read_bytes.total()
    assert machine.read_bytes["other"] == pytest.approx(total / 2, rel=0.1)
    assert machine.read_bytes["a"] == pytest.approx(total / 4, rel=0.15)


def test_a_user_that_is_alone_gets_all_threads(clock: Clock) -> None:
    machine = Machine(clock, 8)
    machine.queue("alone", 1)
    machine.run(1)
    assert machine.most["alone"] == 8
    assert machine.read_bytes["alone"] == pytest.approx(8 * 100 * MIB, rel=0.05)


def test_a_slow_mount_slows_nobody_else_of_another_user(clock: Clock) -> None:
    """Not slow enough to stall: each block takes 0.8 s."""
    machine = Machine(clock, 8)
    machine.queue("slow", 1, bytes_per_second=1.25 * MIB, domain="slow")
    machine.run(5)
    machine.queue("quick", 2)
    machine.run(10)
    assert machine.read_bytes["quick"] >= 0.9 * 4 * 100 * MIB * 9


def test_a_slow_mount_takes_no_more_than_its_queue_s_share_from_the_same_user(clock: Clock) -> None:
    machine = Machine(clock, 8)
    machine.queue("slow", 1, bytes_per_second=1.25 * MIB, domain="slow")
    machine.run(5)
    machine.queue("quick", 1)
    machine.run(10)
    assert machine.read_bytes["quick"] >= 0.9 * 4 * 100 * MIB * 9


@pytest.mark.parametrize("mounts", range(1, HUNG_MOUNTS))
def test_mounts_that_hang_cost_nobody_else_a_thread(clock: Clock, mounts: int) -> None:
    machine = Machine(clock, 4)
    for number in range(mounts):
        for uid in (1, 2, 3):
            machine.queue(number, uid, bytes_per_second=0, domain=f"hung {number}")
        machine.run(2)
    machine.queue("quick", 9)
    machine.run(5)
    assert machine.most[0] <= 2 * 4
    assert machine.read_bytes["quick"] == pytest.approx(4 * 100 * MIB * 5, rel=0.1)


def test_a_mount_that_hangs_has_at_most_as_many_reads_as_there_are_threads(clock: Clock) -> None:
    machine = Machine(clock, 4)
    for uid in range(20):
        machine.queue("hung", uid, bytes_per_second=0, domain="hung")
    machine.run(60)
    assert machine.under_way()["hung"] == machine.most["hung"] == 4
    assert machine.schedule.able_since() is None


def test_one_user_with_any_number_of_hung_mounts_leaves_threads_to_others_and_to_root(clock: Clock) -> None:
    machine = Machine(clock, 4)
    for number in range(50):
        machine.queue("hung", 1, bytes_per_second=0, domain=f"hung {number}")
        machine.run(2)
    assert machine.under_way()["hung"] <= 20 * 7 // 8
    machine.queue("other", 2)
    machine.queue("root", 0)
    machine.run(5)
    assert machine.read_bytes["other"] > 0
    assert machine.read_bytes["root"] > 0


def test_a_mount_that_answers_again_gets_all_threads_again(clock: Clock) -> None:
    machine = Machine(clock, 4)
    machine.queue("hung", 1, bytes_per_second=0, domain="mount")
    machine.run(5)
    for read in list(machine.schedule.reading):
        machine.schedule.read_over(read, None, clock.seconds)
        machine.schedule.leave(read, clock.seconds)
    machine._speeds["mount"] = 100 * MIB
    machine.run(2)
    assert machine.read_bytes["hung"] == pytest.approx(4 * 100 * MIB * 2, rel=0.1)
    assert machine.schedule.wanted_threads == 4


def test_a_queue_that_gets_another_owner_is_served_as_that_one_s(clock: Clock) -> None:
    machine = Machine(clock, 4)
    queue = machine.queue("prefetched", None)
    machine.run(1)
    machine.queue("other", 2)
    machine.schedule.give_to(queue, 2)
    machine.queue("third", 3)
    machine.run(1)
    machine.read_bytes.clear()
    machine.run(10)
    total = machine.read_bytes.total()
    assert machine.read_bytes["third"] == pytest.approx(total / 2, rel=0.1)
    assert machine.read_bytes["prefetched"] == pytest.approx(total / 4, rel=0.1)


def test_a_block_that_may_be_begun_and_is_not_is_known(clock: Clock) -> None:
    schedule = Schedule(4, 0)
    assert schedule.able_since() is None
    job = Job([(0, 1), (1, 2)], read=lambda *_: None, check=lambda: None, done=lambda _: None)
    clock.seconds = 3.0
    schedule.submit(QueueState(0), job, clock.seconds)
    clock.seconds = 5.0
    schedule.look(clock.seconds)
    assert schedule.able_since() == 3.0
    read = schedule.begin(clock.seconds)
    assert read is not None
    assert schedule.able_since() == 5.0
    second = schedule.begin(clock.seconds)
    assert second is not None
    assert schedule.able_since() is None
    for one in (read, second):
        schedule.read_over(one, None, clock.seconds)
        schedule.leave(one, clock.seconds)
    assert schedule.able_since() is None
    assert not schedule.waiting
    assert not schedule._users
    assert not schedule._domains
