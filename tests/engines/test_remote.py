"""What the plugin replaces in vLLM for models in object storage, and the process that fetches their files."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import pytest

from penstock.client import errors
from penstock.client.adopt import vllm, vllm_remote
from penstock.client.adopt.vllm_files import fetch_apart

from ..e2e.conftest import StartDaemon

URI = "s3://bucket/model"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_CACHE_DIR", str(tmp_path / "cache"))


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text("{}")


def names(directory: Path) -> set[str]:
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)) for path in found if not path.name.startswith(".penstock")}


@pytest.mark.usefixtures("cache")
def test_another_process_fetches_what_lies_beside_the_weights(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon("--memory-limit", "4MiB")
    beside = {"config.json", "tokenizer.json", "chat_template.jinja", "code/model.py"}
    write(tmp_path / "model", *beside, "model.safetensors", "model.bin")
    assert names(fetch_apart(daemon.socket_dir, str(tmp_path / "model"))) == beside


@pytest.mark.usefixtures("cache")
def test_weights_of_the_layers_of_sentence_transformers_are_fetched_too(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    """vLLM goes on without them if they are not in the directory."""
    daemon = start_daemon("--memory-limit", "4MiB")
    beside = {"config.json", "vocab.txt", "1_Pooling/config.json", "2_Dense/config.json"}
    write(tmp_path / "model", *beside, "model.safetensors", "onnx/model.onnx", "2_Dense/model.safetensors")
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in (("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Dense", "Dense"))
    ]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    found = names(fetch_apart(daemon.socket_dir, str(tmp_path / "model")))
    assert found == {*beside, "modules.json", "2_Dense/model.safetensors"}


@pytest.mark.usefixtures("cache")
def test_what_another_process_could_not_fetch_is_told_as_the_error_it_is(
    start_daemon: StartDaemon, tmp_path: Path
) -> None:
    daemon = start_daemon("--memory-limit", "4MiB")
    with pytest.raises(errors.CheckpointNotFoundError, match="none"):
        fetch_apart(daemon.socket_dir, str(tmp_path / "none"))
    with pytest.raises(errors.DaemonUnavailableError, match="penstockd"):
        fetch_apart(tmp_path, str(tmp_path))


class ModelConfig:
    """As far as vLLM's goes: what it makes of the names that it is given."""

    def __init__(self, model: str, tokenizer: str, revision: str | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.revision = self.tokenizer_revision = revision
        self.model_weights = ""
        self.maybe_pull_model_tokenizer_for_runai(model, tokenizer)

    def maybe_pull_model_tokenizer_for_runai(self, model: str, tokenizer: str) -> None:
        self.model = f"pulled by vLLM: {model}"


class VllmConfig:
    """Refuses what vLLM's does."""

    def __init__(self, model_config: ModelConfig, load_format: str) -> None:
        self.model_config = model_config
        self.load_config = types.SimpleNamespace(load_format=load_format)
        self.try_verify_and_update_config()

    def try_verify_and_update_config(self) -> None:
        if self.model_config.model_weights.startswith("s3://"):
            raise ValueError("'load_format' must be another")


class EngineArgs:
    def __init__(self, model: str, load_format: str = "penstock", **more: Any) -> None:
        self.model, self.tokenizer, self.load_format = model, more.pop("tokenizer", model), load_format
        self.model_loader_extra_config = {"socket_dir": "/sockets"}
        self.revision: str | None = more.pop("revision", None)

    def create_model_config(self) -> ModelConfig:
        from vllm import config

        made: ModelConfig = vars(config)["ModelConfig"](self.model, self.tokenizer, self.revision)
        return made


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """vLLM's interfaces with the plugin's replacements, and a fetch that only says what it was asked for."""
    from vllm import config

    for kind in (ModelConfig, VllmConfig, EngineArgs):
        fresh = type(kind.__name__, (kind,), dict(vars(kind)))
        monkeypatch.setattr(config, kind.__name__, fresh, raising=False)
    monkeypatch.setattr(vllm_remote, "fetch_apart", lambda socket_dir, uri: f"{socket_dir} {uri}")
    engine = types.ModuleType("engine")
    vars(engine).update(EngineArgs=vars(config)["EngineArgs"], config=config)
    vars(engine)["is_cloud_storage"] = lambda model: model.startswith("s3://")
    return engine


def install(engine: Any) -> None:
    for _ in range(2):  # vLLM may do so more than once in a process
        vllm_remote.install(vllm.replaces_runai, engine)


@pytest.mark.parametrize("uri", [URI, "gs://bucket/model", "hf://org/repo@main", "abfss://c@a.x/model"])
def test_a_model_that_penstock_loads_is_configured_from_what_it_fetches(engine: Any, uri: str) -> None:
    install(engine)
    made = engine.EngineArgs(uri).create_model_config()
    assert (made.model, made.tokenizer, made.model_weights) == (f"/sockets {uri}", f"/sockets {uri}", uri)
    engine.config.VllmConfig(made, "penstock")
    assert made.model_weights == uri
    assert engine.is_cloud_storage(uri)
    other = engine.EngineArgs("/model", tokenizer=uri).create_model_config()
    assert (other.model, other.tokenizer, other.model_weights) == ("/model", f"/sockets {uri}", "")


def test_models_that_vllm_s_loaders_load_are_left_to_vllm(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(engine)
    for load_format in ("auto", "runai_streamer"):
        made = engine.EngineArgs(URI, load_format).create_model_config()
        assert made.model == f"pulled by vLLM: {URI}"
    made.model_weights = URI
    with pytest.raises(ValueError, match="must be another"):
        engine.config.VllmConfig(made, "auto")
    assert engine.EngineArgs("/model").create_model_config().model == "pulled by vLLM: /model"
    assert not engine.is_cloud_storage("/model")
    monkeypatch.setenv(vllm.REPLACE_VARIABLE, "1")
    for load_format in ("auto", "runai_streamer"):
        made = engine.EngineArgs(URI, load_format).create_model_config()
        assert made.model == f"/sockets {URI}"
        assert engine.config.VllmConfig(made, load_format).load_config.load_format == "runai_streamer"


def test_a_revision_apart_from_the_uri_is_refused(engine: Any) -> None:
    install(engine)
    with pytest.raises(ValueError, match="hf://org/repo@revision"):
        engine.EngineArgs("hf://org/repo", revision="v2").create_model_config()


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        ("ModelConfig", "maybe_pull_model_tokenizer_for_runai"),
        ("VllmConfig", "try_verify_and_update_config"),
        ("", "is_cloud_storage"),
    ],
)
def test_a_vllm_without_what_is_replaced_is_named_when_a_uri_is_given(
    engine: Any, monkeypatch: pytest.MonkeyPatch, owner: str, name: str
) -> None:
    from vllm import config

    bare = type(owner or "Nothing", (), {"__init__": lambda self, *_: None})
    if owner:
        monkeypatch.setattr(config, owner, bare, raising=False)
    else:
        monkeypatch.delattr(engine, name)
    install(engine)
    with pytest.raises(RuntimeError, match=name):
        engine.EngineArgs(URI).create_model_config()
