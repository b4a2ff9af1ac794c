"""Programs of benchmarks/ run as modules and as files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = sorted((ROOT / "benchmarks").glob("*.py"))
PROGRAMS = [path for path in MODULES if '\nif __name__ == "__main__":\n' in path.read_text()]
LIGHT = ("arrivals", "fleet", "make_checkpoint", "measure", "tier")
"""Programs whose help needs no heavy library."""


def imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def first_of(tree: ast.Module, packages: tuple[str, ...]) -> int:
    """The line of the first import from these packages; one beyond the end without any."""
    lines = [
        node.lineno for node in tree.body for name in imported(node) if name.partition(".")[0] in packages
    ]
    return min(lines, default=sys.maxsize)


def puts_root_on_path(tree: ast.Module) -> int:
    """The line where that begins; 0 without it."""
    wanted = ast.dump(
        ast.parse("if not __package__:\n    sys.path[0] = str(Path(__file__).resolve().parents[1])").body[0]
    )
    return next((node.lineno for node in tree.body if ast.dump(node) == wanted), 0)


def test_there_are_programs() -> None:
    assert len(PROGRAMS) > 10


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_program_puts_the_root_on_the_path_before_it_imports_from_there(path: Path) -> None:
    tree = ast.parse(path.read_text())
    line = puts_root_on_path(tree)
    assert bool(line) == (path in PROGRAMS)
    assert line < first_of(tree, ("benchmarks", "tests"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_its_neighbours_by_their_whole_names(path: Path) -> None:
    bare = {module.stem for module in MODULES}
    names = [name for node in ast.walk(ast.parse(path.read_text())) for name in imported(node)]  # type: ignore[arg-type]
    assert [name for name in names if name.partition(".")[0] in bare] == []


@pytest.mark.parametrize("name", LIGHT)
def test_a_program_runs_as_a_module_in_the_root_and_as_a_file_from_anywhere(
    name: str, tmp_path: Path
) -> None:
    environment = {"PATH": os.environ["PATH"]}
    helps = [
        subprocess.run(
            [sys.executable, *command, "--help"],
            cwd=directory,
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        for command, directory in (
            (("-m", f"benchmarks.{name}"), ROOT),
            ((str(ROOT / "benchmarks" / f"{name}.py"),), tmp_path),
        )
    ]
    assert [(done.returncode, done.stderr) for done in helps] == [(0, ""), (0, "")]
    assert helps[0].stdout == helps[1].stdout
    assert "usage: " in helps[0].stdout
