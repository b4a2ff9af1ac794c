"""The entry point of vLLM's plugin: registers the load format "penstock" (see docs/vllm.md).

vLLM calls `register` in each of its processes, however often. Nothing here imports vLLM before.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import Any

REPLACE_VARIABLE = "PENSTOCK_REPLACE_RUNAI"
LORA_VARIABLE = "PENSTOCK_LORA_BASE"


def replaces_runai() -> bool:
    """Whether the user wants engines to use penstock instead of Run:ai's streamer.

    Raises ValueError for a value that is neither 0 nor 1.
    """
    value = os.environ.get(REPLACE_VARIABLE, "").strip() or "0"
    if value not in ("0", "1"):
        raise ValueError(f"{REPLACE_VARIABLE}={value!r} is neither 0 nor 1; set it to one of these")
    return value == "1"


def register() -> None:
    """Adds `load_format="penstock"` to vLLM, with models in object storage and adapters by name. Replaces its
    "runai_streamer" if the user wants that."""
    from vllm.model_executor.model_loader import register_model_loader

    from . import vllm_remote
    from .vllm_loader import PenstockModelLoader

    register_model_loader("penstock")(PenstockModelLoader)
    if replaces_runai():
        register_model_loader("runai_streamer")(PenstockModelLoader)
    # In a process that starts an engine.
    arguments = sys.modules.get("vllm.engine.arg_utils")
    vllm_remote.install(replaces_runai, arguments)
    if arguments is not None:
        _check_before_workers_start(arguments.EngineArgs)
    if base := os.environ.get(LORA_VARIABLE):
        from .vllm_lora import register as register_adapters

        register_adapters(base)


def _check_before_workers_start(engine_args: Any) -> None:
    """Makes vLLM fail with the daemon's error before it starts workers: later it says only that one failed.

    Only if the workers are on this node.
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
