"""What people install: the wheel and the source distribution."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a source distribution, and the wheel that is built from it."""
    pytest.importorskip("build")
    target = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(target), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    return target


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_three_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"penstock"}
    assert {name.split("/")[1] for name in names} == {"v1", "client", "server"}
    expected = {
        f"penstock/{part}/{path.relative_to(ROOT / top / 'penstock' / part)}"
        for top, part in (("proto", "v1"), ("client", "client"), ("server", "server"))
        for path in (ROOT / top / "penstock" / part).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert {f"penstock/{part}/py.typed" for part in ("v1", "client", "server")} <= names


def test_its_metadata_names_the_extras_the_programs_and_the_licence(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    metadata = email.message_from_bytes(wheel.read(f"{info}/METADATA"))
    assert {"server", "client"} <= set(metadata.get_all("Provides-Extra", []))
    assert metadata["Requires-Python"] == ">=3.10"
    scripts = wheel.read(f"{info}/entry_points.txt").decode()
    assert "penstockd = penstock.server.__main__:main" in scripts
    assert "penstock = penstock.client.cli.commands:main" in scripts
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    server = [line for line in metadata.get_all("Requires-Dist", []) if "extra == 'server'" in line]
    client = [line for line in metadata.get_all("Requires-Dist", []) if "extra == 'client'" in line]
    assert server
    assert client
    assert not any(line.startswith("torch") for line in server)
    assert not any(line.startswith(("boto3", "prometheus")) for line in client)


def tracked(git: str, *more: str) -> set[str]:
    """The files of the checkout, below ROOT."""
    command = [git, "-C", str(ROOT), "-c", f"safe.directory={ROOT}", "ls-files", "-z", *more]
    return set(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")[:-1])


def test_the_source_distribution_holds_what_git_tracks_and_nothing_else(
    built: Path, require_tool: Callable[[str], str]
) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip(f"{ROOT} is no git checkout")
    git = require_tool("git")
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive if not member.isdir()}
    present = {name for name in tracked(git) if (ROOT / name).exists()}
    assert present - names == set()
    # What a developer is about to add may be in it too.
    assert names - present - tracked(git, "--others", "--exclude-standard") == {"PKG-INFO"}


def test_what_is_unpacked_runs_without_the_source_tree(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    # Without `site`, whose .pth files lead to the source tree of an editable installation.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *libraries])}
    for code in (
        "import penstock.server.__main__ as m; print(m.__file__)",
        "import penstock.client.client as m; print(m.__file__)",
    ):
        said = subprocess.run(
            [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert Path(said.stdout.strip()).is_relative_to(tmp_path)
    help_ = [sys.executable, "-S", "-m", "penstock.server", "--help"]
    said = subprocess.run(help_, env=environment, capture_output=True, text=True, check=True)
    assert "--socket-dir" in said.stdout
