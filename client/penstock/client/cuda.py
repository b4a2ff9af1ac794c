"""Tensors onto a device other than the CPU.

For now one synchronous copy per tensor, from pageable memory: right, and a fraction of what the bus
can do. The pinned ring with copies in flight has an issue of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of `tensor` on `device`, complete when this returns."""
    return tensor.to(device, non_blocking=False)
