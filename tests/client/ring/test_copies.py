from __future__ import annotations

import ctypes

import pytest
import torch

from penstock.client.ring import copies
from penstock.client.ring.copies import SMALL_BYTES, SPARE_BYTES, CopyPool
from penstock.client.ring.mapping import map_anonymous, unmap

SIZE = 4 * SMALL_BYTES


def copy(pool: CopyPool, value: int, size_bytes: int = SIZE) -> torch.Tensor:
    source = (ctypes.c_ubyte * size_bytes)()
    ctypes.memset(source, value, size_bytes)
    return pool.copy([size_bytes // 4, 4], torch.uint8, ctypes.addressof(source), size_bytes)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The bytes that pools have mapped, by address. What this process has in all hangs on others too."""
    areas: dict[int, int] = {}

    def note(size_bytes: int) -> int:
        address = map_anonymous(size_bytes)
        areas[address] = size_bytes
        return address

    def forget(address: int, size_bytes: int) -> None:
        assert areas.pop(address) == size_bytes
        unmap(address, size_bytes)

    monkeypatch.setattr(copies, "map_anonymous", note)
    monkeypatch.setattr(copies, "unmap", forget)
    return areas


def test_living_tensors_keep_their_bytes_whatever_is_copied_after_them() -> None:
    pool = CopyPool()
    tensors = [copy(pool, value) for value in range(5)]
    views = [tensor[1:] for tensor in tensors]
    del tensors
    pool.close()
    more = [copy(pool, 9) for _ in range(5)]
    assert [int(view.min()) for view in views] == [int(view.max()) for view in views] == list(range(5))
    assert all((tensor == 9).all() for tensor in more)


def test_the_memory_of_a_tensor_that_died_is_used_again() -> None:
    pool = CopyPool()
    tensor = copy(pool, 1)
    address = tensor.data_ptr()
    del tensor
    again = copy(pool, 2, SIZE - 4096)
    assert again.data_ptr() == address
    assert (again == 2).all()
    smaller = copy(pool, 3, SMALL_BYTES)
    assert (again == 2).all()
    assert smaller.data_ptr() != address


def test_memory_much_too_large_is_not_used() -> None:
    pool = CopyPool()
    tensor = copy(pool, 1, 16 * SMALL_BYTES)
    address = tensor.data_ptr()
    del tensor
    assert copy(pool, 2, SMALL_BYTES).data_ptr() != address


def test_what_is_kept_for_reuse_is_bounded_and_given_back_at_the_end(mapped: dict[int, int]) -> None:
    pool = CopyPool()
    sizes = [(64 + 7 * number) * SMALL_BYTES for number in range(20)]
    for size in sizes:
        copy(pool, 1, size)
        assert sum(mapped.values()) <= SPARE_BYTES
    assert sum(sizes) > 3 * SPARE_BYTES
    last = copy(pool, 7)
    pool.close()
    assert list(mapped) == [last.data_ptr()]
    assert (last == 7).all()
    del last
    assert not mapped
