"""The daemon's errors as code of the safetensors library expects them.

Errors about a file are also of the classes that the library raises. After a refusal the library may still be
able to read the file.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from .. import errors
from ..system import missing

missing.need("safetensors")

from safetensors import SafetensorError  # noqa: E402

REFUSALS = (
    errors.AccessDeniedError,
    errors.CheckpointNotFoundError,
    errors.DaemonUnavailableError,
    errors.ForkedProcessError,
    errors.InvalidRequestError,
    errors.MemoryLimitTooSmallError,
    errors.SessionRequiredError,
    errors.StagingExhaustedError,
    errors.TooManyLoadsError,
)
"""Errors after which the library may still be able to read the file."""


class DamagedFileError(errors.CheckpointInvalidError, SafetensorError):
    """The file is no valid safetensors file."""


class UnreadableTensorError(errors.UnsupportedDtypeError, SafetensorError):
    """The tensor has a dtype that the installed torch does not know."""


class MissingFileError(errors.CheckpointNotFoundError, FileNotFoundError):
    """There is no such file where the daemon runs."""


_AS_LIBRARY: dict[type[errors.PenstockError], type[errors.PenstockError]] = {
    errors.CheckpointInvalidError: DamagedFileError,
    errors.UnsupportedDtypeError: UnreadableTensorError,
    errors.CheckpointNotFoundError: MissingFileError,
}


@contextlib.contextmanager
def as_library() -> Iterator[None]:
    """Raises errors about a file in the library's classes."""
    try:
        yield
    except errors.PenstockError as error:
        kind = _AS_LIBRARY.get(type(error))
        if kind is None:
            raise
        message = str(Exception.__str__(error))
        raise kind(message, reason=error.reason, load_id=error.load_id, details=error.details) from error
