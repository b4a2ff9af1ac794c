"""The library's verdict on safetensors files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors

from .reading import Contents, deserialize


@pytest.fixture(scope="module")
def read_by_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Contents | None]:
    """What safetensors makes of the file; None where it refuses it."""
    path: Path = tmp_path_factory.mktemp("library") / "file.safetensors"

    def read(file: bytes) -> Contents | None:
        try:
            found = deserialize(file)
        except safetensors.SafetensorError:
            found = None
        path.write_bytes(file)
        try:
            with safetensors.safe_open(path, "np") as opened:
                metadata = opened.metadata() or {}
        except (safetensors.SafetensorError, OSError):
            assert found is None
            return None
        assert found is not None
        return {n: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for n, t in found}, metadata

    return read
