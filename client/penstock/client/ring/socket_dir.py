"""Where the daemon listens: its socket directory, and the paths of the sockets in it."""

from __future__ import annotations

import os
from pathlib import Path

DEFAULT_SOCKET_DIR = "/run/penstock"
# sun_path holds 108 bytes with its NUL. gRPC refuses the paths that the kernel refuses, with a worse error.
MAX_SOCKET_PATH_BYTES = 107


def socket_directory(chosen: str | os.PathLike[str] | None) -> Path:
    """The chosen directory, else $PENSTOCK_SOCKET_DIR, else the default one. An empty variable is not set.

    Raises ValueError for an empty path, which would be the working directory.
    """
    if chosen is None:
        chosen = os.environ.get("PENSTOCK_SOCKET_DIR") or DEFAULT_SOCKET_DIR
    if not os.fspath(chosen).strip():
        raise ValueError(
            "socket_dir (--socket-dir) is empty: name a directory, or leave it out for $PENSTOCK_SOCKET_DIR "
            f"or {DEFAULT_SOCKET_DIR}"
        )
    return Path(os.path.abspath(chosen))


def socket_path(socket_dir: Path, name: str) -> str:
    """The path of a socket in the daemon's directory. Raises ValueError if Linux cannot connect to it."""
    path = os.fspath(socket_dir / name)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise ValueError(
            f"the socket path {path} has {len(os.fsencode(path))} bytes and Linux allows "
            f"{MAX_SOCKET_PATH_BYTES}: use a shorter socket directory"
        )
    return path
