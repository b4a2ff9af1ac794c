"""The reading half of the safetensors library, through a daemon.

    - from safetensors import safe_open
    - from safetensors.torch import load_file, load_model
    + from penstock.client.safetensors import safe_open, load_file, load_model

Arguments, results and what is raised are the library's; each function takes a `client` besides. To have other
libraries read through the daemon see `penstock.client.patch_safetensors`. docs/safetensors.md has the rest.
"""

from safetensors import SafetensorError

from .adopt.safe_errors import DamagedFileError, MissingFileError, UnreadableTensorError
from .adopt.safe_open import SafeSlice, load_file, load_model, safe_open

__all__ = [
    "DamagedFileError",
    "MissingFileError",
    "SafeSlice",
    "SafetensorError",
    "UnreadableTensorError",
    "load_file",
    "load_model",
    "safe_open",
]
