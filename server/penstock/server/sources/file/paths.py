"""Parses paths and `file://` URIs, and decides which of them a uid may open."""

from __future__ import annotations

import errno
import os
import resource
import stat
from urllib.parse import unquote, urlsplit

from ...errors import (
    AccessDeniedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    InvalidRequestError,
    PenstockError,
    SourceUnavailableError,
    TooManyLoadsError,
)
from ...system import linux
from .. import Access

NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
TOO_MANY = (errno.EMFILE, errno.ENFILE)
_CACHE_HINT = (
    "the Hugging Face cache keeps files in `blobs` and links to them from `snapshots`: mount or "
    "allow the whole cache"
)
_SHOWN_CHARACTERS = 200
_FOR_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def local_path(source: str) -> str:
    """The path in a path or a `file://` URI. Raises InvalidRequestError."""
    path = source
    if not source.startswith("/"):
        path = _uri_path(source)
    if "\0" in path:
        raise InvalidRequestError(f"sources: {source[:200]!r} holds a NUL character; remove it")
    return path


def _uri_path(source: str) -> str:
    try:
        parts = urlsplit(source)
    except ValueError:
        raise InvalidRequestError(
            f"sources: {source[:200]!r} is neither a path nor a URI; write one"
        ) from None
    if parts.scheme == "file":
        local = parts.netloc in ("", "localhost") and parts.path.startswith("/")
        if not local or parts.query or parts.fragment:
            raise InvalidRequestError(
                f"sources: {source[:200]!r} is not of the form file:///path; write it so"
            )
        return unquote(parts.path)
    raise InvalidRequestError(
        f"sources: {source[:200]!r} is a relative path, which means nothing to penstockd; make it absolute"
    )


def open_place(path: str, access: Access) -> int:
    """An O_PATH descriptor of whatever lies there, which is not opened itself. For callers that are not
    privileged it must be beneath an allowed prefix, as for all functions here. The caller owns the
    descriptor."""
    try:
        return open_raw(path, access, os.O_PATH)
    except OSError as error:
        raise path_error(path, access, error) from error


def open_regular(path: str, access: Access) -> int:
    """Opens a regular file for reading. The caller owns the descriptor.

    Nothing else is opened, not even for a moment, since that may have an effect: a process that waits to
    write to a FIFO goes on, a tape is wound back. A file on which another process has a lease is refused:
    it would be waited for.
    """
    place = open_place(path, access)
    try:
        if not stat.S_ISREG(os.fstat(place).st_mode):
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        try:
            return os.open(f"/proc/self/fd/{place}", _FOR_READING)
        except FileNotFoundError:  # /proc is not mounted
            return open_raw(path, access, _FOR_READING)
    except OSError as error:
        raise path_error(path, access, error) from error
    finally:
        os.close(place)


def open_directory(path: str, access: Access) -> int | None:
    """Opens a directory for listing. None if something else lies there. The caller owns the descriptor."""
    try:
        return open_raw(path, access, os.O_RDONLY | os.O_DIRECTORY)
    except NotADirectoryError:
        os.close(open_place(path, access))  # raises if nothing lies there
        return None
    except OSError as error:
        raise path_error(path, access, error) from error


def list_directory(path: str, access: Access) -> list[str] | None:
    """The names in a directory, sorted and held (`ListingCost.taken`); None if `path` is no directory."""
    fd = open_directory(path, access)
    if fd is None:
        return None
    try:
        with os.scandir(fd) as entries:
            return sorted(access.listing.taken(path, (entry.name for entry in entries)))
    except OSError as error:
        raise listing_error(path, error) from error
    finally:
        os.close(fd)


def listing_error(path: str, error: OSError) -> PenstockError:
    if error.errno in TOO_MANY:
        return _too_many_files(path, error)
    return SourceUnavailableError(
        f"{path} cannot be listed: {error.strerror}; check the file system", file=path
    )


def open_raw(path: str, access: Access, flags: int) -> int:
    """Raises OSError and AccessDeniedError."""
    if access.privileged:
        return os.open(path, flags | os.O_CLOEXEC)
    return _open_allowed(path, access, flags | os.O_CLOEXEC)


