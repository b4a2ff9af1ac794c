"""Two ways from the segments of a load to the tensors that it yields.

HostDelivery    segment by segment: wait until its bytes are there, wrap its tensors
                    full ring            views, which keep the slabs leased
                    window, owned        copies
                    window, not owned    views, good until the next iteration
                    other device         copies there
                yield them one by one; from a window release the segment, so that its space is reused
AheadDelivery   copies to a CUDA device, segments ahead of what is yielded              (cuda/transfer.py)

Both count the tensors that they yield in the load's account, and keep no part of the load itself alive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from operator import attrgetter
from time import monotonic
from typing import Protocol

import torch

from penstock.v1 import streamer_pb2 as pb

from . import errors
from .cuda.pinned import RingClosedError
from .cuda.transfer import Releases, Tensors, Transfer, run_ahead
from .ring.copies import CopyPool
from .ring.stream import Stream
from .segments import Segments
from .system import process

CHECK_SECONDS = 0.001
"""So often at most a delivery looks whether the daemon has found a file damaged: word of it takes as long. A
look before each tensor, 2 microseconds, would cost a load of 100,000 a fifth of its time."""

_size_bytes = attrgetter("size_bytes")  # a third faster, over 100,000 tensors, than a generator


class Delivery(Protocol):
    def run(self, segments: Segments) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields every tensor, once."""

    def close(self) -> None:
        """Stops delivery. Does not wait. May be called again, by any thread."""

    def join(self) -> None:
        """To be called after `close()`. Returns when no copy is under way any more."""


class HostDelivery:
    def __init__(self, device: torch.device | None, *, owned: bool) -> None:
        """torch moves the tensors to `device`; None leaves them in the host's memory."""
        self._device = device
        self._owned = owned
        self._copies = CopyPool()

    def run(self, segments: Segments) -> Iterator[tuple[str, torch.Tensor]]:
        device, account, due = self._device, segments.account, 0.0
        while (segment := segments.next()) is not None:
            stream = segments.stream
            window = not stream.manifest.full
            copies = self._copies if window and self._owned and device is None else None
            # No yielded tensor refers to the ring, so its space can be released before the last tensor is
            # yielded.
            detached = copies is not None or device is not None
            account.begin()
            count, done = len(segment.tensors), 0
            try:
                for name, tensor in stream.wrap(segment, copies=copies):
                    if device is not None:
                        tensor = tensor.to(device)
                    # By another thread: the daemon may have reused the space while it was copied.
                    if stream.closed or (detached and segments.closed.is_set()):
                        raise errors.closed(segments.load_id)
                    if (now := monotonic()) >= due:
                        due = now + CHECK_SECONDS
                        try:
                            stream.check_intact()
                        except errors.PenstockError:
                            del tensor  # or who keeps the error would keep the lease
                            raise
                    done += 1
                    if window and detached and done == count:
                        stream.release(segment, written=False)
                    yield name, tensor
                    del tensor  # or it would live on while the next one is made
                    if segments.pid != process.pid:
                        segments.check_process()
            finally:
                account.add(done, sum(map(_size_bytes, islice(segment.tensors, done))))
            if window and not (detached and count):
                stream.release(segment, written=True)

    def close(self) -> None:
        self._copies.close()

    def join(self) -> None:
        """No copy is under way between two tensors."""


class AheadDelivery:
    def __init__(self, transfer: Transfer) -> None:
        self._transfer = transfer
        self._releases = Releases()

    def run(self, segments: Segments) -> Iterator[tuple[str, torch.Tensor]]:
        account, due = segments.account, 0.0
        try:
            for name, tensor in run_ahead(self._transfer, partial(self._next_tensors, segments)):
                # By another thread: the window may have been given up while it was copied.
                if segments.closed.is_set():
                    raise RingClosedError
                if (now := monotonic()) >= due:
                    due = now + CHECK_SECONDS
                    try:
                        segments.stream.check_intact()
                    except errors.PenstockError:
                        del tensor  # or who keeps the error would keep its memory on the device
                        raise
                account.add(1, tensor.nbytes)
                yield name, tensor
                del tensor  # or it would live on while the next one is made
                if segments.pid != process.pid:
                    segments.check_process()
        except Exception as error:
            if isinstance(error, RingClosedError) or segments.closed.is_set():
                raise errors.closed(segments.load_id) from None
            raise

    def close(self) -> None:
        self._transfer.close()

    def join(self) -> None:
        self._transfer.join()

    def _next_tensors(self, segments: Segments, ahead: bool) -> tuple[Tensors, Callable[[], None]] | None:
        segment = segments.next(ahead=ahead)
        if segment is None:
            return None
        stream = segments.stream
        on_read = self._releases.expect(partial(_release, stream, segment))
        return list(stream.wrap(segment, copies=None)), on_read


def _release(stream: Stream, segment: pb.SegmentReady) -> None:
    if not stream.manifest.full:
        stream.release(segment, written=False)
