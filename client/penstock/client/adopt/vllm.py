"""The entry point of vLLM's plugin: registers the load format "penstock" (see docs/vllm.md).

vLLM calls `register` in each of its processes, however often. Nothing here imports vLLM before.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

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
    if (
        arguments := sys.modules.get("vllm.engine.arg_utils")
    ) is not None:  # the process that starts an engine
        _check_before_workers_start(arguments.EngineArgs)


def _check_before_workers_start(engine_args: Any) -> None:
    """Has vLLM fail with what the daemon says, where it would start workers first, and tell that one failed.

    Only where the workers are on this node.
    """
    make = getattr(engine_args, "create_load_config", None)
    if make is None or hasattr(make, "checks_penstock"):
        return

    @functools.wraps(make)
    def create_load_config(self: Any) -> Any:
        from vllm.model_executor.model_loader import get_model_loader

        from .vllm_loader import PenstockModelLoader

        config = make(self)
        backends = {
            getattr(self, f"{name}_backend", None) for name in ("distributed_executor", "data_parallel")
        }
        if config.load_format in ("penstock", "runai_streamer") and "ray" not in backends:
            loader = get_model_loader(config)
            if isinstance(loader, PenstockModelLoader):
                loader.check()
        return config

    create_load_config.checks_penstock = True  # type: ignore[attr-defined]
    engine_args.create_load_config = create_load_config