def _open_allowed(path: str, access: Access, flags: int) -> int:
    top = allowing(path, access)
    if path == top:
        return os.open(path, flags)
    inside = top if top == "/" else top + "/"
    root = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return linux.open_beneath(root, path[len(inside) :].lstrip("/") or ".", flags)
    finally:
        os.close(root)


def allowing(path: str, access: Access) -> str:
    """The prefix that allows a path; if there are several, the longest. Raises AccessDeniedError."""
    for prefix in sorted(access.prefixes, key=len, reverse=True):
        top = prefix.rstrip("/") or "/"
        if path == top or path.startswith(top if top == "/" else top + "/"):
            return top
    raise AccessDeniedError(
        f"uid {access.uid} may not load {path}: penstockd has no --allow prefix that holds it; start it "
        "with one",
        file=path,
    )


def path_error(path: str, access: Access, error: OSError) -> PenstockError:
    if error.errno in NOT_THERE:
        return _not_there(path, access)
    if error.errno == errno.EXDEV:
        hint = f"; {_CACHE_HINT}" if "/snapshots/" in path else ""
        return AccessDeniedError(
            f"{path} leaves the allowed directory by a link or '..'; an absolute link counts as leaving, "
            f"wherever it points: make it relative{hint}",
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
        return CheckpointInvalidError(f"{path} is not a regular file; name one", file=path)
    if error.errno == errno.EAGAIN:
        return SourceUnavailableError(
            f"{path} cannot be opened: a process has a lease on it (F_SETLEASE), or renames directories all "
            "the time; end that process, or try again later",
            file=path,
        )
    if error.errno == errno.ENAMETOOLONG:
        return CheckpointNotFoundError(f"{path[:200]}… is too long for a path; name a shorter one", file=path)
    if error.errno in TOO_MANY:
        return _too_many_files(path, error)
    return SourceUnavailableError(
        f"{path} cannot be opened: {error.strerror}; check the file system", file=path
    )


def _not_there(path: str, access: Access) -> CheckpointNotFoundError:
    found = _dangling(path, access)
    if found is None:
        return CheckpointNotFoundError(
            f"{path} does not exist where penstockd runs; check the path, and that it is mounted there",
            file=path,
        )
    link, target = found
    missing = f"is a link to {target}, which does not exist"
    of = "" if link == path else f" does not exist: {link}"
    cached = "/snapshots/" in link or "blobs/" in target
    remedy = _CACHE_HINT if cached else "mount or fetch what it links to"
    error = CheckpointNotFoundError(f"{path}{of} {missing} where penstockd runs; {remedy}", file=path)
    if link == path:
        error.missing = missing
    return error


def _dangling(path: str, access: Access) -> tuple[str, str] | None:
    """The first link on the way to `path` whose target does not exist, and that target. Callers who are not
    privileged learn nothing about files above an allowed prefix, or behind a link that leaves it."""
    ends = [at for at, character in enumerate(path) if character == "/" and at] + [len(path)]
    for link in (path[:end] for end in ends):
        try:
            fd = open_raw(link, access, os.O_PATH | os.O_NOFOLLOW)
        except AccessDeniedError:
            continue
        except OSError:
            break
        try:
            target = os.readlink("", dir_fd=fd) if stat.S_ISLNK(os.fstat(fd).st_mode) else None
        except OSError:  # it was replaced meanwhile
            break
        finally:
            os.close(fd)
        if target is not None and _leads_nowhere(link, access):
            return link, os.fsencode(target[:_SHOWN_CHARACTERS]).decode(errors="replace")
    return None


def _leads_nowhere(link: str, access: Access) -> bool:
    try:
        os.close(open_raw(link, access, os.O_PATH))
    except OSError as error:
        return error.errno in NOT_THERE
    return False


def _too_many_files(path: str, error: OSError) -> TooManyLoadsError:
    if error.errno == errno.ENFILE:
        return TooManyLoadsError(
            f"{path} cannot be opened: the machine has as many files open as it allows; raise the sysctl "
            "fs.file-max",
            file=path,
        )
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return TooManyLoadsError(
        f"{path} cannot be opened: penstockd has as many files open as it may ({limit}), and needs two for "
        "each file of a load; raise the limit where it starts (ulimit -n, LimitNOFILE=), or load fewer files "
        "at a time",
        file=path,
    )
