"""Blocks that must not be read before a time, because their last read had a transient failure. Pure."""

from __future__ import annotations

import heapq
import itertools
from typing import NamedTuple

from .accounts import QueueState, Read
from .job import Job


class DelayedBlock(NamedTuple):
    """The bytes `start` to `end`, to be read again."""

    due: float
    """The time before which they must not be read."""
    number: int
    """Breaks ties of `due`."""
    queue: QueueState
    read: Read
    """The read that failed."""
    start: int
    end: int


class DelayedBlocks:
    """Keeps `delayed` of users, queues, jobs and fault domains: how many of their blocks are here."""

    def __init__(self) -> None:
        self.next_due: float | None = None
        """When the first block may be read. None if there is no block."""
        self._heap: list[DelayedBlock] = []
        self._numbers = itertools.count()

    def add(self, read: Read, start: int, due: float) -> None:
        """Adds the rest of the block of `read`, from `start` on."""
        block = DelayedBlock(due, next(self._numbers), read.queue, read, start, read.end)
        heapq.heappush(self._heap, block)
        self._count(block, 1)

    def take(self) -> DelayedBlock:
        """Removes and returns the first block, which must be there."""
        block = heapq.heappop(self._heap)
        self._count(block, -1)
        return block

    def jobs_of(self, queue: QueueState) -> list[Job]:
        """The jobs of the blocks of that queue."""
        return [block.read.job for block in self._heap if block.queue is queue]

    def remove(self, job: Job) -> list[DelayedBlock]:
        """Removes and returns the blocks of that job."""
        if not job.delayed:
            return []
        removed = [block for block in self._heap if block.read.job is job]
        self._heap = [block for block in self._heap if block.read.job is not job]
        heapq.heapify(self._heap)
        for block in removed:
            self._count(block, -1)
        return removed

    def _count(self, block: DelayedBlock, step: int) -> None:
        """Counts a block that came or went."""
        for counted in (block.read.user, block.queue, block.read.job, block.read.domain):
            counted.delayed += step
        self.next_due = self._heap[0].due if self._heap else None
