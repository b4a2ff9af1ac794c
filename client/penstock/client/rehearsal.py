"""Whether a module with its own loading method would accept certain tensors, before it gets any.

Hooks may rename, drop or add tensors, so a comparison of names and shapes decides nothing. A copy of
the module on the meta device, which holds no bytes, is loaded with tensors that hold none either. The hooks
of the module run for the copy as they will for the module.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch.nn import Module, Parameter
from torch.nn.parameter import is_lazy

_MISMATCH = "size mismatch for "


@dataclass(frozen=True, slots=True)
class Outcome:
    """The problems that `load_state_dict` would report, by full names."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


class Rehearsal:
    """Rehearses loading the parts of one module."""

    def __init__(self, root: Module) -> None:
        self._root = root

    def of(self, part: Module, prefix: str, state: Mapping[str, torch.Tensor]) -> Outcome:
        """The problems of loading `part`, whose names begin with `prefix`, with tensors on the meta device.

        Reports no problem if it cannot be known: `part` cannot be copied, or looks at values.
        """
        if _fits(part, state):
            return Outcome()
        with contextlib.suppress(Exception):  # of foreign code, which raises it again in the real load
            stand_in = copy.deepcopy(part, dict(self._without_bytes))
            try:
                keys = stand_in.load_state_dict(dict(state), strict=False)
            except RuntimeError as error:
                lines = [line.strip() for line in str(error).splitlines()[1:]]
                if all(line.startswith(_MISMATCH) for line in lines):
                    return Outcome(problems=[_MISMATCH + prefix + line[len(_MISMATCH) :] for line in lines])
            else:
                return Outcome(_prefixed(prefix, keys.missing_keys), _prefixed(prefix, keys.unexpected_keys))
        return Outcome()

    @functools.cached_property
    def _without_bytes(self) -> dict[int, object]:
        """A memo for deepcopy: tensors on the meta device in the place of all that the module has."""
        memo: dict[int, object] = {}
        for tensor in (*self._root.parameters(), *self._root.buffers()):
            if not is_lazy(tensor):
                bare = torch.empty_like(tensor.detach(), device="meta")
                is_parameter = isinstance(tensor, Parameter)
                memo[id(tensor)] = Parameter(bare, tensor.requires_grad) if is_parameter else bare
        return memo


def _fits(module: Module, state: Mapping[str, torch.Tensor]) -> bool:
    own = module.state_dict()
    return own.keys() == state.keys() and all(
        isinstance(tensor, torch.Tensor) and not is_lazy(tensor) and tensor.shape == state[name].shape
        for name, tensor in own.items()
    )


def _prefixed(prefix: str, names: Iterable[str]) -> list[str]:
    return [prefix + name for name in names]
