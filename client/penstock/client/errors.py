"""Every way a load can fail, as one tree, and how an answer of the daemon becomes one of them.

    PenstockError
      DaemonUnavailableError          no daemon answers, or it went away
        ShuttingDownError             SHUTTING_DOWN
      CheckpointNotFoundError         CHECKPOINT_NOT_FOUND
      CheckpointInvalidError          CHECKPOINT_INVALID
      CheckpointChangedError          CHECKPOINT_CHANGED
      CheckpointCorruptError          CHECKPOINT_CORRUPT
      TensorNotFoundError             TENSOR_NOT_FOUND
      AccessDeniedError               ACCESS_DENIED
      MemoryLimitTooSmallError        MEMORY_LIMIT_TOO_SMALL
      StagingExhaustedError           STAGING_EXHAUSTED
      SourceUnavailableError          SOURCE_UNAVAILABLE
      SessionRequiredError            SESSION_REQUIRED
      TooManyLoadsError               TOO_MANY_LOADS
      InvalidRequestError             INVALID_REQUEST
      ProtocolError                   the daemon broke the wire contract
      UnsupportedDtypeError           a dtype that the installed torch does not know
      DuplicateTensorError            load_state_dict() of a checkpoint with a name twice
      LoadClosedError                 a Load was used after its end
      ForkedProcessError              a process uses a load or client of the one that forked it

`by_reason` is the only place that knows the reasons, `from_rpc` and `from_status` the only ones that read
what the daemon sends of an error.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import grpc

ERROR_DOMAIN = "penstock"
_DETAILS_KEY = "grpc-status-details-bin"


class CheckpointWarning(UserWarning):
    """A checkpoint was loaded, but its files look wrong: for example, its index is stale."""


class FallbackWarning(UserWarning):
    """A patched library reads files by itself, as the daemon does not serve them to this process."""


class PenstockError(Exception):
    """Base of everything that penstock.client raises about a daemon or a checkpoint.

    `reason` is the ErrorInfo reason that the daemon gave, `details` its metadata (file, tensor, bytes,
    ...), `load_id` the load as the daemon's log names it, which is shown after the message; empty where
    unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        load_id: str = "",
        details: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.details = dict(details or {})
        self.load_id = load_id or self.details.get("load_id", "")

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} (load {self.load_id})" if self.load_id else message


class DaemonUnavailableError(PenstockError):
    """No daemon answers on the socket directory, or it went away in mid-load and did not come back.

    `begun` says that it went away after it had begun to serve the request. `crowded` says that it is there,
    but did not take the connection.
    """

    begun = False
    crowded = False


class ShuttingDownError(DaemonUnavailableError):
    """The daemon drains and takes no new loads."""


class CheckpointNotFoundError(PenstockError):
    """No such file, directory or object, or nothing in it to load."""


class CheckpointInvalidError(PenstockError):
    """The files are not a valid checkpoint; the message names the file, the tensor and what is wrong."""


class CheckpointChangedError(PenstockError):
    """A file changed while it was read, or is not the version that an interrupted load began with."""


class CheckpointCorruptError(PenstockError):
    """The bytes of a file do not match its checksum. Drop the tensors that the load has yielded.

    `details` has `file`, `algorithm`, and both values as `expected` and `found`.
    """


class TensorNotFoundError(PenstockError):
    """A name in `tensors` is in no file."""


class AccessDeniedError(PenstockError):
    """This user may not load this path, or may not do this."""


class MemoryLimitTooSmallError(PenstockError):
    """The largest tensor does not fit into the memory that the load may take of the staging buffer."""


class StagingExhaustedError(PenstockError):
    """The load waited for memory until the daemon's queue timeout."""


class SourceUnavailableError(PenstockError):
    """Storage failed, and went on failing when the daemon tried again."""


class SessionRequiredError(PenstockError):
    """The daemon does not know the session: it was restarted between two steps of a load."""


class TooManyLoadsError(PenstockError):
    """The daemon's bound on loads or connections is reached."""


class InvalidRequestError(PenstockError):
    """The daemon cannot make sense of the request."""


class ProtocolError(PenstockError):
    """The daemon sent something that the wire contract forbids; nothing of it was used."""


class UnsupportedDtypeError(PenstockError):
    """A tensor has a dtype that the installed torch does not know. The file may be valid."""


class DuplicateTensorError(PenstockError):
    """Two files of one checkpoint hold a tensor of the same name, and a dict can hold only one."""


class LoadClosedError(PenstockError):
    """A Load was iterated a second time, or after close()."""


class ForkedProcessError(PenstockError):
    """A forked process used a load of its parent, or called the daemon after its parent had.

    gRPC does not survive a fork, and a load that two processes continue would hang or break.
    """


_BY_REASON: dict[str, type[PenstockError]] = {
    "CHECKPOINT_NOT_FOUND": CheckpointNotFoundError,
    "CHECKPOINT_INVALID": CheckpointInvalidError,
    "CHECKPOINT_CHANGED": CheckpointChangedError,
    "CHECKPOINT_CORRUPT": CheckpointCorruptError,
    "TENSOR_NOT_FOUND": TensorNotFoundError,
    "ACCESS_DENIED": AccessDeniedError,
    "MEMORY_LIMIT_TOO_SMALL": MemoryLimitTooSmallError,
    "STAGING_EXHAUSTED": StagingExhaustedError,
    "SOURCE_UNAVAILABLE": SourceUnavailableError,
    "SESSION_REQUIRED": SessionRequiredError,
    "TOO_MANY_LOADS": TooManyLoadsError,
    "SHUTTING_DOWN": ShuttingDownError,
    "INVALID_REQUEST": InvalidRequestError,
}


