"""The entry point of SGLang's plugin: the load format "penstock" (see docs/vllm.md).

SGLang calls `register` once in each of its processes, before it reads its arguments. Nothing here imports
SGLang before. SGLang's load formats are an enumeration, which a plugin cannot extend. But a load format may
also be a class, so a hook replaces the name by the loader itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .vllm import replaces_runai

if TYPE_CHECKING:
    import torch

LOAD_FORMAT = "penstock"
_CHECKS_FORMAT = "sglang.srt.configs.load_config.LoadConfig._verify_load_format"
_STREAMS_BY_RUNAI = "sglang.srt.model_loader.weight_utils.runai_safetensors_weights_iterator"


def register() -> None:
    """Adds `--load-format penstock` to SGLang, and replaces its `runai_streamer` if the user wants that."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import LOAD_FORMAT_CHOICES, add_load_format_choices

    if LOAD_FORMAT not in LOAD_FORMAT_CHOICES:
        add_load_format_choices([LOAD_FORMAT])
    HookRegistry.register(_CHECKS_FORMAT, take_our_format, HookType.AROUND)
    if replaces_runai():
        HookRegistry.register(_STREAMS_BY_RUNAI, weights_iterator, HookType.REPLACE)


def take_our_format(verify: Callable[[Any], None], load_config: Any) -> None:
    """Wraps SGLang's check of a load format."""
    if str(load_config.load_format).lower() != LOAD_FORMAT:
        verify(load_config)
        return
    from .sglang_loader import PenstockModelLoader

    load_config.load_format = PenstockModelLoader


def refuse_other_loaders(name: str, *, quantized_already: bool) -> None:
    """Raises ValueError unless SGLang loads the model by its default loader, or by one that does the same."""
    if name != "DefaultModelLoader" and not (name == "ModelOptModelLoader" and quantized_already):
        raise ValueError(
            f"load_format penstock: SGLang would quantize this model by its {name}, which cannot load "
            "through penstock: give a model that is quantized already, or use load format auto"
        )


def weights_iterator(
    hf_weights_files: list[str], is_distributed: bool = False, device: str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all files, on the CPU unless `is_distributed`, as in the function that it
    replaces."""
    import torch

    from ..client import StreamerClient
    from .engine_ranks import agree_on_group

    client = StreamerClient()
    group = None
    if is_distributed and torch.distributed.is_initialized():
        from sglang.srt.distributed import get_tp_group

        group = agree_on_group(client.socket_dir, hf_weights_files, [get_tp_group()])
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    with client.load(
        hf_weights_files, device=device if is_distributed else "cpu", group=group, progress=first
    ) as load:
        yield from load
