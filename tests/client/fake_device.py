"""A device without a GPU that keeps the rules of a CUDA device, and spoils data where they are broken.

It has memory of its own, one stream of copies and one stream of the caller. Nothing is executed before
something waits for it (`lazy`), or each thing at once, or a random part at random moments: whatever is right
must be right for all of these. So

- a copy reads its pinned buffer when it is executed: one that was filled again before its event, or given
  back, yields other bytes;
- the caller's stream executes nothing of the other stream but what it was made to wait for: a tensor that
  is handed over without its event is read before it is written;
- freed memory goes out again at once, the last first, and is overwritten, unless the caller's stream was
  recorded for it and has something left to do.
"""

from __future__ import annotations

import ctypes
import random
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

ALIGN_BYTES = 512
POISON = 0xDD


@dataclass(eq=False)
class FakeEvent:
    device: FakeDevice
    # How many operations of the copy stream lie before it.
    position: int

    def query(self) -> bool:
        return self.device.progress() >= self.position

    def synchronize(self) -> None:
        self.device.wait_for(self.position)


@dataclass(eq=False)
class Read:
    """Work of the caller's stream that reads a tensor when its turn comes."""

    address: int
    size_bytes: int
    # What the stream was made to wait for before it.
    waits_for: int
    data: bytes = b""


@dataclass(frozen=True)
class _Copy:
    to: int
    at: int
    size_bytes: int


@dataclass(eq=False)
class _Block:
    address: int
    size_bytes: int
    used_by_caller: bool = False


@dataclass
class FakeDevice:
    memory_bytes: int = 64 << 20
    laziness: str = "lazy"
    seed: int = 0
    # Called before every pin, copy and allocation; raises to make it fail.
    on_pin: Callable[[], None] = lambda: None
    on_copy: Callable[[], None] = lambda: None
    on_allocate: Callable[[int], None] = lambda size_bytes: None
    pinned_bytes: int = 0
    peak_pinned_bytes: int = 0
    copies: int = 0
    violations: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._memory = (ctypes.c_ubyte * (self.memory_bytes + ALIGN_BYTES))()
        start = -(-ctypes.addressof(self._memory) // ALIGN_BYTES) * ALIGN_BYTES
        self._start = self._next = start
        self._free: list[_Block] = []
        self._quarantine: list[_Block] = []
        self._blocks: dict[int, _Block] = {}
        self._operations: list[_Copy] = []
        self._executed = 0
        self._waits_for = 0
        self._reads: list[Read] = []
        self._pinned: dict[int, torch.Tensor] = {}
        self._random = random.Random(self.seed)

    # ---- what transfer.py sees ----

    def allocate(self, size_bytes: int) -> torch.Tensor:
        self.on_allocate(size_bytes)
        if not size_bytes:
            return torch.empty(0, dtype=torch.uint8)
        with self._lock:
            block = self._find(size_bytes)
            self._blocks[block.address] = block
        ctypes.memset(block.address, POISON, size_bytes)
        array = (ctypes.c_ubyte * size_bytes).from_address(block.address)
        weakref.finalize(array, self._release, block).atexit = False
        return torch.frombuffer(array, dtype=torch.uint8)

    def pin(self, size_bytes: int) -> torch.Tensor:
        self.on_pin()
        buffer = torch.full((size_bytes,), POISON, dtype=torch.uint8)
        with self._lock:
            self._pinned[buffer.data_ptr()] = buffer
            self.pinned_bytes += size_bytes
            self.peak_pinned_bytes = max(self.peak_pinned_bytes, self.pinned_bytes)
        return buffer

    def unpin(self, buffer: torch.Tensor) -> None:
        with self._lock:
            start = buffer.data_ptr()
            if any(start <= copy.at < start + buffer.nbytes for copy in self._operations[self._executed :]):
                self.violations.append("unpinned while the device reads it")
            del self._pinned[start]
            self.pinned_bytes -= buffer.nbytes
        buffer.fill_(POISON)

    def copy(self, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        for target, source in pairs:
            self._copy(target, source)

    def _copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        self.on_copy()
        to, at, size_bytes = target.data_ptr(), source.data_ptr(), source.nbytes
        if target.nbytes != size_bytes:
            self.violations.append("a copy between different sizes")
        with self._lock:
            if not any(
                p <= at and at + size_bytes <= p + buffer.nbytes for p, buffer in self._pinned.items()
            ):
                self.violations.append("a copy from memory that is not pinned")
            self.copies += 1
            self._operations.append(_Copy(to, at, size_bytes))
        self._happen()

    def record(self) -> FakeEvent:
        with self._lock:
            return FakeEvent(self, len(self._operations))

    def hand_over(self, tensor: torch.Tensor, event: object) -> None:
        assert isinstance(event, FakeEvent)
        with self._lock:
            self._waits_for = max(self._waits_for, event.position)
            self._block_of(tensor.data_ptr()).used_by_caller = True

    def settle(self) -> None:
        self.wait_for(len(self._operations))

    # ---- what tests see ----

    def read_later(self, tensor: torch.Tensor) -> Read:
        """Queues reading this tensor on the caller's stream; `run_caller` makes it happen."""
        with self._lock:
            read = Read(tensor.data_ptr(), tensor.nbytes, self._waits_for)
            self._reads.append(read)
        return read

    def run_caller(self) -> None:
        """The caller's stream does what it has to do."""
        with self._lock:
            for read in self._reads:
                self.wait_for(read.waits_for)
                read.data = ctypes.string_at(read.address, read.size_bytes) if read.size_bytes else b""
            self._reads.clear()
            self._free += self._quarantine
            self._quarantine.clear()

    def read(self, tensor: torch.Tensor) -> bytes:
        """What the caller's stream sees in the tensor now."""
        read = self.read_later(tensor)
        self.run_caller()
        return read.data

    @property
    def allocated_bytes(self) -> int:
        with self._lock:
            return sum(block.size_bytes for block in self._blocks.values())

    def progress(self) -> int:
        with self._lock:
            return self._executed

    def wait_for(self, position: int) -> None:
        with self._lock:
            while self._executed < position:
                copy = self._operations[self._executed]
                self._executed += 1
                ctypes.memmove(copy.to, copy.at, copy.size_bytes)

    # ---- inside ----

    def _happen(self) -> None:
        """The device gets on with it, as far as it likes."""
        with self._lock:
            if self.laziness == "eager":
                self.wait_for(len(self._operations))
            elif self.laziness == "random":
                self.wait_for(self._random.randint(self._executed, len(self._operations)))

    def _find(self, size_bytes: int) -> _Block:
        for block in reversed(self._free):
            if block.size_bytes >= size_bytes:
                self._free.remove(block)
                block.used_by_caller = False
                return block
        block = _Block(self._next, -(-size_bytes // ALIGN_BYTES) * ALIGN_BYTES)
        if block.address + block.size_bytes > self._start + self.memory_bytes:
            raise torch.OutOfMemoryError(f"the fake device has no {size_bytes} bytes left")
        self._next += block.size_bytes
        return block

    def _release(self, block: _Block) -> None:
        with self._lock:
            del self._blocks[block.address]
            later = block.used_by_caller and self._reads
            (self._quarantine if later else self._free).append(block)

    def _block_of(self, address: int) -> _Block:
        for block in self._blocks.values():
            if block.address <= address < block.address + block.size_bytes:
                return block
        raise AssertionError("a tensor outside the device's memory")
