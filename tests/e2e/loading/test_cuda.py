"""Loads to CUDA from a real daemon, onto a device that spoils data where its rules are broken."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from penstock.client.cuda import device as cuda

from ...client.fake_device import FakeDevice
from ..conftest import StartDaemon
from ..support import random_tensors, write_checkpoint

MIB = 1 << 20


@pytest.mark.parametrize("limit", ["8MiB", "64MiB"])
def test_a_device_gets_every_byte_and_the_daemon_everything_back(
    limit: str, start_daemon: StartDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = random_tensors(6, MIB) | {f"small.{number}": torch.rand(number) for number in range(500)}
    path = write_checkpoint(tmp_path / "model.safetensors", tensors)
    daemon = start_daemon("--memory-limit", limit)
    device = FakeDevice(laziness="random")
    monkeypatch.setattr(cuda, "open_device", lambda wanted: device)
    monkeypatch.setenv("PENSTOCK_PINNED_BYTES", "2MiB")
    for _ in range(2):
        left = dict(tensors)
        reads = []
        with daemon.client().load(path, device="cuda:0") as load:
            for name, tensor in load:
                reads.append((device.read_later(tensor), left.pop(name)))
                del tensor
        assert left == {}
        device.run_caller()
        assert all(read.data == tensor.numpy().tobytes() for read, tensor in reads)
        daemon.wait_idle()
        gc.collect()
        assert (device.pinned_bytes, device.allocated_bytes, device.violations) == (0, 0, [])
