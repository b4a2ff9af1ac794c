"""Every way a request can fail, as one tree.

Each error knows the gRPC status and the reason that clients see, and whether the same request can
succeed later. Only `edge/statuses.py` turns them into gRPC answers.
"""

from __future__ import annotations

from typing import ClassVar


class PenstockError(Exception):
    """Base of all errors that a client receives.

    `details` are short strings for `google.rpc.ErrorInfo.metadata`.
    """

    reason: ClassVar[str] = "INTERNAL"
    status: ClassVar[str] = "INTERNAL"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, **details: str | int) -> None:
        super().__init__(message)
        self.message = message
        self.details = {key: str(value)[:200] for key, value in details.items()}


class InvalidRequestError(PenstockError):
    """The request itself makes no sense; names the field."""

    reason = "INVALID_REQUEST"
    status = "INVALID_ARGUMENT"


class CheckpointNotFoundError(PenstockError):
    """No such file, directory or object, or nothing in it to load. `missing` says so in words that follow a
    name."""

    missing = "does not exist"
    reason = "CHECKPOINT_NOT_FOUND"
    status = "NOT_FOUND"


class CheckpointInvalidError(PenstockError):
    """The files are not a valid checkpoint; names the file, the tensor and what is wrong."""

    reason = "CHECKPOINT_INVALID"
    status = "FAILED_PRECONDITION"


class CheckpointChangedError(PenstockError):
    """A file changed while it was read, or is not the version that a resumed load began with."""

    reason = "CHECKPOINT_CHANGED"
    status = "ABORTED"
    retryable = True


class CheckpointCorruptError(PenstockError):
    """The bytes of a file are not those that its checksum is of. `uri` and `version` are the file's, as
    sources say them, and `kept_version` as the tier does. `given`: the checksum is a user's, who may be
    wrong."""

    reason = "CHECKPOINT_CORRUPT"
    status = "DATA_LOSS"
    uri = ""
    version = ""
    kept_version = ""
    given = False


class TensorNotFoundError(PenstockError):
    """A selected name is in no file."""

    reason = "TENSOR_NOT_FOUND"
    status = "NOT_FOUND"


class AccessDeniedError(PenstockError):
    """The caller may not do this, or not with this path."""

    reason = "ACCESS_DENIED"
    status = "PERMISSION_DENIED"


class MemoryLimitTooSmallError(PenstockError):
    """The largest tensor does not fit into the memory that the load may take."""

    reason = "MEMORY_LIMIT_TOO_SMALL"
    status = "FAILED_PRECONDITION"


class StagingExhaustedError(PenstockError):
    """The load waited for memory until the queue timeout."""

    reason = "STAGING_EXHAUSTED"
    status = "RESOURCE_EXHAUSTED"
    retryable = True


class SourceUnavailableError(PenstockError):
    """Storage failed, and went on failing."""

    reason = "SOURCE_UNAVAILABLE"
    status = "UNAVAILABLE"
    retryable = True


class SessionRequiredError(PenstockError):
    """The call carries no token of an open handoff connection, or one that is used up."""

    reason = "SESSION_REQUIRED"
    status = "UNAUTHENTICATED"


class TooManyLoadsError(PenstockError):
    """A bound on loads or connections is reached."""

    reason = "TOO_MANY_LOADS"
    status = "RESOURCE_EXHAUSTED"
    retryable = True


class ShuttingDownError(PenstockError):
    """The daemon drains and takes no new loads."""

    reason = "SHUTTING_DOWN"
    status = "UNAVAILABLE"
    retryable = True


def reasons() -> tuple[str, ...]:
    """Every reason that a client can receive, INTERNAL included."""
    return (PenstockError.reason, *(error.reason for error in PenstockError.__subclasses__()))


class ConfigError(Exception):
    """A flag, a variable or the machine does not allow the daemon to start as asked."""
