"""Unix sockets that every user may connect to, and the identity of a process that did."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

from ..errors import ConfigError
from ..system.own_files import file_id, unlink_own

logger = logging.getLogger(__name__)

BACKLOG = 4096
"""Connections that wait to be accepted, or as many as the system allows (net.core.somaxconn, 4096 by
default). When so many wait, the next client has to wait, or gets EAGAIN, which gRPC takes for the end of the
daemon."""
ACCEPT_AT_ONCE = 256
"""Connections accepted in one turn of the event loop, so that a flood does not starve it: about 5 ms."""
ACCEPT_PAUSE_SECONDS = 1.0
"""The pause after no descriptor was left."""
_PEER = struct.Struct("iII")
_SO_PEERGROUPS = 59
"""Not in `socket`."""
_MOST_GROUPS_BYTES = 1024
"""The size of 256 groups. Python's `getsockopt` takes no larger buffer."""


class Listener:
    """Listens at `path`, and replaces a socket on which nobody listens any more. The mode lets everybody
    connect. The caller decides whom to serve. Lives on the event loop."""

    def __init__(
        self, path: Path, kind: socket.SocketKind, on_connection: Callable[[socket.socket], None]
    ) -> None:
        """`on_connection` gets each connection, non-blocking, and owns it from then on. Raises ConfigError if
        somebody listens already."""
        self._path = path
        self._on_connection = on_connection
        self._closed = False
        _remove_stale(path, kind)
        self.socket = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            self.socket.bind(str(path))
            # Between these two calls a user who may write in the directory could replace the socket.
            self._id = file_id(path)
            os.chmod(path, stat.S_IRUSR | stat.S_IWUSR | 0o066)
            self.socket.listen(BACKLOG)
        except BaseException:
            self.socket.close()
            raise
        self._listen()

    def close(self) -> None:
        """Removes the socket's file too, unless another has taken its place."""
        self._closed = True
        asyncio.get_running_loop().remove_reader(self.socket)
        unlink_own(self._path, self._id)
        self.socket.close()  # last: once it is closed, another file may get the inode's number

    def _listen(self) -> None:
        if not self._closed:
            asyncio.get_running_loop().add_reader(self.socket, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPT_AT_ONCE):
            try:
                connection, _address = self.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: the clients wait in the backlog
                logger.warning("a connection to %s could not be accepted: %s", self._path, error)
                loop = asyncio.get_running_loop()
                loop.remove_reader(self.socket)  # or the event loop would do nothing else
                loop.call_later(ACCEPT_PAUSE_SECONDS, self._listen)
                return
            connection.setblocking(False)
            self._on_connection(connection)


def peer(connection: socket.socket) -> tuple[int, int]:
    """Process id and uid at the other end when it connected, as the kernel knows them."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    pid, uid, _gid = _PEER.unpack(raw)
    return pid, uid


def peer_groups(connection: socket.socket) -> frozenset[int]:
    """The groups of the process at the other end. If it is in more than 256, only its primary group."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    gid: int = _PEER.unpack(raw)[2]
    try:
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS_BYTES)
    except OSError as error:
        if error.errno != errno.ERANGE:
            raise
        groups = b""
    return frozenset({gid, *(group for (group,) in struct.iter_unpack("I", groups))})


def _remove_stale(path: Path, kind: socket.SocketKind) -> None:
    stale = file_id(path)
    if stale is None:
        return
    with socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno != errno.EAGAIN:  # which is a full backlog
                unlink_own(path, stale)
                return
    raise ConfigError(
        f"--socket-dir: another penstockd listens on {path}, though it does not hold the directory's lock: "
        "its lock file was removed; stop it, or choose another directory"
    )
