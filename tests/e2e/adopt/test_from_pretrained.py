"""Models of transformers whose files and weights come through a daemon equal those that it loads itself."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.client import StreamerClient, errors

from ..support import running_daemon
from .patched import Library

transformers: Any = Library("transformers")
TIED = {"n_layer": 2, "n_head": 2, "n_embd": 64, "vocab_size": 500, "n_positions": 32}


@pytest.fixture(scope="module", params=["-1", "4MiB"], ids=["full", "window"])
def client(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[StreamerClient]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        with running_daemon("--memory-limit", request.param) as daemon:
            yield daemon.client()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose head is tied, with a way to generate; one in shards, in bfloat16, with buffers."""
    top = tmp_path_factory.mktemp("models")
    torch.manual_seed(1)
    tied = transformers.GPT2LMHeadModel(transformers.GPT2Config(**TIED))
    tied.generation_config.do_sample, tied.generation_config.top_k = True, 7
    tied.save_pretrained(top / "tied")
    config = transformers.LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    sharded = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    sharded.save_pretrained(top / "sharded", max_shard_size="100KB")
    assert len(list((top / "sharded").glob("*.safetensors"))) > 2
    (top / "sharded" / "generation_config.json").unlink()
    return top


def same_model(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for own, other in (
        (found.state_dict(), expected.state_dict()),
        (dict(found.named_buffers()), dict(expected.named_buffers())),
    ):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert own[name].dtype == value.dtype, name
            assert torch.equal(own[name], value), name
    pointers = [{name: p.data_ptr() for name, p in m.state_dict().items()} for m in (found, expected)]
    ties = [{(a, b) for a in p for b in p if p[a] == p[b]} for p in pointers]
    assert ties[0] == ties[1]
    assert found.training == expected.training
    own, other = found.config.to_dict(), expected.config.to_dict()
    assert {k: v for k, v in own.items() if k != "_name_or_path"} == {
        k: v for k, v in other.items() if k != "_name_or_path"
    }
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    tokens = torch.arange(10)[None]
    with torch.inference_mode():
        assert torch.equal(found(tokens).logits, expected(tokens).logits)


@pytest.mark.parametrize("name", ["tied", "sharded"])
@pytest.mark.parametrize(
    "options", [{}, {"dtype": torch.float16}, {"dtype": "auto"}, {"attn_implementation": "eager"}], ids=str
)
def test_a_model_equals_the_one_that_transformers_loads(
    client: StreamerClient, saved: Path, name: str, options: dict[str, Any]
) -> None:
    cls = transformers.AutoModelForCausalLM
    found = client.from_pretrained(cls, saved / name, **options)
    same_model(found, cls.from_pretrained(saved / name, **options))


def test_a_model_s_own_class_does_as_well_and_options_of_its_configuration_count(
    client: StreamerClient, saved: Path
) -> None:
    cls = transformers.GPT2LMHeadModel
    options = {"output_loading_info": True, "summary_type": "mean"}
    found, info = client.from_pretrained(cls, saved / "tied", **options)
    expected, other = cls.from_pretrained(saved / "tied", **options)
    same_model(found, expected)
    assert found.config.summary_type == "mean"
    assert info["missing_keys"] == other["missing_keys"]
    assert found.generation_config.top_k == 7


def test_what_lies_beside_the_weights_is_where_the_model_says(client: StreamerClient, saved: Path) -> None:
    found = client.from_pretrained(transformers.AutoModel, saved / "tied")
    assert type(found) is transformers.GPT2Model
    directory = Path(found.name_or_path)
    assert (directory / "config.json").read_bytes() == (saved / "tied" / "config.json").read_bytes()
    assert not list(directory.glob("*.safetensors"))


def test_a_model_in_a_subfolder_is_loaded_from_there(
    client: StreamerClient, saved: Path, tmp_path: Path
) -> None:
    top = tmp_path / "custom"
    shutil.copytree(saved / "tied", top / "sub")
    cls = transformers.AutoModelForCausalLM
    found = client.from_pretrained(cls, top, subfolder="sub")
    same_model(found, cls.from_pretrained(top, subfolder="sub"))


def test_what_is_no_model_is_refused(client: StreamerClient, saved: Path, tmp_path: Path) -> None:
    cls = transformers.AutoModelForCausalLM
    with pytest.raises(errors.CheckpointNotFoundError):
        client.from_pretrained(cls, tmp_path / "nothing")
    with pytest.raises(ValueError, match="state_dict is given"):
        client.from_pretrained(cls, saved / "tied", state_dict={"x": 1})
    shutil.copy(saved / "tied" / "config.json", tmp_path)
    with pytest.raises(errors.CheckpointNotFoundError):
        client.from_pretrained(cls, tmp_path)
