"""A private daemon runs from its parent's installation, whatever that is made of, and from nothing else."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import penstock
from penstock.client import DaemonUnavailableError, StreamerClient
from penstock.client.system.interpreter import import_paths

# Says where its private daemon runs, which it must have imported to say anything.
PROGRAM = """
import json, os
from penstock.client import StreamerClient
with StreamerClient.embedded("32MiB") as client:
    pid = client.status()["pid"]
    print(json.dumps({"pid": pid, "cwd": os.readlink(f"/proc/{pid}/cwd")}))
"""
HOSTILE = "open({mark!r}, 'a').write(__file__)\nraise SystemExit(3)\n"
SHADOWED = (
    "grpc",
    "json",
    "runpy",
    "os",
    "site",
    "sitecustomize",
    "usercustomize",
    "encodings",
    "msgspec",
    "h11",
)
PACKAGES = (
    "grpc",
    "google.protobuf",
    "google.rpc",
    "grpc_health",
    "msgspec",
    "h11",
    "boto3",
    "prometheus_client",
)


def roots() -> list[str]:
    """Where this package lies: in a checkout, three directories."""
    return [os.path.dirname(path) for path in penstock.__path__]


def third_party() -> list[str]:
    """Where what it needs lies."""
    found = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        locations = list(spec.submodule_search_locations or ())
        found.append(str(Path(locations[0]).parents[name.count(".")]))
    return list(dict.fromkeys(found))


def python() -> str:
    """The interpreter without a virtual environment, which finds nothing by itself."""
    return os.path.realpath(sys.executable)


def environment(tmp_path: Path, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PENSTOCK"))}
    # A user's site-packages would be found by the interpreter alone.
    return {**kept, "PYTHONUSERBASE": str(tmp_path / "no user site"), **variables}


def run(command: list[str], *, cwd: Path, env: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture
def hostile(tmp_path: Path) -> Iterator[Path]:
    """A working directory with modules that leave a mark when anybody imports them. None has to."""
    directory = tmp_path / "hostile"
    directory.mkdir()
    mark = directory / "mark"
    for name in SHADOWED:
        (directory / f"{name}.py").write_text(HOSTILE.format(mark=str(mark)))
    yield directory
    assert not mark.exists(), f"imported: {mark.read_text()}"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "bin" / "program.py"
    path.parent.mkdir()
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("variables", [{}, {"PYTHONSAFEPATH": "1"}], ids=["plain", "safe path"])
def test_it_does_not_import_from_the_working_directory(
    variables: dict[str, str], hostile: Path, program: Path, tmp_path: Path
) -> None:
    env = environment(tmp_path, PYTHONPATH=os.pathsep.join([*roots(), *third_party()]), **variables)
    assert run([python(), str(program)], cwd=hostile, env=env)["cwd"] == str(hostile)


def test_an_empty_entry_of_pythonpath_is_not_the_working_directory(
    hostile: Path, program: Path, tmp_path: Path
) -> None:
    """The parent was started elsewhere, and went there."""
    program.write_text(f"import os\nos.chdir({str(hostile)!r})\n{PROGRAM}")
    env = environment(tmp_path, PYTHONPATH=os.pathsep.join(["", *roots(), *third_party(), ""]))
    assert run([python(), str(program)], cwd=tmp_path, env=env)["cwd"] == str(hostile)


@pytest.mark.parametrize("flags", [[], ["-I"], ["-E"], ["-s"]], ids=str)
def test_a_virtual_environment_is_the_daemon_s_too(
    flags: list[str], hostile: Path, program: Path, tmp_path: Path
) -> None:
    """With a `.pth` file, as editable installations have."""
    directory = tmp_path / "environment"
    venv.create(directory, symlinks=True)
    (site_packages,) = directory.glob("lib/python*/site-packages")
    (site_packages / "editable.pth").write_text("\n".join([*roots(), *third_party()]))
    run([str(directory / "bin" / "python"), *flags, str(program)], cwd=hostile, env=environment(tmp_path))


def test_a_finder_that_a_pth_file_installs_is_the_daemon_s_too(
    hostile: Path, program: Path, tmp_path: Path
) -> None:
    """As some editable installations have: here msgspec, which only the daemon imports, lies on no path."""
    hidden = importlib.util.find_spec("msgspec")
    assert hidden is not None
    farm = tmp_path / "packages"
    farm.mkdir()
    for packages in third_party():
        for entry in Path(packages).iterdir():
            if not entry.name.startswith("msgspec") and not (farm / entry.name).exists():
                (farm / entry.name).symlink_to(entry)
    directory = tmp_path / "environment"
    venv.create(directory, symlinks=True)
    (site_packages,) = directory.glob("lib/python*/site-packages")
    (site_packages / "the_finder.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        "        if name == 'msgspec':\n"
        f"            return importlib.util.spec_from_file_location(name, {hidden.origin!r},\n"
        f"                submodule_search_locations={list(hidden.submodule_search_locations or ())!r})\n"
        "sys.meta_path.append(Finder)\n"
    )
    (site_packages / "editable.pth").write_text("\n".join([*roots(), str(farm), "import the_finder"]))
    run([str(directory / "bin" / "python"), str(program)], cwd=hostile, env=environment(tmp_path))


@pytest.mark.parametrize(("flags", "started"), [([], 2), (["-s"], 0)], ids=["with it", "without"])
def test_a_user_s_own_packages_are_the_daemon_s_too(
    flags: list[str], started: int, program: Path, tmp_path: Path
) -> None:
    env = environment(tmp_path, PYTHONPATH=os.pathsep.join([*roots(), *third_party()]))
    asked = [python(), "-c", "import site; print(site.getusersitepackages())"]
    user_site = Path(
        subprocess.run(asked, env=env, capture_output=True, text=True, check=True).stdout.strip()
    )
    user_site.mkdir(parents=True)
    mark = tmp_path / "mark"
    (user_site / "usercustomize.py").write_text(f"open({str(mark)!r}, 'a').write('x')\n")
    run([python(), *flags, str(program)], cwd=tmp_path, env=env)
    assert (mark.read_text() if mark.exists() else "") == "x" * started


def test_a_zip_file_is_the_daemon_s_too(hostile: Path, tmp_path: Path) -> None:
    archive = tmp_path / "program.pyz"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("__main__.py", PROGRAM)
        packed.writestr("penstock/", "")
        for root in roots():
            # With its directories, of which `zipapp` makes entries: namespace packages are found by them.
            for path in sorted(Path(root).rglob("penstock/**/*")):
                if path.suffix != ".pyc":
                    packed.write(path, path.relative_to(root))
    env = environment(tmp_path, PYTHONPATH=os.pathsep.join(third_party()))
    run([python(), str(archive)], cwd=hostile, env=env)


def test_an_installation_in_the_working_directory_is_the_daemon_s_too(tmp_path: Path) -> None:
    """As after `pip install --target .`, with `python -m`."""
    directory = tmp_path / "target"
    (directory / "penstock").mkdir(parents=True)
    for root in roots():
        for path in Path(root, "penstock").iterdir():
            (directory / "penstock" / path.name).symlink_to(path)
    (directory / "program.py").write_text(PROGRAM)
    env = environment(tmp_path, PYTHONPATH=os.pathsep.join(third_party()))
    run([python(), "-m", "program"], cwd=directory, env=env)


def test_a_working_directory_that_pythonpath_names_is_imported_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), ".", "relative", *sys.path])
    assert str(tmp_path) not in import_paths()
    assert str(tmp_path / "relative") in import_paths()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert import_paths().count(str(tmp_path)) == 1
    assert "" not in import_paths()


def test_a_working_directory_that_is_gone_does_not_matter(program: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    program.write_text(
        f"import os\nos.mkdir({str(gone)!r})\nos.chdir({str(gone)!r})\nos.rmdir({str(gone)!r})\n{PROGRAM}"
    )
    env = environment(tmp_path, PYTHONPATH=os.pathsep.join([*roots(), *third_party()]))
    assert run([python(), str(program)], cwd=tmp_path, env=env)["cwd"] == f"{gone} (deleted)"


@pytest.mark.parametrize(
    ("executable", "why"),
    [
        ("", "sys.executable is empty"),
        (None, "sys.executable is empty"),
        ("/gone/bin/python", "/gone/bin/python cannot be run"),
        ("/etc/passwd", "/etc/passwd cannot be run"),
    ],
)
def test_a_program_without_an_interpreter_is_told_to_start_penstockd(
    executable: str | None, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(
        DaemonUnavailableError, match=f"{why}.*`penstockd --socket-dir DIR`.*PENSTOCK_SOCKET_DIR"
    ):
        StreamerClient.embedded("32MiB")


def test_a_frozen_program_is_not_started_again_as_its_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sys.executable is the program itself."""
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(DaemonUnavailableError, match=r"frozen.*`penstockd --socket-dir DIR`"):
        StreamerClient.embedded("32MiB")
