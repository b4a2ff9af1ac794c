"""How one tensor of a module is filled: on which device, as which dtype, in place or by a replacement."""

from __future__ import annotations

import functools

import torch
from torch.nn import Parameter
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Targets:
    """The device and dtype that the caller of `load_into` chose. None keeps those of the module's tensor."""

    def __init__(self, device: torch.device | None, dtype: torch.dtype | None) -> None:
        # "cuda" is the same device as "cuda:0", but does not compare so.
        self.device = None if device is None else torch.empty(0, device=device).device
        self._dtype = dtype

    def device_of(self, own: torch.Tensor) -> torch.device:
        if self.device is not None:
            return self.device
        return torch.device("cpu") if own.is_meta else own.device

    def dtype_of(self, own: torch.Tensor) -> torch.dtype:
        return self._dtype if self._dtype is not None and own.is_floating_point() else own.dtype

    def in_place(self, own: torch.Tensor) -> bool:
        """Whether the bytes are copied into the module's tensor. Otherwise `replacement` takes its place."""
        if own.is_meta:
            return False
        return own.device == self.device_of(own) and own.dtype == self.dtype_of(own)

    def replacement(self, own: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The loaded tensor in the class of the module's own. May be a view of it."""
        device, dtype = self.device_of(own), self.dtype_of(own)
        if is_traceable_wrapper_subclass(own):  # made of other tensors, which only it knows how to fill
            new = torch.empty_like(own, device=device, dtype=dtype).copy_(tensor)
        else:
            new = tensor.to(device, dtype)
        if not isinstance(own, Parameter):
            return new if type(own) is torch.Tensor else _as_same_class(own, new)
        if type(own) is Parameter or is_traceable_wrapper_subclass(own):
            return Parameter(new, requires_grad=own.requires_grad)
        return _as_same_class(own, new).requires_grad_(own.requires_grad)


def is_old_scalar(own: torch.Tensor, tensor: torch.Tensor) -> bool:
    """Whether the tensor has one dimension of size 1 for a scalar, as in very old checkpoints."""
    return own.dim() == 0 and tensor.shape == (1,)


@functools.cache
def converts(given: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether torch can convert from one dtype to the other."""
    try:
        torch.empty(1, dtype=wanted).copy_(torch.empty(1, dtype=given))
    except (RuntimeError, NotImplementedError, TypeError):
        return False
    return True


def _as_same_class(own: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    same = new.as_subclass(type(own))
    same.__dict__.update(own.__dict__)
    return same
