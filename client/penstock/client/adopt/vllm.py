"""The entry point of vLLM's plugin: registers the load format "penstock" (see docs/vllm.md).

vLLM calls `register` in each of its processes, however often. Nothing here imports vLLM before.
"""

from __future__ import annotations

import os

REPLACE_VARIABLE = "PENSTOCK_REPLACE_RUNAI"


def replaces_runai() -> bool:
    """Whether the user wants engines to load through penstock where they would use Run:ai's streamer.

    Raises ValueError for a value that is neither 0 nor 1.
    """
    value = os.environ.get(REPLACE_VARIABLE, "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{REPLACE_VARIABLE}={value!r} is neither 0 nor 1; set it to one of these")
    return value == "1"


def register() -> None:
    """Makes `load_format="penstock"` known to vLLM, and its "runai_streamer" ours when that is wanted."""
    from vllm.model_executor.model_loader import register_model_loader

    from .vllm_loader import PenstockModelLoader

    register_model_loader("penstock")(PenstockModelLoader)
    if replaces_runai():
        register_model_loader("runai_streamer")(PenstockModelLoader)
