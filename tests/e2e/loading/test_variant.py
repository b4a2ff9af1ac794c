"""`variant=` chooses one of a directory's variants by every way of loading, on disk and in object storage."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch

from penstock.client import errors
from penstock.client.cli import commands as cli

from ...s3.conftest import bucket, moto, no_credentials
from ...s3.moto import MotoServer
from ...s3.support import Bucket, environment
from ..support import DaemonProcess, running_daemon

__all__ = ["bucket", "moto", "no_credentials"]

DEFAULT, FP16, BF16 = {"a": 1.0, "b": 2.0}, {"a": 16.0, "b": 17.0}, {"a": 32.0, "b": 33.0}
"""One file, one file, and two shards with an index of their own."""
FILES = {
    "model.safetensors": DEFAULT,
    "model.fp16.safetensors": FP16,
    "model.bf16-00001-of-00002.safetensors": {"a": BF16["a"]},
    "model.bf16-00002-of-00002.safetensors": {"b": BF16["b"]},
}
INDEX = {
    "model.safetensors.index.bf16.json": {
        "a": "model.bf16-00001-of-00002.safetensors",
        "b": "model.bf16-00002-of-00002.safetensors",
    }
}


@pytest.fixture(scope="module")
def daemon(moto: MotoServer) -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "64MiB", environment=environment(moto.endpoint)) as daemon:
        yield daemon


@pytest.fixture(params=["disk", "s3"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the variants are."""
    contents = {name: safetensors.torch.save(tensors(values)) for name, values in FILES.items()}
    contents |= {name: json.dumps({"weight_map": files}).encode() for name, files in INDEX.items()}
    if request.param == "s3":
        bucket: Bucket = request.getfixturevalue("bucket")
        for name, content in contents.items():
            bucket.put(f"m/{name}", content)
        return bucket.uri("m/")
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    return str(tmp_path)


def tensors(values: dict[str, float]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([value]) for name, value in values.items()}


def floats(state: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: tensor.item() for name, tensor in state.items()}


@pytest.mark.parametrize(("variant", "wanted"), [(None, DEFAULT), ("fp16", FP16), ("bf16", BF16)])
def test_each_way_of_loading_gives_the_variant_that_was_asked_for(
    variant: str | None, wanted: dict[str, float], directory: str, daemon: DaemonProcess
) -> None:
    module = torch.nn.Module()
    for name in wanted:
        module.register_parameter(name, torch.nn.Parameter(torch.zeros(1)))
    with daemon.client() as client:
        with client.load(directory, variant=variant) as load:
            assert floats(dict(load)) == wanted
        assert floats(client.load_state_dict(directory, variant=variant, memory_limit=0)) == wanted
        client.load_into(module, directory, variant=variant)
    assert floats(module.state_dict()) == wanted


def test_what_was_prefetched_of_a_variant_is_warm_for_it_alone(directory: str, daemon: DaemonProcess) -> None:
    with daemon.client() as client:
        client.prefetch(directory, variant="bf16")
        before = daemon.read_bytes()
        assert floats(client.load_state_dict(directory, variant="bf16")) == BF16
        assert daemon.read_bytes() == before
        assert floats(client.load_state_dict(directory)) == DEFAULT
        assert daemon.read_bytes() > before


def test_the_command_line_loads_and_prefetches_a_variant(
    directory: str, daemon: DaemonProcess, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--socket-dir", str(daemon.socket_dir), "--no-progress"]
    before = daemon.read_bytes()
    assert cli.main(["prefetch", directory, "--variant", "fp16", *where]) == 0
    read = daemon.read_bytes()
    assert read > before
    assert cli.main(["load", directory, "--variant", "fp16", *where]) == 0
    assert daemon.read_bytes() == read
    assert cli.main(["load", directory, "--variant", "int8", *where]) == 1
    assert "int8" in capsys.readouterr().err


def test_a_variant_that_is_not_there_is_refused_with_those_that_are(
    directory: str, daemon: DaemonProcess
) -> None:
    with daemon.client() as client, pytest.raises(errors.CheckpointNotFoundError, match="fp16") as caught:
        client.load_state_dict(directory, variant="int8")
    assert "int8" in str(caught.value)
