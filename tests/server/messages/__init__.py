"""An example of every error message of the daemon, a module for each part of it: `EXAMPLES`.

A new error needs an entry. Where it can be provoked in a few lines it is, by `provoked`; else `said` has its
text, which has to match the source, so that a change of the words needs one here. What never reaches a user
is in `INTERNAL` of the test, by a part of its text, with the reason.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from penstock.server.checkpoint.catalog import NO_WISH, Catalog
from penstock.server.sources import Access
from penstock.server.sources.verification import Wish

from ...error_rule import Example
from ..support import ROOT, file_catalog


class ToldError(Exception):
    """Stands for an error whose text is given."""


def said(thing: str, wrong: str, remedy: str) -> Example:
    """A message that consists of the three parts, one after the other."""
    message = thing + wrong + remedy
    return Example(message[:60], lambda: ToldError(message), thing, wrong, remedy)


def provoked(provoke: Callable[[], object], thing: str, wrong: str, remedy: str) -> Example:
    return Example(f"{thing} {wrong}"[:60], provoke, thing, wrong, remedy)


@contextlib.contextmanager
def catalog() -> Iterator[tuple[Catalog, Path]]:
    """And an empty directory."""
    with file_catalog() as made, tempfile.TemporaryDirectory() as directory:
        yield made, Path(directory)


def resolved(
    files: dict[str, bytes], *sources: str, access: Access = ROOT, variant: str = "", wish: Wish = NO_WISH
) -> Callable[[], object]:
    """Resolves the sources, which are relative to a directory with these files; without any the directory."""

    def provoke() -> object:
        with catalog() as (made, directory):
            for name, content in files.items():
                (directory / name).write_bytes(content)
            named = [str(directory / source) for source in sources] or [str(directory)]
            return made.resolve(named, access, variant, wish)

    return provoke
