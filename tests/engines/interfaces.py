"""The parts of vLLM 0.33 and SGLang 0.5.23 that the plugins touch, as far as they touch them.

`install` puts them where the engines would be imported from; where vLLM itself is installed the tests take
that instead. docs/vllm.md says what was checked against which of them.
"""

from __future__ import annotations

import enum
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch


@dataclass
class LoadConfig:
    load_format: str = "auto"
    download_dir: str | None = None
    model_loader_extra_config: Any = field(default_factory=dict)
    ignore_patterns: list[str] | str = field(default_factory=lambda: ["original/**/*"])
    use_tqdm_on_load: bool = True


class BaseModelLoader(ABC):
    def __init__(self, load_config: LoadConfig) -> None:
        self.load_config = load_config

    @abstractmethod
    def download_model(self, model_config: Any) -> None: ...

    @abstractmethod
    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None: ...


class DefaultModelLoader(BaseModelLoader):
    def download_model(self, model_config: Any) -> None:
        raise NotImplementedError

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        raise NotImplementedError

    def _get_weights_iterator(self, source: Any) -> Iterator[tuple[str, torch.Tensor]]:
        """Of files that are no safetensors."""
        for pattern in source.allow_patterns_overrides or ["*.bin"]:
            for file in sorted(Path(source.model_or_path, source.subfolder or "").glob(pattern)):
                for name, tensor in torch.load(file).items():
                    yield source.prefix + name, tensor

    def track_weights_loading(
        self, model: torch.nn.Module, loaded_weights: set[str] | None, quantized: bool = False
    ) -> None:
        """Without what it makes of modules that are quantized while they are loaded."""
        if loaded_weights is not None:
            missing = {name for name, _ in model.named_parameters()} - loaded_weights
            if missing:
                raise ValueError(f"Following weights were not initialized from checkpoint: {missing}")


class PPMissingLayer(torch.nn.Identity):
    """Where a layer would be that another pipeline stage has."""


@dataclass
class FusedMoEParallelConfig:
    ep_size: int
    ep_rank: int
    dp_size: int = 1
    dp_rank: int = 0


class RoutedExperts(torch.nn.Module):
    """The experts of a layer that this rank holds."""

    def __init__(self, held: list[int], count: int, parallel: FusedMoEParallelConfig) -> None:
        super().__init__()
        self.global_num_experts = count
        self.expert_map_manager = SimpleNamespace(get_local_expert_ids=lambda: held)
        self.moe_config = SimpleNamespace(moe_parallel_config=parallel)


def compute_local_expert_ids(
    num_experts: int, ep_size: int, ep_rank: int, placement: str = "linear"
) -> set[int] | None:
    """For numbers of experts that ranks divide."""
    if ep_size == 1:
        return None
    if placement == "round_robin":
        return set(range(ep_rank, num_experts, ep_size))
    share = num_experts // ep_size
    return set(range(ep_rank * share, (ep_rank + 1) * share))


def parse_expert_id(weight_name: str) -> int | None:
    found = re.search(r"\.experts\.(\d+)\.", weight_name)
    return int(found[1]) if found else None


def should_skip_weight(weight_name: str, local_expert_ids: set[int] | None) -> bool:
    expert = parse_expert_id(weight_name)
    if expert is None or local_expert_ids is None or not weight_name.endswith((".weight", ".weight_packed")):
        return False
    return expert not in local_expert_ids


@dataclass
class ParallelConfig:
    enable_expert_parallel: bool = False
    enable_eplb: bool = False
    expert_placement_strategy: str = "linear"
    data_parallel_size_local: int = 1
    data_parallel_rank_local: int | None = None


@dataclass
class SpeculativeConfig:
    target_model_config: Any
    draft_load_config: LoadConfig | None = None


@dataclass
class VllmConfig:
    model_config: Any
    load_config: LoadConfig
    speculative_config: SpeculativeConfig | None = None
    parallel_config: ParallelConfig = field(default_factory=ParallelConfig)


def get_current_vllm_config() -> VllmConfig:
    raise AssertionError("Current vLLM config is not set.")


