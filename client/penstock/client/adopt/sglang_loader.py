"""SGLang's loader for `--load-format penstock`. Imports SGLang; `sglang.py` imports this when SGLang asks.

SGLang's own loader stays in charge. It chooses and downloads files, makes the model, and prepares weights
for their quantization. Only the tensors of safetensors files come through the daemon:
`_get_weights_iterator`, which SGLang calls for a model at the start, for other weights that the model
brings along, for a draft model, and for weights that are updated from disk.

The option `source` stands for the weights of one model, the one that was given to SGLang. SGLang uses the
same options for a draft model, which loads from its own path, not from `source`. For an update from disk it
passes no options on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.distributed import get_tp_group
from sglang.srt.model_loader import loader as sglang_s_own
from sglang.srt.model_loader.weight_utils import maybe_add_mtp_safetensors
from sglang.srt.runtime_context import get_model

from ..client import StreamerClient
from .engine_ranks import agree_on_group
from .sglang import refuse_other_loaders
from .vllm_options import LoaderOptions
from .written import every_parameter_written

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from torch import nn

_INDEX_NAME = "model.safetensors.index.json"


class PenstockModelLoader(sglang_s_own.DefaultModelLoader):  # type: ignore[misc]
    """See the module. SGLang updates weights from disk only with a subclass of its default loader."""

    def __init__(self, load_config: LoadConfig) -> None:
        self.options = LoaderOptions.parse(load_config.model_loader_extra_config or {})
        own = dataclasses.replace(load_config, load_format=LoadFormat.AUTO, model_loader_extra_config={})
        super().__init__(own)
        self._tracks = False

    def load_model(self, *, model_config: ModelConfig, device_config: Any) -> nn.Module:
        """Raises ValueError if the checkpoint lacks weights of the model, or if SGLang would load the model
        by another loader than its default one."""
        by = sglang_s_own.get_model_loader(self.load_config, model_config)
        refuse_other_loaders(type(by).__name__, quantized_already=_is_quantized_already(model_config))
        track = self.options.enable_weights_track
        if track is None:  # parts of a draft model may be the target's
            track = model_config.quantization is None and not model_config.is_draft_model
        self._tracks = track
        try:
            model: nn.Module = super().load_model(model_config=model_config, device_config=device_config)
            return model
        finally:
            self._tracks = False

    def load_weights_and_postprocess(self, model: nn.Module, weights: Any, target_device: Any) -> None:
        with every_parameter_written(model) if self._tracks else nullcontext():
            self.load_weights_only(model, weights, target_device)
        self.postprocess_weights(model, target_device)

    def _get_weights_iterator(self, source: Any, **resolved: Any) -> Iterator[tuple[str, torch.Tensor]]:
        chosen = self._chosen_source(source)
        if chosen is None:
            folder, files, are_safetensors = self._prepare_weights(
                source.model_or_path, source.revision, source.fall_back_to_pt, source.allow_patterns_overrides
            )
            if not are_safetensors:
                return super()._get_weights_iterator(source, **resolved)  # type: ignore[no-any-return]
            if source.model_config is not None:
                files = maybe_add_mtp_safetensors(files, folder, _INDEX_NAME, source.model_config.hf_config)
            chosen = sorted(files)  # so that all ranks name them alike
        weights = self._stream(chosen)
        if self.load_config.draft_model_idx is not None:
            chosen_layers = self._filter_mtp_weights(weights, source.prefix, self.load_config.draft_model_idx)
            return chosen_layers  # type: ignore[no-any-return]
        return ((source.prefix + name, tensor) for name, tensor in weights)

    def _stream(self, source: str | list[str]) -> Iterator[tuple[str, torch.Tensor]]:
        client = StreamerClient(self.options.socket_dir)
        group, first = None, True
        if torch.distributed.is_initialized():
            first = torch.distributed.get_rank() == 0
            if self.options.distributed:
                group = agree_on_group(client.socket_dir, source, [get_tp_group()])
        with client.load(
            source,
            # The device of SGLang's own loader.
            device="cpu" if self.options.device == "auto" else self.options.device,
            memory_limit=self.options.memory_limit,
            group=group,
            progress=first,
        ) as load:
            yield from load

    def _chosen_source(self, source: Any) -> str | list[str] | None:
        """The option `source`, if it has these weights. It has neither weights that a model brings along from
        elsewhere, nor those of a draft model, unless that is a part of the target's checkpoint (MTP)."""
        model_config = source.model_config
        if model_config is None or source.model_or_path != model_config.model_path:
            return None
        if model_config.is_draft_model and model_config.model_path != get_model().model_path:
            return None
        return self.options.source


def _is_quantized_already(model_config: ModelConfig) -> bool:
    return model_config.quantization is not None and bool(model_config._is_already_quantized())
