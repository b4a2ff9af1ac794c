"""The handoff socket: who a client is, its token, its slabs, and the end of its leases.

Every connection is a session. The kernel names the peer's uid and pid (SO_PEERCRED). The daemon answers
with a token that only this peer sees. A gRPC call that carries the token is that peer's. The slabs of
a load are sent on the connection that its token came from. When the connection closes, the client has ended
or is done, and everything that the session holds is released.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import logging
import os
import resource
import secrets
import socket
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from penstock.v1 import streamer_pb2 as pb

from ..errors import AccessDeniedError, PenstockError, SessionRequiredError, TooManyLoadsError
from ..system.quota import Quota
from .streams import MAX_MESSAGE_BYTES
from .unix import Listener, peer, peer_groups

logger = logging.getLogger(__name__)

MAX_FDS_PER_PACKET = 253
"""The kernel's SCM_MAX_FD."""
SEND_TIMEOUT_SECONDS = 30.0
MAX_SESSIONS = 4096
"""No more than a quarter of the descriptors that this process may have: each session is one. An eighth is
kept for privileged users."""
MAX_SESSIONS_PER_UID = 1024
"""The most sessions of a user who is not privileged, who also gets at most seven eighths of what other users
leave."""


class Session:
    """One handoff connection. `release` callbacks run once, when it ends."""

    def __init__(
        self, connection: socket.socket, *, uid: int, pid: int, gids: frozenset[int] = frozenset()
    ) -> None:
        self.uid = uid
        self.pid = pid
        self.gids = gids
        self.token = secrets.token_hex(16)
        self.loaded = False
        """A token opens one load only."""
        self.closed = False
        self._connection = connection
        self._numbers = itertools.count()
        self._releases: dict[int, Callable[[], None]] = {}
        self._writable: asyncio.Future[None] | None = None

    def on_close(self, release: Callable[[], None]) -> Callable[[], object]:
        """Runs `release` when the connection ends; at once if it has. Returns a function that withdraws
        it."""
        number = next(self._numbers)
        if self.closed:
            release()
        else:
            self._releases[number] = release
        return functools.partial(self._releases.pop, number, None)

    async def send_slabs(self, fds: Sequence[int]) -> None:
        """Hands out descriptors; the caller keeps its own. Raises SessionRequiredError if the client is
        gone or reads nothing for `SEND_TIMEOUT_SECONDS`."""
        try:
            for first in range(0, len(fds), MAX_FDS_PER_PACKET):
                part = fds[first : first + MAX_FDS_PER_PACKET]
                frame = pb.HandoffFrame(slabs=pb.HandoffSlabs(first=first, count=len(part)))
                await asyncio.wait_for(self._send(frame, part), SEND_TIMEOUT_SECONDS)
        except (OSError, asyncio.TimeoutError) as error:
            raise SessionRequiredError(
                f"the slabs could not be handed to pid {self.pid}: its handoff connection "
                f"{'is not read' if isinstance(error, asyncio.TimeoutError) else 'is closed'}; read it"
            ) from error

    def send_now(self, frame: pb.HandoffFrame) -> None:
        """Sends the first packet, which always finds room. Raises OSError if the client is gone."""
        self._connection.send(frame.SerializeToString())

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._connection)
        loop.remove_writer(self._connection)
        self._connection.close()
        self._wake_sender()
        releases = list(self._releases.values())
        self._releases.clear()
        for release in releases:
            release()

    async def _send(self, frame: pb.HandoffFrame, fds: Sequence[int]) -> None:
        loop = asyncio.get_running_loop()
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        data = frame.SerializeToString()
        while not self.closed:
            try:
                self._connection.sendmsg([data], ancillary)
                return
            except BlockingIOError:
                self._writable = loop.create_future()
                loop.add_writer(self._connection, self._wake_sender)
                await self._writable
        raise BrokenPipeError

    def _wake_sender(self) -> None:
        if not self.closed:
            asyncio.get_running_loop().remove_writer(self._connection)
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)


class HandoffServer:
    """Listens on `handoff.sock` and knows the sessions. Lives on the event loop."""

    def __init__(
        self,
        path: Path,
        *,
        version: str,
        allows: Callable[[int], bool],
        on_refused: Callable[[PenstockError], None],
    ) -> None:
        """`allows` says whether a uid may connect at all; `on_refused` gets the error of each refused
        client."""
        self._path = path
        self._version = version
        self._allows = allows
        self._on_refused = on_refused
        self._sessions: dict[str, Session] = {}
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._quota = Quota(max(2, min(MAX_SESSIONS, files // 4)), most_per_user=MAX_SESSIONS_PER_UID)
        self._listener: Listener | None = None

    @property
    def sessions(self) -> int:
        return len(self._sessions)

    def start(self) -> None:
        """Binds. The caller holds the directory's lock. Raises ConfigError where another daemon listens."""
        self._listener = Listener(self._path, socket.SOCK_SEQPACKET, self._begin)

    def stop(self) -> None:
        """Ends every session. Clients keep what they have mapped."""
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        for session in list(self._sessions.values()):
            self._end(session)

    def session(self, token: str | bytes | None) -> Session:
        """The open session of a token. Raises SessionRequiredError."""
        session = self._sessions.get(token) if isinstance(token, str) else None
        if session is None:
            raise SessionRequiredError(
                f"the call carries no token of an open connection to {self._path}; open one first and pass "
                "its token as metadata penstock-session"
            )
        return session

    def _begin(self, connection: socket.socket) -> None:
        pid, uid = peer(connection)
        session = Session(connection, uid=uid, pid=pid, gids=peer_groups(connection))
        try:
            self._take(uid)
        except PenstockError as error:
            self._on_refused(error)
            refused = pb.HandoffRefused(reason=error.reason, message=error.message)
            self._try_send(session, pb.HandoffFrame(refused=refused))
            session.close()
            return
        hello = pb.HandoffHello(
            token=session.token, daemon_version=self._version, max_request_bytes=MAX_MESSAGE_BYTES
        )
        if not self._try_send(session, pb.HandoffFrame(hello=hello)):
            self._quota.release(uid)
            session.close()
            return
        self._sessions[session.token] = session
        asyncio.get_running_loop().add_reader(connection, self._readable, session, connection)

    def _take(self, uid: int) -> None:
        """Takes one session of the user's share. Raises the error for a client that gets none."""
        if not self._allows(uid):
            raise AccessDeniedError(
                f"uid {uid} may load nothing: penstockd (uid {os.geteuid()}) was started without "
                "--allow; set it"
            )
        if not self._quota.take(uid):
            raise TooManyLoadsError(
                f"uid {uid} has {self._quota.used_by(uid)} connections and may have no more now: all users "
                f"have {self._quota.used} of {self._quota.total}, of which each gets a share; close some"
            )

    def _try_send(self, session: Session, frame: pb.HandoffFrame) -> bool:
        try:
            session.send_now(frame)
        except OSError:
            logger.debug("pid %d was gone before its first packet", session.pid)
            return False
        return True

    def _readable(self, session: Session, connection: socket.socket) -> None:
        """Clients send nothing: this is the end of the connection, or a breach of the protocol."""
        try:
            connection.recv(1)
        except BlockingIOError:
            return
        except OSError as error:
            logger.debug("session of pid %d: %s", session.pid, error)
        self._end(session)

    def _end(self, session: Session) -> None:
        if self._sessions.pop(session.token, None) is not None:
            self._quota.release(session.uid)
        session.close()