def get_draft_load_config(vllm_config: VllmConfig) -> LoadConfig:
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.draft_load_config is not None:
        return speculative.draft_load_config
    return vllm_config.load_config


def reload_weights(
    vllm_config: VllmConfig, model: Any, weights_path: str | None, *, get_loader: Callable[[Any], Any]
) -> None:
    """As far as weights of a checkpoint on disk go: what it does to the configuration, and calls."""
    model_config = vllm_config.model_config
    model_loader: Any = get_loader(vllm_config.load_config)
    if weights_path is not None:
        model_config.model = weights_path
        model_config.model_weights = ""
        model_config.revision = None
    model.load_weights(model_loader.get_all_weights(model_config, model))


_loaders: dict[str, type[BaseModelLoader]] = {}


def register_model_loader(load_format: str) -> Callable[[type], type]:
    def register(loader: type) -> type:
        if not issubclass(loader, BaseModelLoader):
            raise ValueError("The model loader must be a subclass of `BaseModelLoader`.")
        _loaders[load_format] = loader
        return loader

    return register


def get_model_loader(load_config: LoadConfig) -> BaseModelLoader:
    return _loaders[load_config.load_format](load_config)


class Coordinator:
    """Ranks that the engine has put together."""

    def __init__(self, world_size: int, cpu_group: Any = None) -> None:
        self.world_size = world_size
        self.cpu_group = cpu_group


tp_group = Coordinator(1)
pp_group = Coordinator(1)


class HookType(enum.Enum):
    AROUND = "around"
    REPLACE = "replace"


class HookRegistry:
    hooks: ClassVar[dict[str, tuple[Callable[..., Any], HookType]]] = {}

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType) -> None:
        cls.hooks[target] = (hook, hook_type)


LOAD_FORMAT_CHOICES = ["auto", "runai_streamer"]
"""SGLang's."""

_MODULES: dict[str, dict[str, Any]] = {
    "vllm": {},
    "vllm.config": {
        "get_current_vllm_config": get_current_vllm_config,
    },
    "vllm.config.load": {"LoadConfig": LoadConfig},
    "vllm.logger": {"init_logger": logging.getLogger},
    "vllm.distributed": {"get_tp_group": lambda: tp_group, "get_pp_group": lambda: pp_group},
    "vllm.model_executor": {},
    "vllm.model_executor.model_loader": {
        "BaseModelLoader": BaseModelLoader,
        "get_model_loader": get_model_loader,
        "register_model_loader": register_model_loader,
    },
    "vllm.model_executor.model_loader.base_loader": {"BaseModelLoader": BaseModelLoader},
    "vllm.model_executor.model_loader.default_loader": {"DefaultModelLoader": DefaultModelLoader},
    "vllm.model_executor.model_loader.ep_weight_filter": {
        "compute_local_expert_ids": compute_local_expert_ids,
        "parse_expert_id": parse_expert_id,
        "should_skip_weight": should_skip_weight,
    },
    "vllm.model_executor.layers": {},
    "vllm.model_executor.layers.fused_moe": {},
    "vllm.model_executor.layers.fused_moe.routed_experts": {"RoutedExperts": RoutedExperts},
    "vllm.model_executor.models": {},
    "vllm.model_executor.models.utils": {"PPMissingLayer": PPMissingLayer},
    "sglang": {},
    "sglang.srt": {},
    "sglang.srt.distributed": {"get_tp_group": lambda: tp_group},
    "sglang.srt.server_args": {
        "LOAD_FORMAT_CHOICES": LOAD_FORMAT_CHOICES,
        "add_load_format_choices": LOAD_FORMAT_CHOICES.extend,
    },
    "sglang.srt.plugins": {},
    "sglang.srt.plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
}


def install() -> None:
    for engine in ("vllm", "sglang"):
        if engine in sys.modules or (engine == "vllm" and find_spec(engine) is not None):
            continue
        for name, members in _MODULES.items():
            if name.split(".")[0] == engine:
                module = ModuleType(name)
                module.__path__ = []
                vars(module).update(members)
                sys.modules[name] = module
                parent, _, child = name.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], child, module)
