"""`penstock health`: one grpc.health.v1 check over the Unix socket, for probes that run a command.

A probe runs every few seconds, so this is cheap: no torch, no protobuf, no session. The two messages of that
service are so small that they are bytes here.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import grpc

from .. import errors
from ..system.unix import connect, grpc_target, hung_up

_METHOD = "/grpc.health.v1.Health/Check"
# HealthCheckRequest without a service, which asks whether the daemon is ready, and with the service "live".
_READY, _LIVE = b"", b"\x0a\x04live"
# HealthCheckResponse with the status SERVING.
_SERVING = b"\x08\x01"
# The key of the trailing metadata that has the reason. Older daemons send none.
_REASON_KEY = "penstock-reason"
_OPTIONS = (
    ("grpc.enable_http_proxy", 0),
    ("grpc.enable_retries", 0),
    # Shared connections would share the back-off of the one before.
    ("grpc.use_local_subchannel_pool", 1),
)
_PAUSE_SECONDS = 0.05


def check(socket_dir: Path, *, live: bool, timeout_seconds: float) -> None:
    """Raises DaemonUnavailableError unless the daemon is ready, or with `live` unless it does not hang."""
    path = os.fspath(socket_dir / "penstock.sock")
    deadline = time.monotonic() + timeout_seconds
    try:
        connection = connect(path, socket.SOCK_STREAM, timeout_seconds)
    except OSError as error:
        raise errors.unreachable(str(socket_dir), error) from error
    with connection:
        while True:
            try:
                answer, done = _ask(path, _LIVE if live else _READY, deadline - time.monotonic())
                break
            except grpc.RpcError as error:
                unavailable = isinstance(error, grpc.Call) and error.code() is grpc.StatusCode.UNAVAILABLE
                if unavailable and not hung_up(connection) and time.monotonic() + _PAUSE_SECONDS < deadline:
                    time.sleep(_PAUSE_SECONDS)  # gRPC does not wait until the connection is accepted
                    continue
                cause = error.details() if isinstance(error, grpc.Call) else error
                raise errors.DaemonUnavailableError(
                    f"the daemon in {socket_dir} does not answer ({cause}); see its log, or restart it"
                ) from error
    if answer != _SERVING:
        told = [value for key, value in done.trailing_metadata() or () if key == _REASON_KEY]
        reason = told[0] if told and isinstance(told[0], str) else "it does not say why"
        raise errors.DaemonUnavailableError(
            f"the daemon in {socket_dir} {'hangs' if live else 'is not ready'}: {reason}; see "
            "`penstock status` and its log"
        )


def _ask(path: str, request: bytes, timeout_seconds: float) -> tuple[bytes, Any]:
    """The answer, and the call that got it. Raises grpc.RpcError."""
    with grpc.insecure_channel(grpc_target(path), options=_OPTIONS) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_METHOD)
        return call.with_call(request, timeout=timeout_seconds)
