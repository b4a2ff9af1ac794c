"""Every script in examples/ runs and says what it should."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ..support import REPOSITORY, DaemonProcess, run_python, running_daemon, write_checkpoint

EXAMPLES = REPOSITORY / "examples"


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with running_daemon("--memory-limit", "256MB") as daemon:
        yield daemon


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    tensors = {"weight": torch.full((3, 5), 0.5), "bias": torch.zeros(3)}
    return write_checkpoint(tmp_path / "linear.safetensors", tensors)


def run(daemon: DaemonProcess, script: str, *arguments: str | Path) -> list[str]:
    environment = {"PENSTOCK_SOCKET_DIR": str(daemon.socket_dir), "HF_HUB_OFFLINE": "1"}
    done = run_python(EXAMPLES / script, *arguments, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout.splitlines()


def test_load(daemon: DaemonProcess, checkpoint: Path) -> None:
    said = run(daemon, "load.py", checkpoint)
    assert sorted(said[:2]) == ["bias: torch.float32 (3,)", "weight: torch.float32 (3, 5)"]
    assert said[2].startswith("2 tensors, 72 bytes, ")


def test_load_into(daemon: DaemonProcess, checkpoint: Path) -> None:
    assert run(daemon, "load_into.py", checkpoint) == [
        "Linear(in_features=5, out_features=3, bias=True) cpu 7.5"
    ]


def test_drop_in(daemon: DaemonProcess, checkpoint: Path) -> None:
    said = run(daemon, "drop_in.py", checkpoint.parent)
    assert sorted(said) == ["bias: torch.float32 (3,)", "weight: torch.float32 (3, 5)"]


def test_prefetch(daemon: DaemonProcess, checkpoint: Path) -> None:
    said = run(daemon, "prefetch.py", checkpoint)
    assert said[0] == "2 tensors, read from storage for this load: 0 bytes"
    assert f"['{checkpoint}']: leased, 72 bytes, pinned: True" in said[1:]


def test_transformers_model(daemon: DaemonProcess) -> None:
    pytest.importorskip("transformers")
    from penstock.client.cli.demo import find_model

    (said,) = run(daemon, "transformers_model.py", find_model().parent, "A sentence.")
    values = torch.tensor([float(value) for value in said.split()])
    assert values.shape == (384,)
    assert abs(float(values.norm()) - 1) < 1e-4


def test_every_example_is_run() -> None:
    tested = {name.removeprefix("test_") + ".py" for name in globals() if name.startswith("test_")}
    assert {path.name for path in EXAMPLES.glob("*.py")} <= tested
