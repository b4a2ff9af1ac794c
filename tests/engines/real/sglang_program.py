"""Loads models with SGLang's own arguments, plugins, groups, model classes and loader, on a CPU, and writes
into a file what they hold. Run by test_sglang.py with a request in JSON.

SGLang does not start here as a whole: it wants kernels for GPUs, or for a CPU with AMX. torchvision, of which
PyPI has builds for CUDA alone, is replaced by stand-ins; no model here uses it.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.engines.real.agreed import ENVIRONMENT

MODELS = {"llama", "qwen2"}
"""Modules with models; SGLang would import all of its 250."""
REFUSED = (ValueError, RuntimeError)
os.environ.update(ENVIRONMENT)


class _Anything(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _StandIn:
    """Finds every module of torchvision, with anything in it."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> Any:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """It has all it needs."""


def leave_models_out() -> None:
    spec = importlib.util.find_spec("sglang")
    assert spec is not None
    assert spec.origin is not None
    modules = {path.stem for path in Path(spec.origin).with_name("srt").glob("models/*.py")}
    os.environ["SGLANG_DISABLED_MODEL_ARCHS"] = ",".join(sorted(modules - MODELS))


def digest(model: Any) -> str:
    """Of all parameters, as they are after loading."""
    import torch

    state = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        tensor = parameter.detach().contiguous()
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        state.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def configure(arguments: list[str], rank: int) -> Any:
    """As SGLang's launcher and its scheduler process do."""
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.runtime_context import SpawnRanks, publish
    from sglang.srt.server_args import prepare_server_args

    common = ["--device", "cpu", "--skip-tokenizer-init", "--attention-backend", "torch_native"]
    parsed = prepare_server_args([*common, *arguments])
    parsed.resolve_once()
    publish(parsed, role="scheduler", ranks=SpawnRanks(world_rank=rank, gpu_id=rank))
    return parsed


def join(store: str, rank: int, size: int) -> None:
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel

    init_distributed_environment(size, rank, f"file://{store}", rank, "gloo")
    initialize_model_parallel(backend="gloo")


def load(
    parsed: Any,
    path: str,
    *,
    load_format: str,
    extra: dict[str, Any],
    draft: bool = False,
    update: str = "",
) -> dict[str, Any]:
    """What a model holds, also after it was updated from another path, or what was said against it."""
    from sglang.srt.configs.device_config import DeviceConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_executor.model_runner_components.load_model_utils import build_load_config
    from sglang.srt.model_loader import get_model
    from sglang.srt.runtime_context import get_model as configuration

    model_config = ModelConfig.from_server_args(parsed, model_path=path, is_draft_model=draft)
    with configuration().override(load_format=load_format, model_loader_extra_config=json.dumps(extra)):
        load_config = build_load_config(
            server_args=parsed,
            tp_rank=0,
            remote_instance_weight_transporter_engine=None,
            remote_instance_weight_transporter_session_id="",
            draft_model_idx=None,
            weight_cache_mode="off",
            weight_cache_socket=None,
        )
        try:
            model = get_model(
                model_config=model_config, load_config=load_config, device_config=DeviceConfig("cpu", 0)
            )
        except REFUSED as error:
            return {"refused": str(error)}
        found = {"class": type(model).__name__, "weights": digest(model)}
        if update:
            updated, message = update_from_disk(model, model_config, update, load_format)
            found |= {"updated": digest(model) if updated else message}
        return found


def update_from_disk(model: Any, model_config: Any, path: str, load_format: str) -> tuple[bool, str]:
    """SGLang's own function, of a class that wants the whole of a running engine."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    engine = types.SimpleNamespace(
        _assert_weight_cache_inactive=lambda operation: None,
        get_model=lambda: model,
        device="cpu",
        gpu_id=0,
        model_config=model_config,
        update_model_fields=lambda *arguments, **fields: None,
    )
    done: tuple[bool, str] = WeightUpdater.update_weights_from_disk(engine, path, load_format)
    return done


def main(request: dict[str, Any]) -> None:
    from transformers.utils import import_utils

    import_utils.is_torchvision_available()  # once and for all, before there is something by that name
    sys.meta_path.append(_StandIn())
    leave_models_out()
    rank, size = request["rank"], request["size"]
    parsed = configure(request["arguments"], rank)
    join(request["store"], rank, size)
    answers = {name: load(parsed, **step) for name, step in request["steps"].items()}
    Path(request["answer"]).write_text(json.dumps(answers))
    sys.stderr.flush()
    os._exit(0)  # SGLang's threads and groups need not end in order


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
