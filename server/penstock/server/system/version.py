"""The version of this distribution, for messages to people."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version


@functools.cache
def distribution_version() -> str:
    try:
        return version("penstock")
    except PackageNotFoundError:  # run from a source tree
        return "0+unknown"
