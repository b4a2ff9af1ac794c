"""Fails where a link in the HTML pages below a directory leads to no file there, or to no anchor of its page.

`make reference` ends with it.
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class _Page(HTMLParser):
    """The anchors of a page, and where it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors = {""}
        self.links: list[str] = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        for name, value in attributes:
            if name == "id":
                self.anchors.add(value or "")
            elif name in ("href", "src"):
                self.links.append(value or "")
            elif tag == "meta" and name == "content" and value and "url=" in value:
                # A page that only leads on to another.
                self.links.append(value.partition("url=")[2])


def dead_links(directory: Path) -> list[str]:
    """One line for each. Links to other sites are not followed."""
    directory = directory.resolve()
    pages = {path: _Page(path) for path in sorted(directory.rglob("*.html"))}
    if not pages:
        return [f"{directory}: no pages"]
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            found = target.is_relative_to(directory) and target.is_file()
            if found and target in pages:
                found = unquote(parts.fragment) in pages[target].anchors
            if not found:
                dead.append(f"{path}: {link}")
    return dead


def main() -> int:
    (directory,) = sys.argv[1:]
    dead = dead_links(Path(directory))
    for line in dead:
        print(line, file=sys.stderr)
    return 1 if dead else 0


if __name__ == "__main__":
    sys.exit(main())
