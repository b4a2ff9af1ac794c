"""Paths and `file://` URIs: what they name, and who may open it."""

from __future__ import annotations

import errno
import os
import stat
from urllib.parse import unquote, urlsplit

from .. import linux
from ..errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    InvalidRequestError,
    PenstockError,
    SourceUnavailableError,
)
from . import Access


def local_path(source: str) -> str:
    """The path that a path or a `file://` URI names. Raises InvalidRequestError."""
    path = source
    if not source.startswith("/"):
        path = _uri_path(source)
    if "\0" in path:
        raise InvalidRequestError(f"sources: {source[:200]!r} holds a NUL character")
    return path


def _uri_path(source: str) -> str:
    try:
        parts = urlsplit(source)
    except ValueError:
        raise InvalidRequestError(f"sources: {source[:200]!r} is neither a path nor a URI") from None
    if parts.scheme == "file":
        local = parts.netloc in ("", "localhost") and parts.path.startswith("/")
        if not local or parts.query or parts.fragment:
            raise InvalidRequestError(f"sources: {source[:200]!r} is not of the form file:///path")
        return unquote(parts.path)
    if parts.scheme == "s3":  # or it would not have come here
        raise InvalidRequestError(f"sources: {source[:200]!r}: write s3:// in lower case")
    if parts.scheme and "://" in source:
        raise InvalidRequestError(
            f"sources: {source[:200]!r}: this penstockd knows no {parts.scheme[:20]}:// sources"
        )
    raise InvalidRequestError(
        f"sources: {source[:200]!r} is a relative path, which means nothing to penstockd; make it absolute"
    )


def open_path(path: str, access: Access, flags: int) -> int:
    """Opens without waiting on FIFOs or devices, and for callers that are not privileged only beneath an
    allowed prefix. The caller owns the descriptor."""
    flags |= os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        if access.privileged:
            return os.open(path, flags)
        return _open_allowed(path, access, flags)
    except OSError as error:
        raise _path_error(path, error) from error


def list_directory(path: str, access: Access) -> list[str] | None:
    """Names in a directory, sorted; None if `path` is something else."""
    fd = open_path(path, access, os.O_RDONLY)
    try:
        return sorted(os.listdir(fd)) if stat.S_ISDIR(os.fstat(fd).st_mode) else None
    except OSError as error:
        raise SourceUnavailableError(f"{path} cannot be listed: {error.strerror}", file=path) from error
    finally:
        os.close(fd)


def _open_allowed(path: str, access: Access, flags: int) -> int:
    for prefix in sorted(access.prefixes, key=len, reverse=True):  # the most particular one decides
        top = prefix.rstrip("/") or "/"
        if path == top:
            return os.open(path, flags)
        inside = top if top == "/" else top + "/"
        if path.startswith(inside):
            root = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                return linux.open_beneath(root, path[len(inside) :].lstrip("/") or ".", flags)
            finally:
                os.close(root)
    raise AccessDeniedError(
        f"uid {access.uid} may not load {path}: penstockd has no --allow prefix that holds it",
        file=path,
    )


def _path_error(path: str, error: OSError) -> PenstockError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return CheckpointNotFoundError(f"{path} does not exist where penstockd runs", file=path)
    if error.errno == errno.EXDEV:
        return AccessDeniedError(
            f"{path} leaves the allowed directory by a link or '..'; an absolute link counts as leaving, "
            "wherever it points: make it relative",
            file=path,
        )
    if error.errno == errno.ELOOP:
        return AccessDeniedError(
            f"{path} follows too many links, or one of /proc that leads to no path; name the file itself",
            file=path,
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return AccessDeniedError(
            f"{path}: penstockd (uid {os.geteuid()}) may not read it; check its permissions", file=path
        )
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return CheckpointInvalidError(f"{path} is not a regular file", file=path)
    if error.errno == errno.ENAMETOOLONG:
        return CheckpointNotFoundError(f"{path[:200]}… is too long for a path", file=path)
    return SourceUnavailableError(f"{path} cannot be opened: {error.strerror}", file=path)
