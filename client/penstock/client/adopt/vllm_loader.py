"""vLLM's loader for `load_format="penstock"`. Imports vLLM; `vllm.py` imports this when vLLM asks.

    download_model   for a model of the Hugging Face Hub, as vLLM's other loaders do
    load_weights     the source's tensors, in the order of its files, into model.load_weights()
    get_all_weights  the same without the model's part; vLLM reloads weights by it

Every rank takes all tensors and keeps its slices of them, as vLLM's models do. Ranks that use the same daemon
join one group, so that a checkpoint larger than the staging buffer is still read once.

The option `source` stands for the weights of one model, the one that was given to vLLM. vLLM uses the same
options for other weights too: for a draft model, and for another path that `reload_weights` is given. These
load from their own path, not from `source`.
"""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from ..client import StreamerClient
from ..system.sizes import parse_memory_limit
from .engine_ranks import agree_on_group

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig

_INDEX_NAME = "model.safetensors.index.json"
_INDEX_PATTERN = "*.safetensors.index.json"
_PATTERN = "*.safetensors"
_MODEL_PATTERN = "model*.safetensors"
_MISTRAL_PATTERN = "consolidated*.safetensors*"
# On a model's configuration: the model for which `source` has been loaded. vLLM changes `model` for a reload
# from elsewhere, and keeps the options.
_LOADED_AS = "_penstock_loaded_as"


@dataclass(frozen=True, slots=True)
class LoaderOptions:
    """What `model_loader_extra_config` says."""

    # In the place of the model's own path or URI.
    source: str | list[str] | None = None
    socket_dir: str | None = None
    memory_limit: int | str | None = None
    # "cpu", "cuda", or "auto".
    device: str = "auto"
    # Whether ranks that load the same share one pass over the storage.
    distributed: bool = True
    # Whether a weight that the checkpoint lacks is an error. None is as vLLM's own loader has it: it is one,
    # unless the model is quantized or does not tell what it loaded.
    enable_weights_track: bool | None = None

    @classmethod
    def parse(cls, extra: Any) -> LoaderOptions:
        """Raises ValueError that names the key."""
        if not isinstance(extra, dict):
            raise ValueError(
                f"model_loader_extra_config is a {type(extra).__name__} and no dict: give a JSON object"
            )
        if "concurrency" in extra:
            raise ValueError(
                "model_loader_extra_config: concurrency is the daemon's, not a load's: leave it out here, "
                "and start `penstockd --concurrency N`"
            )
        known = sorted(cls.__dataclass_fields__)
        if unknown := sorted(set(extra) - set(known)):
            raise ValueError(
                f"model_loader_extra_config: load_format penstock does not know {unknown}; use {known}"
            )
        options = cls(**extra)
        sources = options.source if isinstance(options.source, list) else [options.source]
        socket_dir, device = options.socket_dir, options.device
        for name, right, expected in (
            ("source", "source" not in extra or _are_names(sources), "a path, a URI, or a list of these"),
            ("socket_dir", socket_dir is None or _are_names([socket_dir]), "the directory of a daemon"),
            ("device", device in ("auto", "cpu", "cuda"), '"auto", "cpu" or "cuda"'),
            ("distributed", isinstance(options.distributed, bool), "true or false"),
            ("enable_weights_track", options.enable_weights_track in (None, True, False), "true or false"),
        ):
            if not right:
                raise ValueError(
                    f"model_loader_extra_config: {name}={extra[name]!r} makes no sense; give {expected}"
                )
        try:
            parse_memory_limit(options.memory_limit)
        except TypeError as error:
            raise ValueError(f"model_loader_extra_config: {error}") from error
        return options


