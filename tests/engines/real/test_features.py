"""What vLLM does with a model beside loading it once: adapters, pooling, drafts, weights loaded again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from ...e2e.support import DaemonProcess
from .conftest import Engines, auto, done, penstock
from .models import MODELS, write_config
from .test_tokens import tensor_bytes


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    """A directory for "llama" that holds no weights."""
    directory = tmp_path / "config"
    directory.mkdir()
    write_config(directory, MODELS["llama"])
    return directory


def test_an_adapter_changes_what_the_model_says_as_with_vllm_s_own_loader(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path]
) -> None:
    more: dict[str, Any] = {
        "options": {"enable_lora": True, "max_lora_rank": 8},
        "lora": str(models["adapter"]),
    }
    expected = engines.run(models["llama"], auto(), **more)
    assert engines.run(models["llama"], penstock(daemon), **more) == expected
    assert expected["adapted"] != expected["tokens"]


def test_a_pooling_model_gives_the_same_vectors(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path]
) -> None:
    expected = engines.run(models["qwen2"], auto(), program="embed")
    assert engines.run(models["qwen2"], penstock(daemon), program="embed") == expected
    first, second = expected["vectors"]
    assert first != second


def test_layers_in_files_that_are_no_safetensors_are_loaded_by_vllm_and_the_rest_through_penstock(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path]
) -> None:
    expected = engines.run(models["bge-m3"], auto(), program="pool")
    before = daemon.read_bytes()
    assert engines.run(models["bge-m3"], penstock(daemon), program="pool") == expected
    assert daemon.read_bytes() - before == tensor_bytes(models["bge-m3"])


def test_an_engine_reloads_weights_from_the_path_that_is_given_and_else_from_the_source(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path], config_only: Path
) -> None:
    own, other = (engines.run(models[name], auto())["tokens"] for name in ("llama", "other llama"))
    assert own != other
    reloads = (None, str(models["other llama"]), None, str(models["llama"]))
    expected = [own, other, other, own]
    plain = engines.run(models["llama"], penstock(daemon), reloads=reloads)
    assert [plain["tokens"], *plain["reloaded"]] == [own, *expected]
    source = penstock(daemon, source=str(models["llama"]))
    beside = engines.run(config_only, source, reloads=(*reloads[:3], str(config_only)))
    assert [beside["tokens"], *beside["reloaded"]] == [own, *expected]


def speculating(draft: Path, **more: Any) -> dict[str, Any]:
    config = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": 2, **more}
    return {"speculative_config": config}


def test_a_draft_model_has_its_own_weights_whatever_source_the_target_has(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path], config_only: Path, tmp_path: Path
) -> None:
    options = speculating(models["draft"])
    expected = engines.run(models["llama"], auto(), options=options)
    assert engines.run(models["llama"], penstock(daemon), options=options) == expected
    source = penstock(daemon, source=str(models["llama"]))
    assert engines.run(config_only, source, options=options) == expected
    draft_config = tmp_path / "draft config"
    draft_config.mkdir()
    write_config(draft_config, MODELS["draft"])
    own = speculating(draft_config, draft_load_config=penstock(daemon, source=str(models["draft"])))
    assert engines.run(config_only, source, options=own) == expected


def test_a_checkpoint_without_one_of_the_weights_is_refused_as_by_vllm_s_own_loader(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(models["llama"], broken)
    tensors = safetensors.torch.load_file(broken / "model.safetensors")
    del tensors["model.layers.2.input_layernorm.weight"]
    safetensors.torch.save_file(tensors, broken / "model.safetensors")
    said = [
        done(engines.launch("generate", broken, load, {}), "failed") for load in (auto(), penstock(daemon))
    ]
    assert said[0] == said[1]
    assert "model.layers.2.input_layernorm.weight" in said[0]["message"]


def test_the_log_tells_how_long_loading_took(
    engines: Engines, daemon: DaemonProcess, models: dict[str, Path]
) -> None:
    engine = engines.launch("generate", models["llama"], penstock(daemon), {})
    done(engine)
    assert "Loading weights took " in engine.errors()
