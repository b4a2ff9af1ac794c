"""The client's end of handoff.sock: a session token first, then the slabs of a load, and, if their bytes turn
out to be wrong, word of that.

The connection is the lease: while it is open, the daemon counts the client among the holders of the slabs. So
it outlives the load: the owner of the mapping closes it after unmapping the slabs.

`socket.recv_fds` ignores its flags, and would leak slabs into child processes, so recvmsg is used.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

from google.protobuf.message import DecodeError

from penstock.v1 import streamer_pb2 as pb

from .. import errors
from ..system import descriptors, unix
from ..system.version import client_version
from .socket_dir import socket_path

# Linux takes at most this many file descriptors in one message (SCM_MAX_FD).
MAX_PACKET_FDS = 253
# A frame is a few bytes; a refusal is a sentence.
_MAX_FRAME_BYTES = 64 * 1024
# Everything awaited here was sent before the daemon announced it. More than a moment means that it hangs.
TIMEOUT_SECONDS = 30.0


class Handoff:
    """One connection to handoff.sock, and owner of its file descriptor until `close()`."""

    def __init__(self, connection: socket.socket, where: str) -> None:
        """Takes `connection`, and closes it on failure. Raises the error with which the daemon refused it."""
        self._connection = connection
        self._where = where
        self._lease_fd = -1
        self._lock = threading.RLock()
        """Held while the lease's descriptor is used or closed: its number may be another file's afterwards. A
        view that dies may close it at any line, so that one thread may hold it twice."""
        self._news: select.poll | None = None
        self._pid = os.getpid()
        try:
            connection.settimeout(TIMEOUT_SECONDS)
            frame, fds = self._receive()
            _close_all(fds)
            if frame.HasField("refused"):
                raise errors.by_reason(frame.refused.reason, frame.refused.message)
            if fds or not frame.hello.token:
                raise errors.ProtocolError(
                    "the first packet on handoff.sock is not a session token: the daemon has a version that "
                    f"client {client_version()} cannot talk to; upgrade the older of the two"
                )
        except BaseException:
            connection.close()
            raise
        self.token = frame.hello.token
        self.daemon_version = frame.hello.daemon_version
        # 0: a daemon that takes no list of names in parts.
        self.max_request_bytes = frame.hello.max_request_bytes

    @classmethod
    def connect(cls, socket_dir: Path) -> Handoff:
        """Raises DaemonUnavailableError if nobody listens."""
        path = socket_path(socket_dir, "handoff.sock")
        try:
            connection = unix.connect(path, socket.SOCK_SEQPACKET, TIMEOUT_SECONDS)
        except OSError as error:
            raise errors.unreachable(str(socket_dir), error) from error
        return cls(connection, str(socket_dir))

    @property
    def daemon_runs(self) -> bool:
        """Whether the daemon has the other end open. Only before the slabs are received."""
        with self._lock:
            return self._connection.fileno() >= 0 and not unix.hung_up(self._connection)

    def receive_slabs(self, slab_count: int) -> Iterator[list[int]]:
        """Yields the slabs of a load in ring order, as lists of at most 253 fds, `slab_count` in all.

        Each list belongs to the caller, who should close it before asking for the next one: a large
        checkpoint has more slabs than a process may have open files.
        """
        received = 0
        while received < slab_count:
            frame, fds = self._receive(min(slab_count - received, MAX_PACKET_FDS))
            if frame.HasField("failed"):
                _close_all(fds)
                raise errors.from_status(frame.failed.status)
            if (
                not frame.HasField("slabs")
                or frame.slabs.first != received
                or frame.slabs.count != len(fds)
                or not 0 < len(fds) <= slab_count - received
            ):
                _close_all(fds)
                raise errors.broken(
                    f"expected slabs {received} to {slab_count} on handoff.sock, got {len(fds)} file "
                    f"descriptors with {str(frame).strip()!r}"
                )
            received += len(fds)
            yield fds
        # From here on the connection is only kept open, perhaps until the process ends with tensors alive. A
        # socket object would then warn that nobody closed it.
        with self._using_lease():
            self._lease_fd = self._connection.detach()
            self._news = select.poll()
            self._news.register(self._lease_fd, select.POLLIN)

    def check(self) -> None:
        """Raises the error with which the daemon has taken back what it had announced of the load, once. Does
        not wait: it costs a system call."""
        with self._using_lease():
            if self._news is not None and self._news.poll(0):
                self._read_news()

    def _using_lease(self) -> contextlib.AbstractContextManager[object]:
        """In a forked child nobody else uses it, and the lock may be held for ever."""
        return self._lock if self._pid == os.getpid() else contextlib.nullcontext()

    def _read_news(self) -> None:
        """Takes a packet, or learns that the daemon has ended, of which the call says more. Packets of other
        kinds are for newer clients."""
        try:
            packet = os.read(self._lease_fd, _MAX_FRAME_BYTES)  # does not block: as a socket it had a timeout
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if not packet:
            self._news = None
            return
        frame = _parsed(packet)
        if frame.HasField("failed"):
            raise errors.from_status(frame.failed.status)

    def end(self) -> None:
        """As `close`, and also ends the lease for forked children, which have the connection too: for memory
        that none of them can use. In a forked child it only closes."""
        with self._using_lease():
            self._news = None
            if self._pid == os.getpid() and self._lease_fd >= 0:
                fd, self._lease_fd = self._lease_fd, -1
                with socket.socket(fileno=fd) as connection, contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self.close()

    def close(self) -> None:
        """Ends the session and the lease, unless a forked child has the connection too. May be called
        again."""
        with self._using_lease():
            self._news = None
            self._connection.close()
            lease_fd, self._lease_fd = self._lease_fd, -1
            if lease_fd >= 0:
                os.close(lease_fd)

    def _receive(self, fd_count: int = 0) -> tuple[pb.HandoffFrame, list[int]]:
        """The next packet, which should carry `fd_count` file descriptors."""
        try:
            data, ancillary, flags, _ = self._connection.recvmsg(
                _MAX_FRAME_BYTES, socket.CMSG_SPACE(MAX_PACKET_FDS * 4), socket.MSG_CMSG_CLOEXEC
            )
        except TimeoutError as error:
            raise errors.DaemonUnavailableError(
                f"the daemon in {self._where} does not answer on handoff.sock: it hangs, or the machine "
                "does; see `penstock health --live` and its log for which"
            ) from error
        except OSError as error:
            raise errors.DaemonUnavailableError(
                f"the daemon in {self._where} went away ({error.strerror or error}); see its log, and load "
                "again when it is back"
            ) from error
        fds = array.array("i")
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
        received = fds.tolist()
        try:
            if flags & socket.MSG_CTRUNC:
                raise descriptors.too_few(fd_count - len(received))
            if flags & socket.MSG_TRUNC:
                raise errors.broken(f"a packet on handoff.sock is over {_MAX_FRAME_BYTES} bytes")
            if not data:
                raise errors.DaemonUnavailableError(
                    f"the daemon in {self._where} closed the handoff connection; see its log, and load again "
                    "when it is back"
                )
            return _parsed(data), received
        except BaseException:
            _close_all(received)
            raise


def _parsed(packet: bytes) -> pb.HandoffFrame:
    try:
        return pb.HandoffFrame.FromString(packet)
    except DecodeError as error:
        raise errors.broken("a packet on handoff.sock is not a HandoffFrame") from error


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
