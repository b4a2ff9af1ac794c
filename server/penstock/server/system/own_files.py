"""Removes files that this process made, unless another file has taken their place meanwhile."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

FileId = tuple[int, int]
"""Device and inode. No other file has them as long as this one is open, even if it is unlinked."""


def file_id(path: Path) -> FileId | None:
    """None: there is no such file."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def unlink_own(path: Path, own: FileId | None) -> None:
    """Removes a file that this process made, if it is still the one at `path`. Linux cannot do both in one
    step: a file that takes its place between the two is lost."""
    if own is not None and file_id(path) == own:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
