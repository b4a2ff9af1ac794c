"""Tensors from the ring of a load to a device with memory of its own.

    run_ahead()       takes segments while earlier ones are delivered               caller's thread
    submit(tensors)   plans them, takes memory on the device                       placement.py
    each batch        waits for a pinned buffer, fills it, starts its copies,
                      records an event behind them                                 copy threads, pinned.py
    the last batch    `on_read`: nothing reads the ring for these tensors any more
    deliver()         in order: waits until a tensor's copies are started, then makes the caller's stream wait
                      for their events. So the tensor is valid on that stream, and the host does not wait
    close()           starts nothing new, and gives the buffers back at once, or when the threads that still
                      fill one are done

Copy threads spend their time in memmove and in the driver, without the interpreter's lock. Small tensors are
moved with the lock held: taking it again would cost more than moving them.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from .. import errors
from .pinned import Device, Event, PinnedRing, RingClosedError
from .placement import CopyBatch, Plan, plan

_BUFFER_BYTES = 16 << 20
# More threads do not copy faster than the memory of one socket can be read and written.
MOST_THREADS = 8
# A smaller move keeps the interpreter's lock.
_SMALL_BYTES = 64 << 10
_THREAD_NAME = "penstock-copy"

_move_locked = ctypes.PyDLL(None).memmove
_move_locked.restype = ctypes.c_void_p
_move_locked.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)

Tensors = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True, slots=True)
class _Submission:
    """Tensors that were submitted together and are not delivered yet."""

    # Name, dtype and shape of each.
    heads: list[tuple[str, torch.dtype, torch.Size, int]]
    plan: Plan
    allocations: list[torch.Tensor]
    events: list[Future[Event]]
    size_bytes: int


# Called with whether something is under way. Returns the next tensors, and the function to call when their
# bytes have been read; None at the end.
Next = Callable[[bool], "tuple[Tensors, Callable[[], None]] | None"]


def run_ahead(transfer: Transfer, take_next: Next) -> Iterator[tuple[str, torch.Tensor]]:
    """Delivers everything, and copies ahead of the tensor that the caller asks for.

    Two more submissions are taken after each one that was delivered, so that the first tensor does not wait
    for many. An error of a later submission is raised when all before it are delivered. If the daemon went
    away, or the device had no memory for one more, it is tried again then.
    """
    waiting: tuple[Tensors, Callable[[], None]] | None = None
    failure: Exception | None = None
    ended = False
    try:
        while True:
            for _ in range(2):
                if ended or failure is not None or not transfer.has_room:
                    break
                try:
                    waiting = waiting or take_next(transfer.busy)
                    if waiting is None:
                        ended = True
                    else:
                        transfer.submit(*waiting)
                        waiting = None
                except Exception as error:
                    if not transfer.busy:
                        raise
                    failure = error
            if transfer.busy:
                yield from transfer.deliver()
            elif failure is None:
                return
            elif waiting is not None or isinstance(failure, errors.DaemonUnavailableError):
                failure = None
            else:
                raise failure
    finally:
        failure = waiting = None  # its traceback refers to this frame, and further up to the mapping
        transfer.forget()


class Releases:
    """Releases segments in their order, whatever the order in which their bytes have been read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._expected: deque[_Expected] = deque()

    def expect(self, release: Callable[[], None]) -> Callable[[], None]:
        """Returns the function to call when a segment has been read. `release` follows when all before it
        have."""
        expected = _Expected(release)
        with self._lock:
            self._expected.append(expected)
        return partial(self._read, expected)

    def _read(self, expected: _Expected) -> None:
        with self._lock:
            expected.read = True
            while self._expected and self._expected[0].read:
                self._expected.popleft().release()


@dataclass(slots=True, eq=False)
class _Expected:
    release: Callable[[], None]
    read: bool = False


