"""Connections to the daemon's Unix sockets."""

from __future__ import annotations

import os
import select
import socket
import struct
import urllib.parse


def grpc_target(path: str) -> str:
    """The name of a socket for gRPC."""
    return "unix:" + urllib.parse.quote(os.fsencode(path))


def connect(path: str, kind: socket.SocketKind, timeout_seconds: float) -> socket.socket:
    """A blocking connection, without a timeout for what is done with it. Raises OSError."""
    connection = socket.socket(socket.AF_UNIX, kind | socket.SOCK_CLOEXEC)
    try:
        # With a timeout of Python's own it would fail at once while more connections wait to be accepted than
        # the kernel keeps. This one is the kernel's, which waits.
        seconds, rest = divmod(timeout_seconds, 1)
        timeout = struct.pack("ll", int(seconds), int(rest * 1e6))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
        connection.connect(path)
    except BaseException:
        connection.close()
        raise
    return connection


def hung_up(connection: socket.socket) -> bool:
    """Whether the other side has closed it."""
    news = select.poll()
    news.register(connection, 0)  # POLLHUP is told anyway
    return bool(news.poll(0))
