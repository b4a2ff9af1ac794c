"""CUDA as `transfer.py` uses it. The only file that touches torch.cuda.

Copies run on a stream of their own, one for each device of the process. So loads reuse each other's memory,
since torch's allocator keeps freed memory for the stream for which it was allocated. Memory that a caller's
stream uses is marked with `record_stream`. Otherwise the next copy could overwrite it while work that the
caller has queued still reads it.

Buffers are anonymous memory registered with the driver. They are not taken from torch's allocator of pinned
memory, which rounds sizes up and keeps its memory until the process ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch

from ..ring import mapping
from .pinned import Event


def open_device(device: torch.device) -> CudaDevice:
    """The device of that index, or the current one. Raises ValueError if it does not exist."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r}: torch {torch.__version__} finds no CUDA device; install a CUDA build "
            "of torch, give this process a GPU, or load to device='cpu'"
        )
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if not 0 <= index < count:
        raise ValueError(
            f"device {str(device)!r}: this process sees {count} CUDA devices, from cuda:0 on; use one of "
            "these, or set CUDA_VISIBLE_DEVICES"
        )
    return CudaDevice(index)


class CudaDevice:
    """A `pinned.Device`."""

    def __init__(self, index: int) -> None:
        self._device = torch.device("cuda", index)
        self._stream = _stream_of_copies(index)

    def allocate(self, size_bytes: int) -> torch.Tensor:
        with self._copying():
            return torch.empty(size_bytes, dtype=torch.uint8, device=self._device)

    def pin(self, size_bytes: int) -> torch.Tensor:
        address = mapping.map_anonymous(size_bytes)
        # Otherwise the driver would take the pages one by one, and under a lock of its own.
        mapping.populate(address, size_bytes)
        mapping.keep_from_children(address, size_bytes)
        with torch.cuda.device(self._device):
            failure = int(_cudart().cudaHostRegister(address, size_bytes, 0))
            if failure:
                mapping.unmap(address, size_bytes)
                self._forget_failure()
                raise RuntimeError(
                    f"CUDA cannot pin {size_bytes} bytes of host memory (error {failure}); set "
                    "PENSTOCK_PINNED_BYTES to less than the 512 MiB that a load may pin by default"
                )
        array = (ctypes.c_ubyte * size_bytes).from_address(address)
        return torch.frombuffer(array, dtype=torch.uint8)

    def unpin(self, buffer: torch.Tensor) -> None:
        address, size_bytes = buffer.data_ptr(), buffer.nbytes
        with torch.cuda.device(self._device):
            failure = int(_cudart().cudaHostUnregister(address))
            if failure:  # then its pages must stay mapped: the device may still use them
                self._forget_failure()
                raise RuntimeError(
                    f"CUDA cannot give {size_bytes} pinned bytes back (error {failure}); restart this "
                    "process to free them"
                )
        mapping.unmap(address, size_bytes)

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        # The caller may have allocated the targets in inference mode; this thread is not in it.
        with torch.inference_mode(), self._copying():
            for target, source in pairs:
                target.copy_(source, non_blocking=True)

    def record(self) -> Event:
        # A thread that waits for it sleeps and does not spin.
        event: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return cast(Event, event)

    def hand_over(self, tensor: torch.Tensor, event: Event) -> None:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(cast(torch.cuda.Event, event))
        tensor.record_stream(stream)

    def settle(self) -> None:
        self._stream.synchronize()

    @contextlib.contextmanager
    def _copying(self) -> Iterator[None]:
        # The device first: otherwise, when a stream's context ends, it returns to the device before by a call
        # that creates a CUDA context there. That takes half a gigabyte of a GPU that this load does not use.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield

    def _forget_failure(self) -> None:
        # Clears the error: otherwise the driver reports it again at this thread's next launch.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=self._device)


@functools.cache
def _stream_of_copies(index: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(torch.device("cuda", index))  # type: ignore[no-untyped-call]


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
