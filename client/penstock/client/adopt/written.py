"""Whether a model's parameters were written to while its weights were loaded.

SGLang's models do not report the weights that they loaded, and its own loader does not check. So the first
element of each parameter is set to a number that no weights have, before loading. A parameter that still has
it afterwards has nothing of the checkpoint. Of a parameter that is made of several tensors (queries, keys and
values) only the first one is checked.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

_MARK = -7168.0
"""Exact in each of these types."""
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_SHOWN = 8


@contextmanager
def every_parameter_written(model: nn.Module) -> Iterator[None]:
    """Raises ValueError at its end if a floating-point parameter was not written to, and names it."""
    marked = [name for name, parameter in model.named_parameters() if _mark(parameter)]
    yield
    parameters = dict(model.named_parameters())
    missing = [name for name in marked if name in parameters and _is_marked(parameters[name])]
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise ValueError(
            f"{type(model).__name__} has parameters for which the checkpoint has nothing: "
            f"{', '.join(sorted(missing)[:_SHOWN])}{more}; load a complete checkpoint, or set "
            "enable_weights_track to false in model_loader_extra_config if the model computes them itself"
        )


def _mark(parameter: torch.Tensor) -> bool:
    if parameter.dtype not in _TYPES or not parameter.numel() or parameter.is_meta:
        return False
    _first(parameter).fill_(_MARK)
    return True


def _is_marked(parameter: torch.Tensor) -> bool:
    return bool(parameter.numel() and not parameter.is_meta and _first(parameter).item() == _MARK)


def _first(parameter: torch.Tensor) -> torch.Tensor:
    """The first element, in the parameter's own memory."""
    return parameter.data[(0,) * parameter.dim()]
