"""The lock of a socket directory, so that one daemon serves it: gRPC would silently replace a live socket."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from ..errors import ConfigError
from .own_files import FileId, file_id, unlink_own


@contextlib.contextmanager
def locked(directory: Path, *, private: bool) -> Iterator[None]:
    """Makes the directory and holds its lock. Removes a `private` directory at the end, since its owner may
    have died without doing so. Raises ConfigError."""
    path = directory / "penstockd.lock"
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        made = file_id(directory)
        fd = _open_locked(path)
    except OSError as error:
        raise ConfigError(
            f"--socket-dir: {directory} cannot be used: {error.strerror}; choose another"
        ) from error
    if fd is None:
        raise ConfigError(f"--socket-dir: another penstockd serves {directory}; stop it, or choose another")
    try:
        yield
        if private:
            with contextlib.suppress(OSError):
                unlink_own(path, _id_of(fd))
                if file_id(directory) == made:
                    directory.rmdir()
    finally:
        os.close(fd)


def _open_locked(path: Path) -> int | None:
    """A descriptor that holds the lock of the file that is at `path`. None: another process holds it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file_id(path) == _id_of(fd):
                return fd
            os.close(fd)  # removed by a daemon that ended meanwhile: that lock is nobody's
        except BlockingIOError:
            os.close(fd)
            return None
        except BaseException:
            os.close(fd)
            raise


def _id_of(fd: int) -> FileId:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino
