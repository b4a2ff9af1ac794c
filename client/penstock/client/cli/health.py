"""`penstock health`: one grpc.health.v1 check over the Unix socket, for probes that run a command.

A probe runs every few seconds, so this is cheap: no torch, no protobuf, no session. The two messages of that
service are so small that they are bytes here.
"""

from __future__ import annotations

import os
import socket
import urllib.parse
from pathlib import Path

import grpc

from .. import errors

_METHOD = "/grpc.health.v1.Health/Check"
# HealthCheckRequest without a service, which asks whether the daemon is ready, and with the service "live".
_READY, _LIVE = b"", b"\x0a\x04live"
# HealthCheckResponse with the status SERVING.
_SERVING = b"\x08\x01"
# The key of the trailing metadata that has the reason. Older daemons send none.
_REASON_KEY = "penstock-reason"
_OPTIONS = (("grpc.enable_http_proxy", 0), ("grpc.enable_retries", 0))


def check(socket_dir: Path, *, live: bool, timeout_seconds: float) -> None:
    """Raises DaemonUnavailableError unless the daemon is ready, or with `live` unless it does not hang."""
    path = os.fspath(socket_dir / "penstock.sock")
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(timeout_seconds)
            connection.connect(path)
    except OSError as error:
        raise errors.unreachable(str(socket_dir), error) from error
    with grpc.insecure_channel("unix:" + urllib.parse.quote(os.fsencode(path)), options=_OPTIONS) as channel:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_METHOD)
        try:
            answer, done = call.with_call(_LIVE if live else _READY, timeout=timeout_seconds)
        except grpc.RpcError as error:
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
