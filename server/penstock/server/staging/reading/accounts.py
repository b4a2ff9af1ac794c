"""The accounts by which `schedule.py` decides: who reads how much now, and how much each was served. Pure.

    User --has--> QueueState, one for each entry --has--> Job, one for each segment
    Read: a block of a job that a thread is reading
    FaultDomain: reads that hang together, such as those of a mount

They only count. `schedule.py` changes them, and `delays.py` changes the counts of delayed blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable

from ...system.progress import Heartbeat
from .job import Job

STALL_SECONDS = 1.0
"""A read that has made no progress for so long is stalled."""


class FaultDomain:
    """Reads that hang together."""

    __slots__ = ("delayed", "in_flight", "key", "stalled", "troubled")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.in_flight = 0
        self.delayed = 0
        self.stalled = 0
        """How many of its reads in flight are stalled."""
        self.troubled = False
        """Whether the last of its reads to end had a transient failure or took very long, or one of its reads
        is stalled."""


class User:
    """The queues and reads of one uid; None is the daemon itself."""

    __slots__ = ("active", "delayed", "in_flight", "level_bytes", "queues", "served_bytes", "uid")

    def __init__(self, uid: int | None, served_bytes: int) -> None:
        self.uid = uid
        self.queues: list[QueueState] = []
        """Queues with jobs."""
        self.in_flight = 0
        self.delayed = 0
        self.active = 0
        """Reads in flight that are not stalled."""
        self.served_bytes = served_bytes
        self.level_bytes = 0
        """`served_bytes` of its queue that was served last, as it was before that."""


class QueueState:
    """The queue of one entry."""

    __slots__ = ("active", "cancels", "delayed", "domain", "in_flight", "jobs", "served_bytes", "uid", "user")

    def __init__(self, uid: int | None) -> None:
        self.uid = uid
        self.user: User | None = None
        """The user of its uid, while that user has anything to read."""
        self.jobs: deque[Job] = deque()
        """Jobs with blocks to begin."""
        self.served_bytes = 0
        self.in_flight = 0
        self.active = 0
        self.delayed = 0
        self.cancels = 0
        self.domain = FaultDomain(None)


class Read:
    """A block that a thread is reading."""

    __slots__ = (
        "began",
        "cancels",
        "domain",
        "end",
        "heartbeat",
        "job",
        "put_off",
        "queue",
        "slow",
        "stalled",
        "start",
        "suspect",
        "user",
    )

    def __init__(
        self, user: User, queue: QueueState, domain: FaultDomain, job: Job, start: int, end: int
    ) -> None:
        self.user = user
        self.queue = queue
        self.domain = domain
        self.job = job
        self.start = start
        self.end = end
        self.cancels = queue.cancels
        self.heartbeat = Heartbeat()
        self.began = self.heartbeat.at
        self.put_off = self.slow = False
        self.stalled = False
        self.suspect = domain.troubled

    def is_stalled(self, now: float) -> bool:
        if self.suspect and self.heartbeat.at == self.began:
            return True
        return now - self.heartbeat.at >= STALL_SECONDS
