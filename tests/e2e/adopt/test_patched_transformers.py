"""transformers' `from_pretrained` through the daemon: the same models."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ..support import DaemonProcess
from .patched import Library, library_daemon, reading_through, same_modules

transformers: Any = Library("transformers")


@pytest.fixture(scope="module", params=["-1", "6MiB"], ids=["full", "window"])
def daemon(request: pytest.FixtureRequest) -> Iterator[DaemonProcess]:
    with library_daemon(request.param) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model in one file, in shards, and in another dtype."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=256, intermediate_size=512, num_hidden_layers=12,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    top = tmp_path_factory.mktemp("llama")
    model.save_pretrained(top / "whole")
    model.save_pretrained(top / "sharded", max_shard_size="8MB")
    model.to(torch.bfloat16).save_pretrained(top / "bfloat16")
    assert len(list((top / "sharded").glob("*.safetensors"))) > 2
    return {name: top / name for name in ("whole", "sharded", "bfloat16")}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("whole", {}),
        ("sharded", {}),
        ("sharded", {"device_map": "cpu"}),
        ("sharded", {"dtype": "auto", "device_map": {"": "cpu"}}),
        ("bfloat16", {"dtype": torch.float16}),
        ("bfloat16", {"dtype": "auto"}),
    ],
    ids=["whole", "sharded", "device_map", "auto", "dtype", "bfloat16"],
)
def test_a_causal_model_is_the_same(
    daemon: DaemonProcess, model_dirs: dict[str, Path], name: str, options: dict[str, Any]
) -> None:
    directory = model_dirs[name]
    load = transformers.AutoModelForCausalLM.from_pretrained
    wanted = load(directory, **options)
    with reading_through(daemon, directory):
        found = load(directory, **options)
    same_modules(found, wanted)
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, wanted(tokens).logits)
    with torch.no_grad():
        next(found.parameters()).add_(1)


def test_without_threads_it_is_the_same(
    daemon: DaemonProcess, model_dirs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = model_dirs["sharded"]
    wanted = transformers.AutoModelForCausalLM.from_pretrained(directory)
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with reading_through(daemon, directory):
        same_modules(transformers.AutoModelForCausalLM.from_pretrained(directory), wanted)


def test_offloaded_layers_are_the_same(
    daemon: DaemonProcess, model_dirs: dict[str, Path], tmp_path: Path
) -> None:
    """accelerate's hooks read what is offloaded when it is used."""
    directory = model_dirs["sharded"]
    wanted = transformers.AutoModelForCausalLM.from_pretrained(directory)
    device_map = {
        "model.embed_tokens": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        "model.rotary_emb": "cpu",
    }
    device_map |= {f"model.layers.{number}": "disk" if number > 9 else "cpu" for number in range(12)}
    tokens = torch.arange(10)[None]
    with reading_through(daemon, directory), torch.inference_mode():
        found = transformers.AutoModelForCausalLM.from_pretrained(
            directory, device_map=device_map, offload_folder=tmp_path
        )
        assert torch.equal(found(tokens).logits, wanted(tokens).logits)
