from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount(*arguments)` mounts something at a path, the last argument, until the test ends."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount")
    mounted: list[Path] = []

    def mount(*arguments: str | Path) -> Path:
        done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"cannot mount here: {done.stderr}")
        path = Path(arguments[-1])
        if path not in mounted:
            mounted.append(path)
        return path

    yield mount
    for path in reversed(mounted):
        subprocess.run(["umount", "--lazy", path], check=True)
