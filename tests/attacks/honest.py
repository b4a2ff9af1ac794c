"""An honest user: loads a checkpoint again and again, and keeps account of each load."""

from __future__ import annotations

import hashlib
import select
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import torch

from penstock.client import StreamerClient, errors

from ..e2e.programs import digests, say

PAUSE_SECONDS = 0.05


def sum_of(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Of names, dtypes, shapes and bytes."""
    return hashlib.sha256(repr(sorted(digests(tensors))).encode()).hexdigest()


def load_in_a_loop(socket_dir: str, source: str, at_least: int) -> None:
    """The program of one user: loads until a line comes on standard input, but so often at least, then says
    of each load how long it took, in seconds, and what came. Each load has a connection of its own, as in a
    process that has just started. A load that fails is not repeated."""
    say("loads")
    loads: list[dict[str, object]] = []
    while len(loads) < at_least or not select.select([sys.stdin], [], [], PAUSE_SECONDS)[0]:
        began = time.monotonic()
        error = found = None
        try:
            with StreamerClient(Path(socket_dir), reconnect_timeout=0) as client:
                tensors = client.load_state_dict(source)
                seconds = time.monotonic() - began
                found = sum_of(tensors.items())
                del tensors
        except errors.PenstockError as failure:
            seconds = time.monotonic() - began
            error = f"{type(failure).__name__}: {failure}"
        loads.append({"seconds": seconds, "sum": found, "error": error})
    say("done", loads=loads)
