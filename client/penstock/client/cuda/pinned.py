"""The pinned buffers of one load, and the interface of a device that copies through them.

A buffer is idle, or taken by a copy thread that fills it, or in use by the device: the device reads it until
the event that was recorded behind its copies fires. If no buffer is idle, a new one is made, up to a number.
From then on a thread that needs one waits for the event of the buffer that has been in use longest.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Protocol

import torch


class Event(Protocol):
    """A point in the order of a device's copies."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Returns when the device has passed it."""


class Device(Protocol):
    """A device as seen by `transfer.py`. One stream of copies; methods may be called by any thread."""

    def allocate(self, size_bytes: int) -> torch.Tensor:
        """Bytes on the device whose memory belongs to the stream of copies."""

    def pin(self, size_bytes: int) -> torch.Tensor:
        """Bytes of the host that the device can read while the host goes on."""

    def unpin(self, buffer: torch.Tensor) -> None:
        """Gives memory of `pin()` back; no copy from it may be under way."""

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Starts copies to targets on the device, each from its source in pinned memory."""

    def record(self) -> Event:
        """An event behind all copies that this thread has started."""

    def hand_over(self, tensor: torch.Tensor, event: Event) -> None:
        """Makes the caller's current stream wait for `event`, and prevents the memory of `tensor` from being
        reused before that stream has finished with it. Does not wait itself."""

    def settle(self) -> None:
        """Returns when no copy is under way."""


class RingClosedError(Exception):
    """A buffer was asked for after the end of the load."""


class PinnedRing:
    """At most `count` buffers of `buffer_bytes`."""

    def __init__(self, device: Device, *, buffer_bytes: int, count: int) -> None:
        self.buffer_bytes = buffer_bytes
        self.device = device
        self._unmade = count
        self._idle: list[torch.Tensor] = []
        self._on_their_way: deque[tuple[Event, torch.Tensor]] = deque()
        self._closed = False
        # Reentrant: a garbage collection that runs under it may close the ring of a load that was dropped.
        # Taken by itself, not through the condition, whose Python code an exception of a signal handler may
        # break off between taking it and noting that.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def take(self) -> torch.Tensor:
        """A buffer that nothing reads. Raises RingClosedError, or the error with which the device cannot
        pin."""
        with self._lock:
            while True:
                if self._closed:
                    raise RingClosedError
                if self._idle:
                    return self._idle.pop()
                oldest = self._on_their_way[0] if self._on_their_way else None
                if oldest is not None and (not self._unmade or oldest[0].query()):
                    self._on_their_way.popleft()
                    break
                if self._unmade:
                    self._unmade -= 1
                    oldest = None
                    break
                self._changed.wait()
        if oldest is None:
            return self.device.pin(self.buffer_bytes)
        event, buffer = oldest
        try:
            event.synchronize()
        except BaseException:
            self.put(buffer, None)
            raise
        return buffer

    def put(self, buffer: torch.Tensor, event: Event | None) -> None:
        """Gives a taken buffer back. `event` is behind the copies that read it; None if none was started."""
        with self._lock:
            if not self._closed:
                if event is None:
                    self._idle.append(buffer)
                else:
                    self._on_their_way.append((event, buffer))
                self._changed.notify()
                return
        self.device.settle()
        self.device.unpin(buffer)

    def close(self) -> None:
        """Unpins all buffers. Taken buffers are unpinned when they are put back. May be called again."""
        with self._lock:
            self._closed = True
            buffers = [*self._idle, *(buffer for _, buffer in self._on_their_way)]
            self._idle.clear()
            self._on_their_way.clear()
            self._changed.notify_all()
        if buffers:
            self.device.settle()
        while buffers:
            self.device.unpin(buffers.pop())
