"""Each room says in its `__init__.py` what lies in it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TOPS = [ROOT / "server/penstock/server", ROOT / "client/penstock/client"]
"""Their modules are in the tables of docs/design.md."""
ROOMS = sorted(path.parent for top in TOPS for path in top.rglob("__init__.py") if path.parent not in TOPS)


def unnamed(room: Path) -> list[str]:
    """The modules and packages in the room that its docstring does not name, as a word that begins a line or
    stands in backticks."""
    text = ast.get_docstring(ast.parse((room / "__init__.py").read_text())) or ""
    named = set(re.findall(r"^(\w+)/?(?=  )|`(\w+)/?`", text, re.MULTILINE))
    words = {word for pair in named for word in pair}
    inside = [path for path in room.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    return sorted(path.stem for path in inside if path.stem not in {"__init__", *words})


def test_there_are_rooms() -> None:
    assert len(ROOMS) > 20


@pytest.mark.parametrize("room", ROOMS, ids=lambda room: str(room.relative_to(ROOT)))
def test_a_room_names_its_modules(room: Path) -> None:
    assert unnamed(room) == []


def test_the_modules_at_the_top_are_in_the_tables_of_the_design() -> None:
    text = (ROOT / "docs/design.md").read_text()
    rooms = text[text.index("## Rooms") : text.index("Where to look:")]
    modules = [path for top in TOPS for path in top.glob("*.py") if path.stem != "__init__"]
    assert [path.stem for path in modules if not re.search(rf"`{path.stem}(\.py)?`", rooms)] == []
