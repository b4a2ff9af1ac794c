"""Links in the documentation lead somewhere, anchors included, and dead ones in the reference are found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("deploy/**/*.md")])
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(?<!\\)\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)")
_HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)


def links(page: str) -> list[str]:
    return _LINK.findall(re.sub(r"`[^`\n]*`", "", _FENCE.sub("", page)))


def anchors(page: str) -> set[str]:
    """As GitHub makes them of headings; the second of the same name gets -1."""
    found: dict[str, int] = {}
    names = set()
    for heading in _HEADING.findall(_FENCE.sub("", page)):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return names


def broken(path: Path) -> list[str]:
    wrong = []
    for link in links(path.read_text()):
        if _EXTERNAL.match(link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_resolves(path: Path) -> None:
    assert broken(path) == []


def test_a_dead_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    (tmp_path / "other.md").write_text("# One `word`, two\n# Same\n# Same\n```\n# no heading\n```\n")
    page.write_text(
        "[a](other.md) [b](other.md#one-word-two) [c](#here) [d](https://x.example/#y) [g](other.md#same-1)\n"
        "[e](gone.md) [f](other.md#none) [h](other.md#no-heading)\n# Here\n"
        "`[no](link.md)`\n```\n[no](x.md)\n```\n"
    )
    assert broken(page) == ["gone.md", "other.md#none", "other.md#no-heading"]


def check_reference(directory: Path) -> tuple[int, list[str]]:
    command = [sys.executable, str(ROOT / "docs/check_reference.py"), str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, [line.removeprefix(f"{directory}/") for line in done.stderr.splitlines()]


def test_a_dead_link_in_the_pages_of_the_reference_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "pages"
    (directory / "sub").mkdir(parents=True)
    (tmp_path / "beside.html").write_text("")
    (directory / "a b.css").write_text("")
    (directory / "index.html").write_text('<meta http-equiv="refresh" content="0; url=./sub/page.html"/>')
    (directory / "sub/page.html").write_text(
        '<p id="here"><a href="#here">1</a><a href="">2</a><a href="../index.html">3</a>'
        '<link href="../a%20b.css"><a href="https://x.example/y#z">4</a><img src="data:image/png;base64,AA">'
        "<script>`<a href=\"${made}\">`</script><pre>&lt;a href='text'&gt;</pre>"
    )
    assert check_reference(directory) == (0, [])
    (directory / "sub/wrong.html").write_text(
        '<a href="page.html#here">1</a><a href="page.html#gone">2</a><a href="#here">3</a>'
        '<a href="gone.html">4</a><a href="../../beside.html">5</a><img src="gone.png">'
    )
    dead = ["page.html#gone", "#here", "gone.html", "../../beside.html", "gone.png"]
    assert check_reference(directory) == (1, [f"sub/wrong.html: {link}" for link in dead])


def test_a_reference_without_pages_is_no_reference(tmp_path: Path) -> None:
    assert check_reference(tmp_path) == (1, [f"{tmp_path}: no pages"])
