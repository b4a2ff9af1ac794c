"""An engine that loads through penstock says the same as with vLLM's own loader, and has the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from ...e2e.conftest import StartDaemon
from ...e2e.support import DaemonProcess
from .conftest import Engines, Expected, penstock


def tensor_bytes(directory: Path) -> int:
    import safetensors.torch

    files = directory.glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in safetensors.torch.load_file(file).values())


@pytest.mark.parametrize("name", ["llama", "float32 tied", "int8", "qwen2", "mixtral"])
def test_a_model_is_the_same_cold_and_warm(
    name: str, engines: Engines, daemon: DaemonProcess, models: dict[str, Path], by_vllm: Expected
) -> None:
    expected, before = by_vllm(name), daemon.read_bytes()
    assert engines.run(models[name], penstock(daemon)) == expected
    assert daemon.read_bytes() - before == tensor_bytes(models[name])
    assert engines.run(models[name], penstock(daemon)) == expected
    assert daemon.read_bytes() - before == tensor_bytes(models[name])


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_a_model_is_the_same_through_a_window(
    name: str, engines: Engines, start_daemon: StartDaemon, models: dict[str, Path], by_vllm: Expected
) -> None:
    daemon = start_daemon("--memory-limit", "4MiB")
    assert engines.run(models[name], penstock(daemon)) == by_vllm(name)
    assert daemon.read_bytes() == tensor_bytes(models[name])


def test_models_differ(by_vllm: Expected) -> None:
    """Or else the tests here could not fail."""
    said = [by_vllm(name) for name in ("llama", "other llama", "int8", "qwen2", "mixtral")]
    assert len({str(one["tokens"]) for one in said}) == len({one["weights"] for one in said}) == len(said)
