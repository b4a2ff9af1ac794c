"""Which block is read next, and by how many threads. Pure: callers pass the time, and start and wake threads.

    user --has--> queues, one for each entry --hold--> jobs, one for each segment --of--> blocks
    fault domain: reads that hang together, such as those of a mount; each job reads from one

Blocks are served fairly between users, then between the queues of one user, then earliest first within a
queue. With n users at work each may use an n-th of the threads before others, and gets the next block while
it has been served the fewest bytes. So each gets about an n-th of the bytes, and a user whose storage is slow
holds no more than its own threads. A new or returning user or queue starts at the byte count of the one
served last: it has no debt and no credit.

No fault domain holds up the others when it fails or hangs:

- A read that has made no progress for `STALL_SECONDS` does not count as one of the threads: a spare thread
  takes its place. A read from a domain in trouble counts as stalled until it makes progress.
- A domain in trouble has at most `threads` reads under way. Any domain has at most half of the threads that
  others have not stalled. So several domains may hang, and threads are left for the next one.
- All reads of one user that are under way count in a quota of all threads, spare ones included (`quota.py`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable

from ...system.quota import Shares
from .accounts import STALL_SECONDS, FaultDomain, QueueState, Read, User
from .delays import DelayedBlocks
from .job import Cancelled, Job


class Schedule:
    """The order of reads for `threads` threads, and at most `spare_threads` more in place of stalled ones."""

    def __init__(self, threads: int, spare_threads: int) -> None:
        self._threads = threads
        self._spare_threads = spare_threads
        self._shares = Shares(threads + spare_threads)
        self._users: dict[int | None, User] = {}
        """Users with jobs or reads under way."""
        self._level_bytes = 0
        """`served_bytes` of the user that was served last, as it was before that."""
        self._domains: dict[Hashable, FaultDomain] = {}
        """Fault domains with reads under way that have a key."""
        self._delayed = DelayedBlocks()
        self._stalled = 0
        self._moved_at = 0.0
        """When a read last began or ended, or a block that could be begun was added while no other could."""
        self.reading: set[Read] = set()

    @property
    def waiting(self) -> bool:
        """Whether some queue has a block to begin, even if it may not be begun now."""
        return any(user.queues for user in self._users.values())

    @property
    def wanted_threads(self) -> int:
        """How many threads there should be: as many as may read at once, and one for each stalled read."""
        return self._threads + min(self._stalled, self._spare_threads)

    def next_due(self) -> float | None:
        """When the first of the delayed blocks may be read."""
        return self._delayed.next_due

    def able_since(self) -> float | None:
        """Since when a block that may be begun has waited while no read began or ended. None if there is no
        such block, also if all blocks that are left wait for domains in trouble."""
        return None if self._choose() is None else self._moved_at

    # ---- waiting blocks -------------------------------------------------------------------------

    def submit(self, queue: QueueState, job: Job, now: float) -> None:
        if not job.blocks:
            raise ValueError("a job needs a block")
        if self._choose() is None:
            self._moved_at = now
        if not queue.jobs:
            self._enlist(queue)
        queue.jobs.append(job)

    def give_to(self, queue: QueueState, uid: int | None) -> None:
        """From now on the queue counts as another user's."""
        if queue.uid == uid:
            return
        waits = bool(queue.jobs)
        if waits:
            self._leave(queue)
        queue.uid = uid
        if waits:
            self._enlist(queue)

    def cancel(self, queue: QueueState) -> list[Job]:
        """Drops every block not begun. Returns the jobs of which no block is being read."""
        queue.cancels += 1
        cancelled = dict.fromkeys((*queue.jobs, *self._delayed.jobs_of(queue)))
        for job in cancelled:
            job.error = job.error or Cancelled()
            self._cancel_delayed(job)
            self._delist(queue, job)
        return [job for job in cancelled if not job.in_flight]

    # ---- reads under way ------------------------------------------------------------------------

    def begin(self, now: float) -> Read | None:
        """The next block. None if no block may be begun."""
        queue = self._choose()
        if queue is None:
            return None
        job, user, domain = queue.jobs[0], self._users[queue.uid], self._domain(queue, queue.jobs[0])
        start, end = job.blocks.popleft()
        self._level_bytes, user.level_bytes = user.served_bytes, queue.served_bytes
        user.served_bytes += end - start
        queue.served_bytes += end - start
        read = Read(user, queue, domain, job, start, end)
        if domain.key is not None:
            self._domains[domain.key] = domain
        for counted in (user, queue, job, domain):
            counted.in_flight += 1
        job.under_way.add((start, end))
        user.active += 1
        queue.active += 1
        if not job.blocks:
            self._delist(queue, job)
        self.reading.add(read)
        self._set_stalled(read, read.suspect)
        self._moved_at = now
        return read

    def read_over(self, read: Read, error: BaseException | None, now: float) -> bool:
        """The block was read, or failed, which fails the job. Returns whether it was the last of its job,
        which must then be checked. The thread counts as reading until `leave`."""
        queue, job = read.queue, read.job
        read.slow = now - read.heartbeat.at >= STALL_SECONDS
        if error is not None:
            job.error = job.error or error
            self._cancel_delayed(job)
            self._delist(queue, job)
        return self._block_over(read)

    def put_off(self, read: Read, reached: int, delay_seconds: float, now: float) -> bool:
        """The read had a transient failure: the bytes from `reached` on are queued again after a delay.
        Returns whether it was the last of its job all the same, because the job was cancelled or failed."""
        queue, job = read.queue, read.job
        for served in (read.user, queue):
            served.served_bytes -= read.end - reached
        if read.cancels != queue.cancels:
            job.error = job.error or Cancelled()
        elif job.error is None:
            self._delayed.add(read, reached, now + delay_seconds)
        read.put_off = True
        return self._block_over(read)

    def leave(self, read: Read, now: float) -> None:
        """The thread has finished the read, and the check of its job if that was due."""
        slow = read.slow or now - read.heartbeat.at >= STALL_SECONDS
        read.domain.troubled = read.put_off or (read.domain.troubled and slow)
        self.reading.remove(read)
        self._set_stalled(read, False)
        for counted in (read.user, read.queue, read.domain):
            counted.in_flight -= 1
        read.user.active -= 1
        read.queue.active -= 1
        if read.domain.key is not None and not read.domain.in_flight and not read.domain.delayed:
            self._domains.pop(read.domain.key, None)
        self._remove_idle(read.user)
        self._moved_at = now

    def look(self, now: float) -> None:
        """Makes delayed blocks available again, and finds the reads that stall while more blocks wait."""
        while self._delayed.next_due is not None and self._delayed.next_due <= now:
            block = self._delayed.take()
            queue, job = block.queue, block.read.job
            if not queue.jobs:
                self._enlist(queue)
            job.blocks.appendleft((block.start, block.end))
            if job not in queue.jobs:
                queue.jobs.appendleft(job)
        if self.waiting:
            for read in self.reading:
                self._set_stalled(read, read.is_stalled(now))

    # ---- inside ---------------------------------------------------------------------------------

    def _choose(self) -> QueueState | None:
        """The queue that is served next."""
        if len(self._users) == 1 and not self._stalled:
            (user,) = self._users.values()
            if len(user.queues) == 1:  # the usual case: no other queue to be fair to
                queue = user.queues[0]
                return queue if self._has_room(self._domain(queue, queue.jobs[0])) else None
        user_share = -(-self._threads // max(1, len(self._users)))
        best: tuple[tuple[bool, int, bool, int], QueueState] | None = None
        for user in self._users.values():
            # While no read stalls, the reads are no more than may run at once, and everybody may have so
            # many.
            if not user.queues or (self._stalled and not self._threads_left(user)):
                continue
            queue_share = -(-user_share // len(user.queues))
            for queue in user.queues:
                if self._has_room(self._domain(queue, queue.jobs[0])):
                    key = (
                        user.active >= user_share,
                        user.served_bytes,
                        queue.active >= queue_share,
                        queue.served_bytes,
                    )
                    if best is None or key < best[0]:
                        best = key, queue
        return best[1] if best else None

    def _threads_left(self, user: User) -> int:
        """How many more threads the user may have, spare ones included."""
        used = Counter[int]()
        for other in self._users.values():
            used[_payer(other.uid)] += other.in_flight
        return self._shares.left(_payer(user.uid), used)

    def _has_room(self, domain: FaultDomain) -> bool:
        limit = self._threads if domain.troubled else 2 * self._threads
        elsewhere = self._stalled - domain.stalled
        if elsewhere:
            left = self._threads + self._spare_threads - elsewhere
            limit = min(limit, max(1, left // 2))
        return domain.in_flight + domain.delayed < limit

    def _domain(self, queue: QueueState, job: Job) -> FaultDomain:
        if job.domain is None:
            return queue.domain
        return self._domains.get(job.domain) or FaultDomain(job.domain)

    def _enlist(self, queue: QueueState) -> None:
        """Adds the queue, which is not listed, to its user's list."""
        user = self._users.get(queue.uid)
        if user is None:
            user = self._users[queue.uid] = User(queue.uid, self._level_bytes)
        if not user.queues:
            user.served_bytes = max(user.served_bytes, self._level_bytes)
        if queue.user is not user:
            queue.user, queue.served_bytes = user, user.level_bytes
        queue.served_bytes = max(queue.served_bytes, user.level_bytes)
        user.queues.append(queue)

    def _leave(self, queue: QueueState) -> None:
        user = self._users[queue.uid]
        user.queues.remove(queue)
        self._remove_idle(user)

    def _delist(self, queue: QueueState, job: Job) -> None:
        """Records that the job has no more blocks to begin."""
        job.blocks.clear()
        if job in queue.jobs:
            queue.jobs.remove(job)
            if not queue.jobs:
                self._leave(queue)

    def _cancel_delayed(self, job: Job) -> None:
        for block in self._delayed.remove(job):
            self._remove_idle(block.read.user)

    def _block_over(self, read: Read) -> bool:
        job = read.job
        job.under_way.discard((read.start, read.end))
        job.in_flight -= 1
        return not job.in_flight and not job.blocks and not job.delayed

    def _remove_idle(self, user: User) -> None:
        if not user.queues and not user.in_flight and not user.delayed:
            self._users.pop(user.uid, None)

    def _set_stalled(self, read: Read, stalled: bool) -> None:
        if read.stalled == stalled:
            return
        read.stalled = stalled
        step = 1 if stalled else -1
        self._stalled += step
        read.domain.stalled += step
        read.user.active -= step
        read.queue.active -= step
        if stalled:
            read.domain.troubled = True


def _payer(uid: int | None) -> int:
    """The uid that pays for the reads. The daemon's own count as root's."""
    return 0 if uid is None else uid