class Transfer:
    """The copies of one load. One thread calls `submit`, `deliver` and `forget`; any thread may close it.

    At most `pinned_bytes` are pinned.
    """

    def __init__(self, device: Device, *, pinned_bytes: int, threads: int | None = None) -> None:
        count = threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))
        buffer_bytes = min(_BUFFER_BYTES, pinned_bytes // 2 // 4096 * 4096)
        # One buffer for each thread to fill, and two for the device to read: it is faster than a thread.
        buffers = min(count + 2, pinned_bytes // buffer_bytes)
        self._device = device
        self._ring = PinnedRing(device, buffer_bytes=buffer_bytes, count=buffers)
        self._threads = ThreadPoolExecutor(min(count, buffers), thread_name_prefix=_THREAD_NAME)
        self._submissions: deque[_Submission] = deque()
        self._limit_bytes = pinned_bytes
        self._submitted_bytes = 0
        self._closed = False
        self._pid = os.getpid()

    @property
    def busy(self) -> bool:
        """Whether something is submitted and not delivered."""
        return bool(self._submissions)

    @property
    def has_room(self) -> bool:
        """False if so much is under way that more would only take memory of the device."""
        return not self._submissions or self._submitted_bytes < self._limit_bytes

    def submit(self, tensors: Tensors, on_read: Callable[[], None]) -> None:
        """Starts copying these tensors of the host, and keeps them until they are copied.

        A copy thread calls `on_read` when their bytes have been read. Raises the device's error when it is
        out of memory; nothing was started then.
        """
        sizes = [tensor.nbytes for _, tensor in tensors]
        planned = plan(sizes, buffer_bytes=self._ring.buffer_bytes)
        allocations = [self._device.allocate(size_bytes) for size_bytes in planned.allocations]
        job = _Job(self._ring, tensors, allocations, len(planned.batches), on_read)
        try:
            events = [self._threads.submit(job.carry, batch) for batch in planned.batches]
        except RuntimeError:
            if self._closed:
                raise RingClosedError from None
            raise
        heads = [(name, tensor.dtype, tensor.shape, tensor.nbytes) for name, tensor in tensors]
        self._submissions.append(_Submission(heads, planned, allocations, events, sum(sizes)))
        self._submitted_bytes += sum(sizes)
        if not events:
            on_read()

    def deliver(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The tensors that were submitted first, on the device, valid on the caller's current stream.

        Raises the error of their copies; RingClosedError if the transfer was closed meanwhile.
        """
        submission = self._submissions.popleft()
        try:
            for (name, dtype, shape, size_bytes), slot in zip(
                submission.heads, submission.plan.slots, strict=True
            ):
                start = slot.offset
                tensor = submission.allocations[slot.allocation][start : start + size_bytes]
                tensor = tensor.view(dtype).view(shape)
                if size_bytes:
                    for number in range(*submission.plan.filled_by[slot.allocation]):
                        self._device.hand_over(tensor, _result(submission.events[number]))
                yield name, tensor
                del tensor  # or it would live on while the next one is made
        finally:
            self._submitted_bytes -= submission.size_bytes

    def forget(self) -> None:
        """Drops what is not delivered. Where the transfer was closed while a batch waited for a buffer, the
        error of that batch refers to its tensors, and they keep the mapping."""
        self._submissions.clear()

    def close(self) -> None:
        """Ends copying without waiting for the threads. May be called again."""
        if self._pid != os.getpid():
            return  # a forked child has neither the threads nor the use of the device
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._ring.close()

    def join(self) -> None:
        """To be called after `close()`. Returns when the threads have ended and nothing is pinned any more.

        Does not wait on such a thread, where a garbage collection may have closed the load: it would wait for
        itself.
        """
        if self._pid == os.getpid() and not threading.current_thread().name.startswith(_THREAD_NAME):
            self._threads.shutdown(wait=True)


class _Job:
    """The copies of one submission, as the threads see them. Keeps only what they still need."""

    def __init__(
        self,
        ring: PinnedRing,
        tensors: Tensors,
        targets: Sequence[torch.Tensor],
        batch_count: int,
        on_read: Callable[[], None],
    ) -> None:
        self._device = ring.device
        self._ring = ring
        self._tensors = tensors
        """The tensors keep the mapping until the last one is read, and no longer: `on_read` may release
        it."""
        self._addresses = [tensor.data_ptr() for _, tensor in tensors]
        self._targets = list(targets)
        """A finished thread drops its references only after it has reported, when the caller may want the
        memory again. So this list is cleared."""
        self._on_read = on_read
        self._unread = self._unfinished = batch_count
        self._lock = threading.Lock()

    def carry(self, batch: CopyBatch) -> Event:
        """Moves a batch through a pinned buffer. Returns the event behind its copies."""
        try:
            return self._carry(batch)
        finally:
            with self._lock:
                self._unfinished -= 1
                last = not self._unfinished
            if last:
                self._targets.clear()

    def _carry(self, batch: CopyBatch) -> Event:
        buffer = self._ring.take()
        event = None
        try:
            self._fill(buffer, batch)
            try:
                self._device.copy(
                    (self._targets[allocation][offset : offset + size_bytes], buffer[at : at + size_bytes])
                    for at, allocation, offset, size_bytes in batch.copies
                )
            finally:
                event = self._device.record()
        finally:
            self._ring.put(buffer, event)
        return event

    def _fill(self, buffer: torch.Tensor, batch: CopyBatch) -> None:
        start, addresses = buffer.data_ptr(), self._addresses
        for tensor, offset, to, size_bytes in batch.moves:
            move = _move_locked if size_bytes < _SMALL_BYTES else ctypes.memmove
            move(start + to, addresses[tensor] + offset, size_bytes)
        with self._lock:
            self._unread -= 1
            last = not self._unread
        if last:
            self._tensors = []
            self._on_read()


def _result(event: Future[Event]) -> Event:
    try:
        return event.result()
    except CancelledError:
        raise RingClosedError from None
