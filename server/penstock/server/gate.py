"""The door before gRPC: how many connections each user may have there.

gRPC takes whoever connects and is not told who that is, and each connection costs it a descriptor. So it
listens on a socket that only the daemon's own user may open. Here every connection to `penstock.sock` is
counted for the uid that the kernel names; its bytes are then passed on, both ways, no faster than they are
taken. One too many is closed at once.

It knows nothing of what is said: sessions and their tokens are checked call by call.
"""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .limits import is_privileged
from .unix import BACKLOG, listen, peer

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
"""Of all who are not privileged; no more than an eighth of the descriptors that this process may have, as
each connection takes three. One uid gets a quarter of it."""
FLUSH_SECONDS = 1.0
"""How long the last words of a daemon that stops may take to be taken."""


class Gate:
    """Passes connections from `path` on to `inner`. Lives on the event loop."""

    def __init__(self, path: Path, inner: Path, *, allows: Callable[[int], bool]) -> None:
        """`allows` says whether a uid may connect at all."""
        self._path = path
        self._inner = inner
        self._allows = allows
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_connections = min(MAX_CONNECTIONS, files // 8)
        self._max_per_uid = max(1, self._max_connections // 4)
        self._by_uid: Counter[int] = Counter()
        self._clients: dict[_Client, int] = {}
        self._connecting: set[asyncio.Task[None]] = set()
        self._empty = asyncio.Event()
        self._empty.set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Binds. The caller holds the directory's lock."""
        listener = listen(self._path, socket.SOCK_STREAM)
        self._server = await asyncio.get_running_loop().create_unix_server(
            lambda: _Client(self._came, self._went), sock=listener, backlog=BACKLOG
        )

    async def stop(self) -> None:
        """Once gRPC has stopped: ends every connection, after what gRPC said last."""
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        try:
            await asyncio.wait_for(self._empty.wait(), FLUSH_SECONDS)
        except asyncio.TimeoutError:
            for client in list(self._clients):
                client.transport.abort()

    def _came(self, client: _Client) -> None:
        uid = peer(client.transport.get_extra_info("socket"))[1]
        if not self._admits(uid):
            logger.debug("uid %d was not let in: it has %d connections", uid, self._by_uid[uid])
            client.transport.abort()
            return
        self._clients[client] = uid
        self._by_uid[uid] += 1
        self._empty.clear()
        client.transport.pause_reading()
        task = asyncio.get_running_loop().create_task(self._connect(client))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    def _admits(self, uid: int) -> bool:
        if is_privileged(uid):
            return True
        others = sum(count for other, count in self._by_uid.items() if not is_privileged(other))
        return self._allows(uid) and self._by_uid[uid] < self._max_per_uid and others < self._max_connections

    async def _connect(self, client: _Client) -> None:
        loop = asyncio.get_running_loop()
        try:
            _, server = await loop.create_unix_connection(_End, str(self._inner))
        except OSError as error:
            logger.warning("a connection could not be passed on to gRPC: %s", error)
            client.transport.abort()
            return
        client.join(server)
        client.transport.resume_reading()

    def _went(self, client: _Client) -> None:
        uid = self._clients.pop(client, None)
        if uid is None:
            return
        self._by_uid[uid] -= 1
        if not self._by_uid[uid]:
            del self._by_uid[uid]
        if not self._clients:
            self._empty.set()


class _End(asyncio.Protocol):
    """One end of a connection that is passed on; what comes in here goes out at the other."""

    transport: asyncio.Transport
    _other: _End | None = None
    _early = b""
    """What came before `join`: older Pythons (3.11.2 for one) read once although reading is paused."""

    def join(self, other: _End) -> None:
        self._other, other._other = other, self
        other.transport.write(self._early)
        self._early = b""
        if self.transport.is_closing():
            other.transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self._other is None:
            self._early += data
            self.transport.resume_reading()
            self.transport.pause_reading()  # which holds from the first read on
        elif not self._other.transport.is_closing():
            self._other.transport.write(data)

    def pause_writing(self) -> None:
        if self._other is not None:
            self._other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self._other is not None:
            self._other.transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        if self._other is not None:
            self._other.transport.close()


class _Client(_End):
    def __init__(self, came: Callable[[_Client], None], went: Callable[[_Client], None]) -> None:
        self._came = came
        self._went = went

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._came(self)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._went(self)
