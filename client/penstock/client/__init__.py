"""Client of penstockd: model checkpoints as torch tensors, out of the node's staging buffer.

    from penstock.client import StreamerClient

    with StreamerClient() as client, client.load("/models/llama-3-8b") as load:
        for name, tensor in load:
            ...

Importing this package costs nothing: torch, grpc and protobuf are imported at the first load. With
PENSTOCK_PATCH_SAFETENSORS=1 in the environment it calls `patch_safetensors()`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adopt.ambient import S3Credentials as S3Credentials
    from .adopt.run_ai import SafetensorsStreamer as SafetensorsStreamer
    from .adopt.run_ai import list_safetensors as list_safetensors
    from .adopt.run_ai_files import ObjectStorageModel as ObjectStorageModel
    from .adopt.run_ai_files import pull_files as pull_files
    from .adopt.safe_patch import SafetensorsPatch as SafetensorsPatch
    from .adopt.safe_patch import patch_safetensors as patch_safetensors
    from .client import StreamerClient as StreamerClient
    from .errors import AccessDeniedError as AccessDeniedError
    from .errors import CheckpointChangedError as CheckpointChangedError
    from .errors import CheckpointCorruptError as CheckpointCorruptError
    from .errors import CheckpointInvalidError as CheckpointInvalidError
    from .errors import CheckpointNotFoundError as CheckpointNotFoundError
    from .errors import CheckpointWarning as CheckpointWarning
    from .errors import DaemonUnavailableError as DaemonUnavailableError
    from .errors import DuplicateTensorError as DuplicateTensorError
    from .errors import FallbackWarning as FallbackWarning
    from .errors import ForkedProcessError as ForkedProcessError
    from .errors import InvalidRequestError as InvalidRequestError
    from .errors import LoadClosedError as LoadClosedError
    from .errors import MemoryLimitTooSmallError as MemoryLimitTooSmallError
    from .errors import PenstockError as PenstockError
    from .errors import ProtocolError as ProtocolError
    from .errors import SessionRequiredError as SessionRequiredError
    from .errors import ShuttingDownError as ShuttingDownError
    from .errors import SourceUnavailableError as SourceUnavailableError
    from .errors import StagingExhaustedError as StagingExhaustedError
    from .errors import TensorNotFoundError as TensorNotFoundError
    from .errors import TooManyLoadsError as TooManyLoadsError
    from .errors import UnsupportedDtypeError as UnsupportedDtypeError
    from .load import Load as Load
    from .operations import Evicted as Evicted
    from .prefetch import Prefetched as Prefetched
    from .summary import LoadedFile as LoadedFile
    from .summary import LoadStats as LoadStats

_HOMES = {
    "StreamerClient": "client",
    "Evicted": "operations",
    "Load": "load",
    "LoadStats": "summary",
    "LoadedFile": "summary",
    "Prefetched": "prefetch",
    "S3Credentials": "adopt.ambient",
    "SafetensorsStreamer": "adopt.run_ai",
    "list_safetensors": "adopt.run_ai",
    "SafetensorsPatch": "adopt.safe_patch",
    "patch_safetensors": "adopt.safe_patch",
    "ObjectStorageModel": "adopt.run_ai_files",
    "pull_files": "adopt.run_ai_files",
    "AccessDeniedError": "errors",
    "CheckpointChangedError": "errors",
    "CheckpointCorruptError": "errors",
    "CheckpointInvalidError": "errors",
    "CheckpointNotFoundError": "errors",
    "CheckpointWarning": "errors",
    "DaemonUnavailableError": "errors",
    "DuplicateTensorError": "errors",
    "FallbackWarning": "errors",
    "ForkedProcessError": "errors",
    "InvalidRequestError": "errors",
    "LoadClosedError": "errors",
    "MemoryLimitTooSmallError": "errors",
    "PenstockError": "errors",
    "ProtocolError": "errors",
    "SessionRequiredError": "errors",
    "ShuttingDownError": "errors",
    "SourceUnavailableError": "errors",
    "StagingExhaustedError": "errors",
    "TensorNotFoundError": "errors",
    "TooManyLoadsError": "errors",
    "UnsupportedDtypeError": "errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; see its __all__ for what it has"
        )
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})


if os.environ.get("PENSTOCK_PATCH_SAFETENSORS"):
    from .adopt.safe_patch import patch_as_asked

    patch_as_asked()
