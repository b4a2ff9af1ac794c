"""One session with the daemon: a handoff connection for the token, a gRPC channel for the calls."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc

from penstock.v1 import streamer_pb2_grpc

from .. import errors
from ..system import descriptors
from ..system.unix import grpc_target
from ..system.version import client_version
from .handoff import Handoff
from .socket_dir import socket_path

_OPTIONS = (
    # A segment may hold a hundred thousand tensors, a listing more.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # Shared connections would share the back-off of a daemon that is just restarting.
    ("grpc.use_local_subchannel_pool", 1),
)


# The process that used gRPC first. In a forked child calls may hang for ever: gRPC's threads do not exist
# there, and its locks may be held.
_grpc_pid = 0


class Session:
    """A session is open until `close()`. All calls must have ended by then.

    `service` has the methods of StreamerService; pass `metadata` to each. The lease of a load's slabs may
    outlive the session: `close(keep_lease=True)` leaves `handoff` to the owner of the mapping.
    """

    def __init__(self, socket_dir: Path) -> None:
        """Raises DaemonUnavailableError if no daemon answers, ForkedProcessError in a child of a process that
        has had a session, PenstockError if too many files are open."""
        _check_process()
        descriptors.require()
        target = grpc_target(socket_path(socket_dir, "penstock.sock"))
        self.where = str(socket_dir)
        self.handoff = Handoff.connect(socket_dir)
        self.service: Any
        self._channel: grpc.Channel | None
        try:
            self._channel = channel = grpc.insecure_channel(target, options=_OPTIONS)
            self.service = streamer_pb2_grpc.StreamerServiceStub(channel)
        except BaseException:
            self.handoff.close()
            raise
        self.metadata = (("penstock-session", self.handoff.token),)

    @property
    def versions(self) -> str:
        """Both versions, for errors about messages that one side does not understand."""
        return f"daemon {self.handoff.daemon_version or 'unknown'}, client {client_version()}"

    def error(self, error: grpc.RpcError, *, load_id: str = "", begun: bool = False) -> errors.PenstockError:
        """The exception for a call that failed. `begun` says that the daemon had begun to answer it."""
        return errors.from_rpc(
            error,
            where=self.where,
            versions=self.versions,
            load_id=load_id,
            begun=begun,
            runs=self.handoff.daemon_runs,
        )

    def close(self, *, keep_lease: bool = False) -> None:
        """May be called again."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
            self.service = None  # so that gRPC's finalizers run here
        if not keep_lease:
            self.handoff.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _check_process() -> None:
    global _grpc_pid
    _grpc_pid = _grpc_pid or os.getpid()
    if _grpc_pid != os.getpid():
        raise errors.forked("the connection to the daemon", _grpc_pid)
