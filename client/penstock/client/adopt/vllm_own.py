"""The work that penstock's loader leaves to vLLM's own loader."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config.load import LoadConfig


def by_vllm(load_config: LoadConfig, part: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Files that are no safetensors (`*.pt`), by vLLM's own loader."""
    loader = _vllm_s_own("DefaultModelLoader")
    its_config = dataclasses.replace(load_config, load_format="auto", model_loader_extra_config={})
    weights: Any = member(loader, "_get_weights_iterator")(loader(its_config), part)
    yield from weights


def check_complete(model: nn.Module, loaded: set[str] | None, quantized: bool) -> None:
    """Raises ValueError if weights of the model were not loaded, and names them."""
    check = member(_vllm_s_own("DefaultModelLoader"), "track_weights_loading")  # uses nothing of the loader
    if "quantized" in inspect.signature(check).parameters:  # from vLLM 0.32 on
        check(None, model, loaded, quantized=quantized)
    else:
        check(None, model, loaded)


def _vllm_s_own(name: str) -> Any:
    from vllm.model_executor.model_loader import default_loader

    return member(default_loader, name)


def member(owner: Any, name: str) -> Any:
    """The attribute of `owner`. Raises RuntimeError if this version of vLLM lacks it."""
    try:
        return getattr(owner, name)
    except AttributeError:
        import vllm

        raise RuntimeError(
            f"vLLM {getattr(vllm, '__version__', '')} has no {owner.__name__}.{name}, which penstock's "
            "loader calls: use a version that docs/vllm.md names, or another load format"
        ) from None
