"""Variables of the environment that look meant for penstockd but mean nothing to it: likely typing errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable

PREFIX = "PENSTOCK_"
_OF_CLIENTS = (
    "PENSTOCK_CACHE_DIR",
    "PENSTOCK_LORA_BASE",
    "PENSTOCK_PATCH_SAFETENSORS",
    "PENSTOCK_PINNED_BYTES",
    "PENSTOCK_REPLACE_RUNAI",
)
"""Variables that only the client reads: both may share an environment."""
_LIKENESS = 0.8
"""As difflib counts, the prefix included: typing errors are above, other words mostly below."""
_OF_KUBERNETES = re.compile(r"PENSTOCK_(\w+_)?(SERVICE_(HOST|PORT\w*)|PORT|PORT_\d+_(TCP|UDP)\w*)", re.ASCII)
"""What Kubernetes sets in every pod for a Service named penstock, or penstock-something."""


def unknown(names: Iterable[str], known: Collection[str]) -> list[tuple[str, str]]:
    """The names that mean nothing, each with the known one that is nearest; empty where none is near."""
    known = [*known, *_OF_CLIENTS]
    return [
        (name, next(iter(difflib.get_close_matches(name, known, n=1, cutoff=_LIKENESS)), ""))
        for name in sorted(names)
        if name.startswith(PREFIX) and name not in known and not _OF_KUBERNETES.fullmatch(name)
    ]
