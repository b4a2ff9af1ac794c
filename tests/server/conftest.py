from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from penstock.server.checkpoint.catalog import Catalog

from .support import (
    MIB,
    bytes_in,
    file_catalog,
    more_fds,
    open_fds,
    until_true,
    wait_for_tick,
    write_checkpoint,
)


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


@pytest.fixture
def catalog() -> Iterator[Catalog]:
    with file_catalog() as catalog:
        yield catalog


@pytest.fixture
def no_descriptor_is_leaked() -> Iterator[None]:
    before = open_fds()
    yield
    until_true(lambda: not more_fds(before))  # threads close theirs a moment after a call has ended
