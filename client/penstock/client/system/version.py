"""The version of this distribution, for messages to people."""

from __future__ import annotations

import functools


@functools.cache
def client_version() -> str:
    import importlib.metadata  # slow to import, and of no use to `penstock health`

    try:
        return importlib.metadata.version("penstock")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"
