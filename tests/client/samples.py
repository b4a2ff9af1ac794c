"""A checkpoint for the fake daemon, and what tests ask of its tensors."""

from __future__ import annotations

import pytest
import torch

from .fake_daemon import FakeTensor, random_tensors

TENSORS = random_tensors(40, 300_000)
TOTAL_BYTES = sum(len(tensor.data) for tensor in TENSORS)
WINDOW = 2  # slabs; the checkpoint goes through it three times
FULL_AND_WINDOW = pytest.mark.parametrize("window_slabs", [0, WINDOW], ids=["full", "window"])


def data(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.numpy().tobytes())


def assert_equal(state: dict[str, torch.Tensor], tensors: list[FakeTensor] = TENSORS) -> None:
    assert list(state) == [tensor.name for tensor in tensors]
    for tensor in tensors:
        assert data(state[tensor.name]) == tensor.data, tensor.name
