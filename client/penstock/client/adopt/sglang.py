"""The entry point of SGLang's plugin (see docs/vllm.md).

SGLang's load formats are a closed list, so this gives its `runai_streamer` another source of tensors, when
PENSTOCK_REPLACE_RUNAI=1 asks for it. Nothing here imports SGLang before.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .vllm import replaces_runai

if TYPE_CHECKING:
    import torch

_TARGET = "sglang.srt.model_loader.weight_utils.runai_safetensors_weights_iterator"


def register() -> None:
    """Has SGLang call `weights_iterator` in the place of the function that streams by Run:ai's package."""
    if not replaces_runai():
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_TARGET, weights_iterator, HookType.REPLACE)


def weights_iterator(
    hf_weights_files: list[str], is_distributed: bool = False, device: str = "cpu"
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all files, on the CPU unless `is_distributed`, as in the function it stands for."""
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
