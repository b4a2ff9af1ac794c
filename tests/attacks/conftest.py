from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..e2e.conftest import checkpoints, nursery_process, root, write
from ..e2e.support import Nursery
from .support import TargetDaemon

__all__ = ["checkpoints", "nursery_process", "root", "write"]

StartTarget = Callable[..., TargetDaemon]


@contextlib.contextmanager
def starting_targets() -> Iterator[StartTarget]:
    """Starts daemons to attack; at the end each that still runs has to be idle and to stop cleanly, with a
    log free of unexpected errors."""
    tops: list[Path] = []
    daemons: list[TargetDaemon] = []

    def start(*flags: str, populated: bool = True, **options: object) -> TargetDaemon:
        # Not tmp_path: the path of a socket has to be short.
        tops.append(Path(tempfile.mkdtemp(prefix="pst-", dir="/tmp")))
        tops[-1].chmod(0o755)
        daemons.append(TargetDaemon(tops[-1], *flags, **options))  # type: ignore[arg-type]
        daemons[-1].wait_ready(populated=populated)
        return daemons[-1]

    yield start
    try:
        for daemon in daemons:
            daemon.end()
    finally:
        for daemon in daemons:
            daemon.kill()
        for top in tops:
            shutil.rmtree(top)


@pytest.fixture
def start_target() -> Iterator[StartTarget]:
    with starting_targets() as start:
        yield start


@pytest.fixture
def attackers(nursery_process: Nursery, start_target: StartTarget) -> Iterator[Nursery]:
    """Starts processes of other users: `start(function, uid=…, …)`, a function of any module here. Those that
    still run at the end are killed, before daemons have to be idle."""
    yield nursery_process
    nursery_process.end_all()


@pytest.fixture
def models() -> Iterator[Path]:
    """A directory that other users can reach, unlike tmp_path."""
    top = Path(tempfile.mkdtemp(prefix="pst-models-", dir="/tmp"))
    top.chmod(0o755)
    yield top
    shutil.rmtree(top)