class PenstockModelLoader(BaseModelLoader):  # type: ignore[misc]
    """See the module."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.options = LoaderOptions.parse(load_config.model_loader_extra_config or {})

    def download_model(self, model_config: ModelConfig) -> None:
        if self.options.source is None:
            self._source(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises ValueError where the checkpoint lacks weights of the model, as vLLM's own loader does."""
        vars(model_config).setdefault(_LOADED_AS, model_config.model)
        loaded = model.load_weights(self.get_all_weights(model_config, model))  # type: ignore[operator]
        track = self.options.enable_weights_track
        quantized = getattr(model_config, "quantization", None) is not None
        if track or (track is None and loaded is not None and not quantized):
            _check_complete(model, loaded, quantized)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the model's checkpoint, then of those that its parts bring along.

        Raises ValueError at once where `source` may or may not be meant.
        """
        source = self._source(model_config, getattr(model, "allow_patterns_overrides", None))
        return self._weights(source, model_config, model)

    def _weights(
        self, source: str | list[str], model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        draft = getattr(model_config, "runner", None) == "draft"
        unused = getattr(model, "is_unused_checkpoint_weight", None)
        yield from self._load(source, unused=unused, stages_agree=not draft)
        for part in getattr(model, "secondary_weights", ()):
            folder = self._folder(part.model_or_path, part.revision)
            source = _files(os.path.join(folder, part.subfolder or ""), part.allow_patterns_overrides)
            unused = getattr(part, "is_unused_weight", None)
            for name, tensor in self._load(source, unused=unused, stages_agree=False):
                yield part.prefix + name, tensor

    def _load(
        self, source: str | list[str], *, unused: Callable[[str], bool] | None, stages_agree: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        client = StreamerClient(self.options.socket_dir)
        group = None
        if self.options.distributed and torch.distributed.is_initialized():
            # Stages of a pipeline may use different tensors, and only the last one has a draft model.
            groups = _rank_groups(stages_too=stages_agree and unused is None)
            group = agree_on_group(client.socket_dir, source, groups)
        with client.load(
            source,
            device=self._device(),
            tensors=None if unused is None else lambda name: not unused(name),
            memory_limit=self.options.memory_limit,
            group=group,
            progress=self.load_config.use_tqdm_on_load and _rank() == 0,
        ) as load:
            yield from load

    def _device(self) -> str:
        """A rank that keeps a slice of each tensor copies less from the host than through the device."""
        if self.options.device != "auto":
            return self.options.device
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        return "cuda" if alone and torch.cuda.is_available() else "cpu"

    def _source(self, model_config: ModelConfig, patterns: list[str] | None = None) -> str | list[str]:
        if self.options.source is not None and self._is_sources_model(model_config):
            return self.options.source
        # vLLM keeps the URI of a model in object storage here, and a directory without weights in `model`.
        uri = getattr(model_config, "model_weights", "")
        if uri:
            return str(uri)
        return _files(self._folder(model_config.model, model_config.revision), patterns)

    def _is_sources_model(self, model_config: ModelConfig) -> bool:
        """Whether `source` has the weights of this model, and not of the one that it was given for."""
        if getattr(model_config, "runner", None) == "draft":
            return _draft_takes_source(model_config, self.load_config, self.options.source)
        loaded_as = vars(model_config).get(_LOADED_AS)
        if loaded_as is None:
            raise ValueError(
                f"weights of {model_config.model} are to be reloaded, but model_loader_extra_config has the "
                f"source {self.options.source!r}, from which this process loaded no model before, so either "
                "may be meant: leave source out of the load config, and give reload_weights the path"
            )
        return bool(loaded_as == model_config.model)

    def _folder(self, model: str, revision: str | None) -> str:
        if os.path.exists(model):
            return model
        from vllm.model_executor.model_loader.weight_utils import (
            download_safetensors_index_file_from_hf,
            download_weights_from_hf,
        )

        directory = self.load_config.download_dir
        folder = download_weights_from_hf(
            model, directory, [_PATTERN], revision, ignore_patterns=self.load_config.ignore_patterns
        )
        download_safetensors_index_file_from_hf(model, _INDEX_NAME, directory, revision=revision)
        return str(folder)


def _are_names(values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, str) and value for value in values)


def _files(folder: str, patterns: list[str] | None) -> str | list[str]:
    """The files that the model wants, else the directory itself; but where that holds Mistral's layout too,
    what is in the layout of transformers, as the daemon would not know which to take."""
    for pattern in patterns or ():
        if found := _matching(folder, pattern):
            return found
    indexes = _matching(folder, _INDEX_PATTERN)
    index = os.path.join(folder, _INDEX_NAME)
    if index in indexes:
        return index if len(indexes) > 1 else folder
    mistral = set(_matching(folder, _MISTRAL_PATTERN))
    if mistral and mistral.issuperset(indexes) and _matching(folder, _MODEL_PATTERN):
        return [file for file in _matching(folder, _PATTERN) if file not in mistral]
    return folder


def _matching(folder: str, pattern: str) -> list[str]:
    return [os.path.join(folder, name) for name in sorted(glob.glob(pattern, root_dir=folder))]


def _draft_takes_source(model_config: ModelConfig, load_config: LoadConfig, source: object) -> bool:
    """Whether a draft model loads from the source in `load_config`: always if these options are its own; if
    they are the target's, only where its weights are a part of the target's checkpoint (MTP)."""
    from vllm.config import get_current_vllm_config

    try:
        speculative = get_current_vllm_config().speculative_config
    except AssertionError:  # vLLM is not loading a model
        speculative = None
    if speculative is None:
        raise ValueError(
            f"the draft model {model_config.model} has load options with the source {source!r}, which may be "
            "its own or the target model's; vLLM does not tell which: leave source out and give the paths of "
            "both models"
        )
    own = getattr(speculative, "draft_load_config", None)
    if own is not None and (own is load_config or own == load_config):
        return True
    target = speculative.target_model_config
    return model_config.model in (target.model, getattr(target, "model_weights", "") or target.model)


def _check_complete(model: nn.Module, loaded: set[str] | None, quantized: bool) -> None:
    """Raises ValueError that names the weights that did not come."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    check: Any = DefaultModelLoader.track_weights_loading  # uses nothing of the loader
    if "quantized" in inspect.signature(check).parameters:  # from vLLM 0.32 on
        check(None, model, loaded, quantized=quantized)
    else:
        check(None, model, loaded)


def _rank_groups(*, stages_too: bool) -> list[Any]:
    from vllm.distributed import get_pp_group, get_tp_group

    return [get_tp_group(), get_pp_group()] if stages_too else [get_tp_group()]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