def by_reason(
    reason: str, message: str, *, details: Mapping[str, str] | None = None, load_id: str = ""
) -> PenstockError:
    """The exception for an ErrorInfo reason; the base class, with the reason kept, for an unknown one."""
    error = _BY_REASON.get(reason, PenstockError)
    return error(message or reason, reason=reason, details=details, load_id=load_id)


def from_status(packed: bytes) -> PenstockError:
    """The exception for a serialized google.rpc.Status."""
    reason, message, details = _parsed_status(packed)
    if not reason:
        return broken("a failure without a reason was sent on handoff.sock")
    return by_reason(reason, message, details=details)


def from_rpc(
    error: grpc.RpcError,
    *,
    where: str,
    versions: str = "",
    load_id: str = "",
    begun: bool = False,
    runs: bool = False,
) -> PenstockError:
    """The exception for a failed call to the daemon in directory `where`.

    `begun` says that the daemon had begun to answer, `runs` that it still runs. `versions` names the versions
    of both sides, for a call that the daemon does not know. UNAVAILABLE without a reason is gRPC's own status
    for a broken connection. So only this one, and SHUTTING_DOWN, become a DaemonUnavailableError.
    SOURCE_UNAVAILABLE has the same status but does not.
    """
    import grpc

    if not isinstance(error, grpc.Call):
        return PenstockError(
            f"the call to the daemon in {where} failed ({error}); see its log, and try again", load_id=load_id
        )
    status, message = error.code(), error.details() or ""
    reason, details = _error_info(error)
    if reason:
        answer = by_reason(reason, message, details=details, load_id=load_id)
    elif status is grpc.StatusCode.UNAVAILABLE and runs and not begun:
        answer = DaemonUnavailableError(
            f"the daemon in {where} runs, but does not take this connection: this user has too many, or too "
            f"many others wait to be accepted ({message}); close clients that are not in use, and try again",
            load_id=load_id,
        )
        answer.crowded = True
    elif status is grpc.StatusCode.UNAVAILABLE:
        answer = DaemonUnavailableError(
            f"the daemon in {where} went away ({message}); see its log, and load again when it is back",
            load_id=load_id,
        )
    elif status is grpc.StatusCode.DEADLINE_EXCEEDED:
        answer = DaemonUnavailableError(
            f"the daemon in {where} does not answer ({message}): it hangs, or the machine does; see "
            "`penstock health --live` and its log for which",
            load_id=load_id,
        )
    elif status is grpc.StatusCode.UNIMPLEMENTED:
        answer = ProtocolError(
            f"the daemon in {where} does not know this call ({versions or 'versions unknown'}); upgrade the "
            f"older of the two. It said: {message}",
            load_id=load_id,
        )
    else:
        name = status.name if status is not None else "UNKNOWN"
        answer = PenstockError(
            f"the daemon in {where} answered {name}; see its log. It said: {message}", load_id=load_id
        )
    if isinstance(answer, DaemonUnavailableError):
        answer.begun = begun
    return answer


def broken(what: str, *, load_id: str = "") -> ProtocolError:
    """The error for `what` the daemon sent against the protocol."""
    return ProtocolError(
        f"{what}: the daemon does not keep to the protocol; upgrade the older of daemon and client, or "
        "restart the daemon",
        load_id=load_id,
    )


def closed(load_id: str = "") -> LoadClosedError:
    """The error for a load that was closed while it was in use."""
    return LoadClosedError(
        "the load was closed, perhaps by another thread; open another one", load_id=load_id
    )


def forked(what: str, owner_pid: int, *, load_id: str = "") -> ForkedProcessError:
    """The error if `what`, which belongs to the process `owner_pid`, is used in a child of it."""
    return ForkedProcessError(
        f"{what} belongs to process {owner_pid}, and this process, {os.getpid()}, is a fork of it, where "
        "gRPC would hang: start processes that load by `spawn` or `forkserver`, or load in children alone",
        load_id=load_id,
    )


def unreachable(where: str, cause: object) -> DaemonUnavailableError:
    """The error if no daemon answers: where the client looked, why there is none, and what to do."""
    if isinstance(cause, FileNotFoundError) and not os.path.isdir(where):
        why = (
            "there is no such directory here. In a container, mount the one that the daemon has as its "
            "--socket-dir; the path may differ"
        )
    elif isinstance(cause, FileNotFoundError) and os.path.exists(os.path.join(where, "penstockd.lock")):
        why = "the daemon that ran there has stopped"
    elif isinstance(cause, FileNotFoundError):
        why = "the directory is there, but no daemon has started in it, or it is not the daemon's"
    elif isinstance(cause, ConnectionRefusedError):
        why = "its sockets are there, but the daemon that made them has ended"
    elif isinstance(cause, PermissionError):
        why = "this user may not enter the directory or use the socket in it"
    else:
        why = str(cause.strerror if isinstance(cause, OSError) and cause.strerror else cause)
    return DaemonUnavailableError(
        f"no penstock daemon answers in {where}: {why}. Start one with `penstockd --socket-dir {where}`, "
        "point PENSTOCK_SOCKET_DIR at a running one, or use StreamerClient.embedded()"
    )


def _error_info(call: grpc.Call) -> tuple[str, dict[str, str]]:
    for key, value in call.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            reason, _, details = _parsed_status(value)
            if reason:
                return reason, details
    return "", {}


def _parsed_status(packed: bytes) -> tuple[str, str, dict[str, str]]:
    """Reason, message and details of a serialized google.rpc.Status. The reason is empty if the daemon sent
    none that can be read."""
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    try:
        status = status_pb2.Status.FromString(packed)
    except DecodeError:
        return "", "", {}
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == ERROR_DOMAIN:
            return info.reason, status.message, dict(info.metadata)
    return "", "", {}
