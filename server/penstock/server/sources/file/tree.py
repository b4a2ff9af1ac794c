"""Lists all files at or below a directory.

Each name is opened by its whole path, as a load opens it. So the same rules hold for links and `..`, and no
race leads to a file that the caller may not read. A link to a directory is followed, unless that directory
holds the link.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from ...errors import CheckpointInvalidError, CheckpointNotFoundError, PenstockError, SourceUnavailableError
from ...system import statx
from ...system.statx import FileStatus
from .. import Access, Listed, Wanted, join
from ..looking import MAX_TREE_NAME_BYTES, MAX_TREE_NAMES, held_bytes, too_many_names
from . import modes, paths
from .identity import portable_version

Asking = Callable[[str], contextlib.AbstractContextManager[None]]
_Inode = tuple[tuple[int, int], int]


@dataclass(frozen=True, slots=True)
class _Directory:
    name: str
    """Relative to the top; ends in `/`, or is empty."""
    above: tuple[_Inode, ...] = ()
    """The directories that hold it."""

    @property
    def held_bytes(self) -> int:
        """What it takes while it waits, but for the top."""
        return held_bytes([self.name]) + 8 * len(self.above) if self.name else 0


def walk(top: str, access: Access, wanted: Wanted, asking: Asking) -> Iterator[Listed]:
    """See `Source.tree`. `asking` is entered with a path while this thread waits for the path's mount."""
    left, left_bytes = MAX_TREE_NAMES, MAX_TREE_NAME_BYTES
    waiting = [_Directory("")]
    while waiting:
        directory = waiting.pop()
        access.listing.release(directory.held_bytes)
        path = join(top, directory.name) if directory.name else top
        with asking(path):
            inode, names = _list(path, access, left)
        left -= len(names)
        left_bytes -= sum(len(directory.name) + len(name) for name in names)
        if left < 0 or left_bytes < 0:
            raise too_many_names(top)
        if inode in directory.above:
            raise CheckpointInvalidError(
                f"{path} leads to a directory that holds it, so that the tree has no end; remove the link, "
                "or leave it out",
                file=path,
            )
        above = (*directory.above, inode)
        for last in names:
            name = directory.name + last
            as_file, as_directory = wanted(name), wanted(name + "/")
            if not (as_file or as_directory):
                continue
            with asking(path):
                status = _status(join(top, name), access, required=as_file)
            if status is None:
                continue
            if stat.S_ISDIR(status.mode):
                if as_directory:
                    waiting.append(_Directory(name + "/", above))
                    access.listing.hold(waiting[-1].held_bytes)
            elif as_file and stat.S_ISREG(status.mode):
                yield Listed(name, status.size_bytes, portable_version(status))
        access.listing.release(held_bytes(names))


def _list(path: str, access: Access, most: int) -> tuple[_Inode, list[str]]:
    """The inode of a directory, and the names in it, sorted: at most one more than `most`."""
    fd = paths.open_directory(path, access)
    if fd is None:
        raise CheckpointInvalidError(f"{path} is a file, and no directory; name a directory", file=path)
    try:
        status = statx.file_status(fd)
        modes.check_modes(fd, path, access)
        with os.scandir(fd) as entries:
            names = access.listing.taken(
                path, (entry.name for entry in itertools.islice(entries, most + 1)), most + 1
            )
    except OSError as error:
        raise paths.listing_error(path, error) from error
    finally:
        os.close(fd)
    return (status.device, status.inode), sorted(names)


def _status(path: str, access: Access, *, required: bool) -> FileStatus | None:
    """The status of a file. None if it went away meanwhile, or if it cannot be followed and is not
    `required`."""
    try:
        fd = paths.open_place(path, access)
    except CheckpointNotFoundError:
        if required and _is_link(path, access):
            raise
        return None
    except PenstockError:
        if required:
            raise
        return None
    try:
        return statx.file_status(fd)
    except OSError as error:
        raise SourceUnavailableError(
            f"{path}: asking for its size and times failed: {error.strerror}; check the file system",
            file=path,
        ) from error
    finally:
        os.close(fd)


def _is_link(path: str, access: Access) -> bool:
    try:
        fd = paths.open_raw(path, access, os.O_PATH | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return stat.S_ISLNK(os.fstat(fd).st_mode)
    finally:
        os.close(fd)
