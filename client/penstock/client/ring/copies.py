"""Memory for tensors that are copied out of a window.

Most of the cost of such a copy is fresh pages from the kernel. A caller that copies every tensor on, for
example into a module, drops each before it takes the next. The memory of one is then used for another, as
long as the load lasts. Memory of a living tensor is never touched, and fresh memory asks for huge pages.
"""

from __future__ import annotations

import ctypes
import mmap
import weakref
from collections import deque

import torch

from .mapping import map_anonymous, unmap

SMALL_BYTES = 1 << 20
"""For smaller tensors torch's allocator is as fast."""
SPARE_BYTES = 512 << 20
"""Most bytes that are kept for reuse."""


class CopyPool:
    """The copies of one load. `close` at its end; tensors that live keep their memory.

    Finalizers give memory back on the thread that drops a tensor, whichever it is, so that path only appends
    to a deque.
    """

    def __init__(self) -> None:
        self._spares: deque[tuple[int, int]] = deque()
        self._closed = False

    def copy(self, shape: list[int], dtype: torch.dtype, address: int, size_bytes: int) -> torch.Tensor:
        """A tensor of its own with the `size_bytes` bytes at `address`.

        Does not use clone(): torch copies with all cores, which then spin while they wait for each other, and
        the daemon's readers need them. On two cores that is four to five times slower.
        """
        if size_bytes < SMALL_BYTES:
            tensor = torch.empty(shape, dtype=dtype, device="cpu")
            ctypes.memmove(tensor.data_ptr(), address, size_bytes)
            return tensor
        start, room = self._take(size_bytes)
        ctypes.memmove(start, address, size_bytes)
        array = (ctypes.c_ubyte * size_bytes).from_address(start)
        weakref.finalize(array, self._release, start, room).atexit = False
        return torch.frombuffer(array, dtype=dtype).view(shape)

    def close(self) -> None:
        """Returns unused memory to the system. The rest follows when its tensors die."""
        self._closed = True
        while self._spares:
            unmap(*self._spares.pop())

    def _take(self, size_bytes: int) -> tuple[int, int]:
        """(address, bytes) of memory that is large enough and not much too large."""
        for spare in list(self._spares):
            if size_bytes <= spare[1] <= 2 * size_bytes:
                self._spares.remove(spare)
                return spare
        room = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        while self._spares and sum(spare[1] for spare in list(self._spares)) + room > SPARE_BYTES:
            unmap(*self._spares.popleft())
        return map_anonymous(room), room

    def _release(self, address: int, size_bytes: int) -> None:
        if self._closed:
            unmap(address, size_bytes)
        else:
            self._spares.append((address, size_bytes))
            if self._closed:  # in the meantime, by another thread
                self.close()
