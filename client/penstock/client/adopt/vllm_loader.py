"""vLLM's loader for `load_format="penstock"`. Imports vLLM; `vllm.py` imports this when vLLM asks.

    check            before workers start: is there a daemon?
    download_model   for a model of the Hugging Face Hub, as vLLM's other loaders do
    load_weights     the source's tensors, in the order of its files, into model.load_weights()
    get_all_weights  the same without the model's part; vLLM reloads weights by it

Ranks that use the same daemon join one group, so that a checkpoint larger than the staging buffer is still
read once. They ask for what any of them needs (vllm_needs.py), and each passes on what its own model needs.

The option `source` stands for the weights of one model, the one that was given to vLLM. vLLM uses the same
options for other weights too: for a draft model, and for another path that `reload_weights` is given. These
load from their own path, not from `source`.
"""

from __future__ import annotations

import copy
import glob
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.logger import init_logger
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from .. import errors
from ..client import StreamerClient
from ..load import Load
from ..ring.socket_dir import socket_directory
from ..system.sizes import show_bytes
from .engine_ranks import agree
from .vllm_needs import EVERYTHING, Needs, mapper_of, needs_of, selection
from .vllm_options import LoaderOptions
from .vllm_own import by_vllm, check_complete

if TYPE_CHECKING:
    from torch import nn
    from vllm.config import ModelConfig
    from vllm.config.load import LoadConfig

_INDEX_NAME = "model.safetensors.index.json"
_SUFFIX = ".safetensors"
_OLD_WEIGHTS = ("*.bin", "*.pt")
_MAX_BYTES = 1 << 62
# On a model's configuration: the model for which `source` has been loaded. vLLM changes `model` for a reload
# from elsewhere, and keeps the options.
_LOADED_AS = "_penstock_loaded_as"
# Below vLLM's own name, or its log would not show it.
_log: logging.Logger = init_logger("vllm.penstock")


