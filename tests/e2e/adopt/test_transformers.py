"""A real model of transformers, its weights through a daemon; no byte from the network."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penstock.client import StreamerClient
from penstock.client.cli.demo import find_model

from ..support import running_daemon, same
from .patched import Library

transformers: Any = Library("transformers")
SENTENCES = ["A penstock carries water to a turbine.", "Weights", "The quick brown fox jumps."]


@pytest.fixture(scope="module", params=["-1", "64MB"], ids=["full", "window"])
def client(request: pytest.FixtureRequest) -> Iterator[StreamerClient]:
    """The second cannot hold the model at once."""
    with running_daemon("--memory-limit", request.param) as daemon:
        yield daemon.client()


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return find_model().parent


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Any:
    return transformers.BertModel.from_pretrained(model_dir).eval()


def embeddings(model: Any, model_dir: Path) -> torch.Tensor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    with torch.inference_mode():
        inputs = tokenizer(SENTENCES, padding=True, return_tensors="pt")
        hidden: torch.Tensor = model.eval()(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1)
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1))


def through(client: StreamerClient, source: Path) -> Any:
    """The few lines of docs/migrate.md."""
    config = transformers.AutoConfig.from_pretrained(source)
    kind = getattr(transformers, config.architectures[0])
    return kind.from_pretrained(None, config=config, state_dict=client.load_state_dict(source))


def test_embeddings_equal_those_of_from_pretrained(
    client: StreamerClient, model_dir: Path, reference: Any
) -> None:
    found = embeddings(through(client, model_dir), model_dir)
    assert torch.equal(found, embeddings(reference, model_dir))
    assert found.shape == (3, 384)


def test_load_into_fills_a_model_built_from_its_config(
    client: StreamerClient, model_dir: Path, reference: Any
) -> None:
    model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(model_dir))
    keys = client.load_into(model, model_dir, strict=False)
    assert keys.missing_keys == []
    assert keys.unexpected_keys == ["embeddings.position_ids"]  # which transformers computes by now
    assert torch.equal(embeddings(model, model_dir), embeddings(reference, model_dir))


def test_a_sharded_checkpoint_of_save_pretrained_loads(
    client: StreamerClient, model_dir: Path, reference: Any, tmp_path: Path
) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="20MB")
    shards = sorted(tmp_path.glob("model-*-of-*.safetensors"))
    assert len(shards) > 2
    assert (tmp_path / "model.safetensors.index.json").exists()
    with client.load(tmp_path) as load:
        same(load, {name: value for shard in shards for name, value in load_file(shard).items()})
    model = through(client, tmp_path)
    assert torch.equal(embeddings(model, model_dir), embeddings(reference, model_dir))


def test_a_model_whose_head_is_tied_is_filled_from_its_own_checkpoint(
    client: StreamerClient, tmp_path: Path
) -> None:
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=64, vocab_size=500, n_positions=32)
    origin, target = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    origin.save_pretrained(tmp_path)
    client.load_into(target, tmp_path)
    assert target.lm_head.weight is target.transformer.wte.weight
    for name, value in origin.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name
