"""What a source that a client names means: an index, or files. Asks the storage for names, and `layout.py`
for what they mean."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from ..errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    InvalidRequestError,
)
from ..sources import Access, ListingDeniedError, Source
from . import layout
from .headers.index import MAX_FILES
from .headers.parsers import Parsers
from .layout import Layout


@dataclass(frozen=True, slots=True)
class Found:
    """The meaning of a source: an index, or files."""

    index_location: str | None
    files: list[str]
    directory: str = ""
    layout: Layout | None = None
    """The names in the directory, if the source is one that could be listed."""
    names: frozenset[str] = frozenset()

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.layout is None else self.layout.warnings


MANY_NAMES = 1_000
"""In so many it takes milliseconds to see which files are weights."""


def expand(source: Source, location: str, access: Access, variant: str, parsers: Parsers) -> Found:
    """The index file that `location` is or has; without an index, the weights that it is or has."""
    if layout.is_index(source.name(location)):
        _refuse_variant(location, variant)
        return Found(location, [])
    try:
        names = source.list(location, access)
    except ListingDeniedError as error:
        return _guess(source, location, access, variant, error)
    if names is None:
        _refuse_variant(location, variant)
        return Found(None, [location])
    decide = partial(layout.decide, location, names, variant)
    decided = parsers.here(access.uid, decide) if len(names) > MANY_NAMES else decide()
    if len(decided.files) > MAX_FILES:
        raise CheckpointInvalidError(
            f"{location} holds {len(decided.files)} files to load, more than {MAX_FILES}; name some of them",
            file=location,
        )
    access.listing.hold(len(decided.files) * len(location))
    index = None if decided.index is None else source.join(location, decided.index)
    files = [source.join(location, name) for name in decided.files]
    return Found(index, files, location, decided, frozenset(names))


def _guess(source: Source, location: str, access: Access, variant: str, denied: ListingDeniedError) -> Found:
    """Looks for files of usual names in a directory that may not be listed. Raises `denied` if none may be
    read."""
    for name in layout.common_names(variant):
        guess = source.join(location, name)
        with contextlib.suppress(CheckpointNotFoundError, AccessDeniedError):
            source.open(guess, access).close()
            return Found(guess, []) if layout.is_index(name) else Found(None, [guess])
    if not location.endswith("/") and not variant:
        with contextlib.suppress(CheckpointNotFoundError, AccessDeniedError):
            source.open(location, access).close()
            return Found(None, [location])
    raise denied


def _refuse_variant(location: str, variant: str) -> None:
    if variant:
        raise InvalidRequestError(
            f"variant: {location[:200]} is one file, and only a directory has variants; name the "
            "directory, or leave the variant out"
        )


def settle(source: Source, found: Found, index: Sequence[str], access: Access) -> tuple[list[str], list[str]]:
    """The files to load instead of those of the index, if some of these are missing and another checkpoint is
    complete; and warnings."""
    decided = found.layout
    if decided is None or not 0 < len(decided.instead) <= MAX_FILES:
        return [], []
    if set(decided.instead).issuperset(index):
        return [], []
    missing = _first_missing(source, found, index, access)
    if missing is not None:
        files = [source.join(found.directory, name) for name in decided.instead]
        return files, [layout.stale(found.directory, decided, missing)]
    if decided.rival is None or decided.rival in index:
        return [], []
    return [], [layout.both(found.directory, decided)]


def _first_missing(source: Source, found: Found, index: Sequence[str], access: Access) -> str | None:
    """The first file of the index that is missing, or is a dangling link."""
    wanted: dict[str, set[str]] = {}
    for file in index:
        folder, _, name = file.rpartition("/")
        wanted.setdefault(folder, set()).add(name)
    there = {"": found.names.intersection(wanted.get("", ()))}
    for file in index:
        folder, _, name = file.rpartition("/")
        if folder not in there:
            there[folder] = _listed(source, found, folder, access).intersection(wanted[folder])
        if name not in there[folder] or source.dangles(source.join(found.directory, file), access):
            return file
    return None


def _listed(source: Source, found: Found, folder: str, access: Access) -> frozenset[str]:
    """The names in a folder of the directory, which are not held when this returns: an index may name
    thousands of folders."""
    before_bytes = access.listing.held_bytes
    try:
        return frozenset(source.list(source.join(found.directory, folder + "/"), access) or ())
    except CheckpointNotFoundError:
        return frozenset()
    finally:
        access.listing.release(access.listing.held_bytes - before_bytes)
