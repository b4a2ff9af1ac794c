from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from .fake_daemon import Behaviour, FakeDaemon, FakeTensor

StartDaemon = Callable[..., FakeDaemon]


@pytest.fixture
def socket_dir() -> Iterator[Path]:
    """Not tmp_path: a socket's path has to be short."""
    path = Path(tempfile.mkdtemp(prefix="pst-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def start_daemon(socket_dir: Path) -> Iterator[StartDaemon]:
    daemons: list[FakeDaemon] = []

    def start(tensors: list[FakeTensor], **behaviour: object) -> FakeDaemon:
        daemons.append(FakeDaemon(socket_dir, tensors, Behaviour(**behaviour)))  # type: ignore[arg-type]
        return daemons[-1]

    yield start
    for daemon in daemons:
        daemon.stop()
