from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from .support import MIB, bytes_in, wait_for_tick, write_checkpoint


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Path]:
    """`make("a", 3)`: a checkpoint that takes 3 slabs as a whole, in tensors of at most 1 MiB."""
    written = 0

    def write(name: str, slabs: float, *, tensor_bytes: int = MIB, prefix: str = "t") -> Path:
        nonlocal written
        written += 1
        size = bytes_in(slabs)
        sizes = [tensor_bytes] * (size // tensor_bytes) + [size % tensor_bytes]
        path = tmp_path / f"{name}.safetensors"
        if path.exists():
            wait_for_tick(tmp_path)
        return write_checkpoint(path, sizes, seed=written, prefix=prefix)

    return write
