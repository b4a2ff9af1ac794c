"""The error for a file that cannot be parsed: says what the file is, if its bytes show it. Blocks."""

from __future__ import annotations

from ...errors import CheckpointInvalidError, PenstockError
from ...sources import RetryingReader, SourceFile
from . import recognise
from .index import InvalidIndexError
from .rules import InvalidHeaderError


def refused_header(file: SourceFile, error: InvalidHeaderError, give_up_at: float) -> PenstockError:
    """The error for a file that cannot be parsed. Says what the file is, if its bytes show it."""
    try:
        first = _part(file, 0, give_up_at)
    except PenstockError as failed:
        return failed
    said = recognise.not_safetensors(first, file.size_bytes)
    if said is not None:
        return CheckpointInvalidError(f"{file.uri} {said}", file=file.uri)
    return CheckpointInvalidError(
        f"{file.uri}: {error}; fetch it again, or save it again with safetensors", file=file.uri
    )


def refused_index(file: SourceFile, error: InvalidIndexError, give_up_at: float) -> PenstockError:
    """The same for an index."""
    try:
        first = _part(file, 0, give_up_at)
        last = _part(file, max(0, file.size_bytes - recognise.FIRST_BYTES), give_up_at)
    except PenstockError as failed:
        return failed
    said = recognise.not_an_index(first, file.size_bytes, last)
    if said is not None:
        return CheckpointInvalidError(f"{file.uri} {said}", file=file.uri)
    return CheckpointInvalidError(
        f"{file.uri}: {error}; fetch it again, or delete it if the files beside it are all there is",
        file=file.uri,
    )


def _part(file: SourceFile, start: int, give_up_at: float) -> bytes:
    """A few bytes of a file from `start` on."""
    part = bytearray(min(recognise.FIRST_BYTES, file.size_bytes - start))
    if part:
        RetryingReader(file, give_up_at).read_into(start, [memoryview(part)])
    return bytes(part)
