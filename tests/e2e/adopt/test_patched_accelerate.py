"""accelerate's loading of checkpoints through the daemon: the same modules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ..support import DaemonProcess
from .patched import Library, library_daemon, reading_through, same_modules

accelerate: Any = Library("accelerate")


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with library_daemon() as daemon:
        yield daemon


def module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)), nn.BatchNorm1d(64))


@pytest.mark.parametrize("shard", ["10GB", "40KB"], ids=["whole", "sharded"])
@pytest.mark.parametrize("options", [{}, {"device_map": {"": "cpu"}}, {"dtype": torch.float16}], ids=str)
def test_load_checkpoint_in_model_fills_the_same(
    daemon: DaemonProcess, tmp_path: Path, shard: str, options: dict[str, Any]
) -> None:
    accelerate.Accelerator(cpu=True).save_model(module(1), str(tmp_path), max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (shard == "40KB")
    wanted, found = module(2), module(3)
    accelerate.load_checkpoint_in_model(wanted, str(tmp_path), **options)
    with reading_through(daemon, tmp_path):
        accelerate.load_checkpoint_in_model(found, str(tmp_path), **options)
    same_modules(found, wanted)
    del found


def test_layers_offloaded_to_disk_are_dispatched_alike(daemon: DaemonProcess, tmp_path: Path) -> None:
    accelerate.Accelerator(cpu=True).save_model(module(1), str(tmp_path / "model"), max_shard_size="40KB")
    device_map = {str(number): "disk" if number > 2 else "cpu" for number in range(7)}
    inputs = torch.rand(3, 64)
    wanted = module(2).eval()
    accelerate.load_checkpoint_in_model(wanted, str(tmp_path / "model"))
    with reading_through(daemon, tmp_path / "model"), torch.inference_mode():
        with accelerate.init_empty_weights():
            empty = module(3)
        found = accelerate.load_checkpoint_and_dispatch(
            empty, str(tmp_path / "model"), device_map=device_map, offload_folder=str(tmp_path / "offload")
        ).eval()
        assert torch.equal(found(inputs), wanted(inputs))
    del found, empty
