"""Whether the modes of files and directories let a user read them. They count for what a fetch copies: a
prefix gives access to all checkpoints below it, but not to every other file that the daemon can read."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Sequence

from ...errors import AccessDeniedError
from .. import Access
from . import paths

_READ, _SEARCH = 4, 1
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


def check_modes(fd: int, path: str, access: Access) -> None:
    """Raises AccessDeniedError if modes count (`Access.for_fetch`) and forbid the caller to read the open
    file or directory, or to go through the directories between it and the prefix that allows `path`. These
    are the directories where it really lies, by whatever links it was named."""
    if access.privileged or not access.for_fetch:
        return
    top = os.path.realpath(paths.allowing(path, access)).rstrip("/")
    real = _real_path(fd, path)
    if real != top and not real.startswith(top + "/"):
        raise paths.path_error(path, access, OSError(errno.EXDEV, os.strerror(errno.EXDEV)))
    status = os.fstat(fd)
    if real != top:
        try:
            _check_above(top or "/", real[len(top) + 1 :].split("/"), status, access)
        except OSError as error:
            raise paths.path_error(path, access, error) from error
    _check_mode(path, status, access, _READ | _SEARCH if stat.S_ISDIR(status.st_mode) else _READ)


def _check_above(top: str, names: Sequence[str], status: os.stat_result, access: Access) -> None:
    """Goes from `top` down to the file of that status, by descriptors, and checks each directory between
    them. By paths somebody could put another directory, which may be searched, in the place of one between
    two looks. Raises OSError where the file does not lie there any more, and AccessDeniedError."""
    held = os.open(top, _LOOK | os.O_DIRECTORY)
    try:
        for number, name in enumerate(names, 1):
            fd = os.open(name, _LOOK, dir_fd=held)
            os.close(held)
            held = fd
            found = os.fstat(held)
            if number < len(names):
                _check_mode("/".join((top, *names[:number])), found, access, _SEARCH)
            elif not os.path.samestat(found, status):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    finally:
        os.close(held)


def _real_path(fd: int, path: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # /proc is not mounted
        return os.path.realpath(path)


def _check_mode(path: str, status: os.stat_result, access: Access, needed: int) -> None:
    if status.st_uid == access.uid:
        granted = status.st_mode >> 6
    elif status.st_gid in access.gids:
        granted = status.st_mode >> 3
    else:
        granted = status.st_mode
    if granted & needed != needed:
        mode = stat.S_IMODE(status.st_mode)
        raise AccessDeniedError(
            f"uid {access.uid} may not read {path}: its mode {mode:04o} does not let it (the owner is "
            f"{status.st_uid}:{status.st_gid}), which counts for all but weights; change the mode, or leave "
            "it out",
            file=path,
        )
