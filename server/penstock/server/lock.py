"""One daemon a directory: gRPC would silently take a live socket's place."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import ConfigError


@contextlib.contextmanager
def locked(directory: Path, *, private: bool) -> Iterator[None]:
    """Makes the directory and holds its lock. A `private` one is removed at the end: its owner may be gone
    without cleaning up. Raises ConfigError."""
    path = directory / "penstockd.lock"
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            f"--socket-dir: {directory} cannot be used: {error.strerror}; choose another"
        ) from error
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"--socket-dir: another penstockd serves {directory}; stop it, or choose another"
            ) from None
        yield
        if private:
            with contextlib.suppress(OSError):
                path.unlink()
                directory.rmdir()
    finally:
        os.close(fd)
