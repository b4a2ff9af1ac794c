"""LoRA adapters by name for vLLM: $PENSTOCK_LORA_BASE/NAME, in any store or directory that the daemon reads.

vLLM asks resolvers for an adapter when a request names a model that it does not know. So anybody who may send
requests chooses the name. It can only be one name directly below the base, and nothing is kept of adapters
that do not exist.
"""

from __future__ import annotations

import asyncio
import logging
import os
import re

from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

from .. import errors
from ..client import StreamerClient

_CONFIG = "adapter_config.json"
_FILES = "adapter_*"
_BELOW = "*/*"
"""Files that are not fetched: checkpoints of a training may lie there."""
_NAME = re.compile(r"(?!.*\.\.)[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_log: logging.Logger = init_logger("vllm.penstock")


def register(base: str) -> None:
    """Makes the adapters below `base` known to vLLM, however often it is called."""
    LoRAResolverRegistry.resolvers.pop(PenstockLoRAResolver.__name__, None)  # or vLLM warns
    LoRAResolverRegistry.register_resolver(PenstockLoRAResolver.__name__, PenstockLoRAResolver(base))


class PenstockLoRAResolver(LoRAResolver):  # type: ignore[misc]
    """Fetches adapters to the cache of `StreamerClient.fetch`."""

    def __init__(self, base: str) -> None:
        self._base = base
        self._client = StreamerClient()

    async def resolve_lora(self, base_model_name: str, lora_name: str) -> LoRARequest | None:
        """The request for an adapter. None if there is no adapter of this name, or the name is refused.

        Raises PenstockError if the daemon refuses or cannot read the files, OSError for the cache.
        """
        if _NAME.fullmatch(lora_name) is None:
            _log.warning(
                "the LoRA adapter %r is not looked for in %s: a name has letters, digits, '.', '_' and '-', "
                "at most 200, and no '..'",
                lora_name[:200],
                self._base,
            )
            return None
        directory = await asyncio.to_thread(self._fetch, os.path.join(self._base, lora_name, ""))
        if directory is None:
            return None
        # vLLM gives it a number of its own.
        return LoRARequest(lora_name=lora_name, lora_int_id=1, lora_path=directory)

    def _fetch(self, source: str) -> str | None:
        try:
            found = self._client.list_files(source, allow=_CONFIG, ignore=_BELOW)
        except errors.CheckpointNotFoundError:
            return None
        if _CONFIG not in found:
            return None
        return str(self._client.fetch(source, allow=_FILES, ignore=_BELOW))