class PenstockModelLoader(BaseModelLoader):  # type: ignore[misc]
    """See the module."""

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        self.options = LoaderOptions.parse(load_config.model_loader_extra_config or {})
        self._loaded_bytes = self._read_bytes = 0

    def check(self) -> None:
        """Raises DaemonUnavailableError, or the error with which the daemon refuses this user."""
        from ..ring.handoff import Handoff  # without gRPC, as vLLM forks its workers later

        Handoff.connect(Path(socket_directory(self.options.socket_dir))).close()

    def download_model(self, model_config: ModelConfig) -> None:
        if self.options.source is None:
            self._source(model_config)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises ValueError where the checkpoint lacks weights of the model, as vLLM's own loader does."""
        started = time.monotonic()
        vars(model_config).setdefault(_LOADED_AS, model_config.model)
        loaded = model.load_weights(self.get_all_weights(model_config, model))  # type: ignore[operator]
        _log.info(
            "Loading weights took %.2f seconds (%s by penstock, %s of them from storage)",
            time.monotonic() - started,
            show_bytes(self._loaded_bytes),
            show_bytes(self._read_bytes),
        )
        track = self.options.enable_weights_track
        quantized = getattr(model_config, "quantization", None) is not None
        if track or (track is None and loaded is not None and not quantized):
            check_complete(model, loaded, quantized)

    def get_all_weights(
        self, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of the model's checkpoint, then of the checkpoints of its parts.

        Raises ValueError at once if it is not clear whether `source` is meant.
        """
        source = self._source(model_config, getattr(model, "allow_patterns_overrides", None))
        return self._weights(source, model_config, model, needs_of(model))

    def _weights(
        self, source: str | list[str], model_config: ModelConfig, model: nn.Module, needs: Needs
    ) -> Iterator[tuple[str, torch.Tensor]]:
        draft = getattr(model_config, "runner", None) == "draft"
        unused = getattr(model, "is_unused_checkpoint_weight", None)
        yield from self._load(source, model, needs=needs, unused=unused, stages_agree=not draft)
        for part in getattr(model, "secondary_weights", ()):
            yield from self._part(part, model_config, model)

    def _part(
        self, part: Any, model_config: ModelConfig, model: nn.Module
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights that a model needs besides its own. Safetensors come through penstock."""
        patterns, uri = part.allow_patterns_overrides, ""
        if part.model_or_path == model_config.model:  # where a model in object storage has no weights
            uri = getattr(model_config, "model_weights", "")
        if patterns is None or any(pattern.endswith(_SUFFIX) for pattern in patterns):
            source = self._part_source(part, uri)
            if source is not None:
                unused = getattr(part, "is_unused_weight", None)
                loading = self._load(source, model, needs=EVERYTHING, unused=unused, stages_agree=False)
                yield from ((part.prefix + name, tensor) for name, tensor in loading)
                return
        if uri:
            part = copy.copy(part)
            part.model_or_path = str(self._fetch_weights(uri, part.subfolder or "", patterns or _OLD_WEIGHTS))
        yield from by_vllm(self.load_config, part)

    def _part_source(self, part: Any, uri: str) -> str | list[str] | None:
        """None where there are no safetensors."""
        folder = os.path.join(uri or self._folder(part.model_or_path, part.revision), part.subfolder or "")
        find = self._listed if uri else _matching
        source = _files(folder, part.allow_patterns_overrides, find)
        return source if source != folder or find(folder, f"*{_SUFFIX}") else None

    def _fetch_weights(self, uri: str, subfolder: str, patterns: Sequence[str]) -> Path:
        """A directory with these files of the model, for vLLM's own loader."""
        allow = [os.path.join(subfolder, pattern) for pattern in patterns]
        below = os.path.join(subfolder, "*/*")
        return StreamerClient(self.options.socket_dir).fetch(
            uri, allow=allow, ignore=below, max_bytes=_MAX_BYTES
        )

    def _load(
        self,
        source: str | list[str],
        model: nn.Module,
        *,
        needs: Needs,
        unused: Callable[[str], bool] | None,
        stages_agree: bool,
    ) -> Iterator[tuple[str, torch.Tensor]]:
        map_name = mapper_of(model)
        if map_name is None:
            needs, map_name = EVERYTHING, str
        client = StreamerClient(self.options.socket_dir)
        group, everybody = None, [needs]
        if self.options.distributed and torch.distributed.is_initialized():
            # Stages of a pipeline may use different tensors, and only the last one has a draft model.
            groups = _rank_groups(stages_too=stages_agree and unused is None)
            group, everybody = agree(client.socket_dir, source, groups, needs)
        is_needed = selection(everybody, map_name)
        with self._open(client, source, group, is_needed, unused) as load:
            for name, tensor in load:
                if needs == EVERYTHING or not needs.leaves_out(name, map_name(name)):
                    yield name, tensor
        self._loaded_bytes += load.stats.bytes
        self._read_bytes += load.stats.read_bytes

    def _open(
        self,
        client: StreamerClient,
        source: str | list[str],
        group: tuple[str, int] | None,
        is_needed: Callable[[str], bool] | None,
        unused: Callable[[str], bool] | None,
    ) -> Load:
        def is_chosen(name: str) -> bool:
            return (is_needed is None or is_needed(name)) and (unused is None or not unused(name))

        try:
            return client.load(
                source,
                device=self._device(),
                tensors=None if is_needed is None and unused is None else is_chosen,
                memory_limit=self.options.memory_limit,
                group=group,
                progress=self.load_config.use_tqdm_on_load and _rank() == 0,
            )
        except errors.InvalidRequestError as error:
            if is_needed is None:
                raise
            # The ranks of a group choose the same, so the daemon says this to all of them.
            _log.warning("penstock reads tensors that this node does not need: %s", str(error))
            return self._open(client, source, group, None, unused)

    def _device(self) -> str:
        """A rank that keeps a slice of each tensor copies less from the host than through the device."""
        if self.options.device != "auto":
            return self.options.device
        alone = not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1
        return "cuda" if alone and torch.cuda.is_available() else "cpu"

    def _source(self, model_config: ModelConfig, patterns: list[str] | None = None) -> str | list[str]:
        if (chosen := self._chosen_source(model_config)) is not None:
            return chosen
        # vLLM keeps the URI of a model in object storage here, and a directory without weights in `model`.
        uri = getattr(model_config, "model_weights", "")
        if uri:
            return _files(str(uri), patterns, self._listed)
        return _files(self._folder(model_config.model, model_config.revision), patterns, _matching)

    def _listed(self, uri: str, pattern: str) -> list[str]:
        """As `_matching`."""
        prefix = os.path.join(uri, "")
        found = StreamerClient(self.options.socket_dir).list_files(prefix, allow=pattern, ignore="*/*")
        return [prefix + name for name in sorted(found)]

    def _chosen_source(self, model_config: ModelConfig) -> str | list[str] | None:
        """The option `source`, unless it has the weights of another model than this one."""
        if getattr(model_config, "runner", None) == "draft":
            return _source_of_draft(model_config, self.load_config, self.options.source)
        if self.options.source is None:
            return None
        loaded_as = vars(model_config).get(_LOADED_AS)
        if loaded_as is None:
            raise ValueError(
                f"weights of {model_config.model} are to be reloaded, but model_loader_extra_config has the "
                f"source {self.options.source!r}, from which this process loaded no model before, so either "
                "may be meant: leave source out of the load config, and give reload_weights the path"
            )
        return self.options.source if loaded_as == model_config.model else None

    def _folder(self, model: str, revision: str | None) -> str:
        if os.path.exists(model):
            return model
        from vllm.model_executor.model_loader.weight_utils import (
            download_safetensors_index_file_from_hf,
            download_weights_from_hf,
        )

        directory = self.load_config.download_dir
        folder = download_weights_from_hf(
            model, directory, [f"*{_SUFFIX}"], revision, ignore_patterns=self.load_config.ignore_patterns
        )
        download_safetensors_index_file_from_hf(model, _INDEX_NAME, directory, revision=revision)
        return str(folder)


def _files(folder: str, patterns: list[str] | None, find: Callable[[str, str], list[str]]) -> str | list[str]:
    """The files that the model wants, else the directory: the daemon knows which of its files belong
    together."""
    for pattern in patterns or ():
        if found := find(folder, pattern):
            return found
    return folder


def _matching(folder: str, pattern: str) -> list[str]:
    return [os.path.join(folder, name) for name in sorted(glob.glob(pattern, root_dir=folder))]


def _source_of_draft(
    model_config: ModelConfig, load_config: LoadConfig, source: str | list[str] | None
) -> str | list[str] | None:
    """The source that replaces a draft model's own path. `draft_load_config` may have one, which vLLM passes
    on for some methods only. The target's `source` counts if the draft's weights are a part of the target's
    checkpoint (MTP)."""
    from vllm.config import get_current_vllm_config

    try:
        speculative = get_current_vllm_config().speculative_config
    except AssertionError:  # vLLM is not loading a model
        speculative = None
    if speculative is None:
        if source is None:
            return None
        raise ValueError(
            f"the draft model {model_config.model} has load options with the source {source!r}, which may be "
            "its own or the target model's; vLLM does not tell which: leave source out and give the paths of "
            "both models"
        )
    own = getattr(speculative, "draft_load_config", None)
    if own is not None and own.load_format == load_config.load_format:
        chosen = LoaderOptions.parse(own.model_loader_extra_config or {}).source
        if chosen is not None or own == load_config:
            return chosen
    target = speculative.target_model_config
    of_target = model_config.model in (target.model, getattr(target, "model_weights", "") or target.model)
    return source if of_target else None


def _rank_groups(*, stages_too: bool) -> list[Any]:
    from vllm.distributed import get_pp_group, get_tp_group

    return [get_tp_group(), get_pp_group()] if stages_too else [get_tp_group()]


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
