"""Ctrl-C at any moment: the call ends, and nothing stays behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ..conftest import StartDaemon
from ..support import Nursery, expected, random_tensors, write_checkpoint
from .interrupts import be_interrupted

MIB = 1 << 20
LONG_SECONDS = 900.0
"""For the long form. A client that hangs ends itself before."""


@pytest.mark.parametrize(
    "calls", [40, pytest.param(1000, marks=[pytest.mark.stress, pytest.mark.timeout(LONG_SECONDS)])]
)
@pytest.mark.parametrize("seed", [1, 2])
def test_an_interrupt_at_any_moment_ends_a_call_and_leaves_nothing_behind(
    seed: int, calls: int, tmp_path: Path, start_daemon: StartDaemon, nursery: Nursery
) -> None:
    """An exception inside gRPC's own code would hang the process for good, or abort it."""
    directory = tmp_path / "model"
    directory.mkdir()
    tensors = random_tensors(40, MIB // 8, seed=1)
    path = write_checkpoint(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps({"architectures": []}))
    daemon = start_daemon("--memory-limit", "32MiB")
    client = nursery.start(
        be_interrupted,
        socket_dir=daemon.socket_dir,
        source=path,
        directory=directory,
        calls=calls,
        seed=seed,
    )
    over = client.hear("over", patience_seconds=LONG_SECONDS)
    assert client.wait() == 0, client.errors()
    assert over["found"] == expected(tensors)
    for kind, through in over["through"].items():
        assert through < calls, f"no interruption came in a {kind}"
    daemon.wait_idle()
    daemon.assert_log_clean()
