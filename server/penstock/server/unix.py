"""Unix sockets that every user may connect to, and who did."""

from __future__ import annotations

import os
import socket
import stat
import struct
from pathlib import Path

BACKLOG = 256
_PEER = struct.Struct("iII")


def listen(path: Path, kind: socket.SocketKind) -> socket.socket:
    """Listens at `path`, in place of whatever is there: the caller holds the directory's lock, so that is
    stale. The mode lets everybody in: who may stay is for the caller to decide."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        listener.bind(str(path))
        os.chmod(path, stat.S_IRUSR | stat.S_IWUSR | 0o066)
        listener.listen(BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and uid at the other end when it connected, as the kernel knows them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _gid = _PEER.unpack(raw)
    return pid, uid
