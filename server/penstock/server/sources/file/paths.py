"""Parses paths and `file://` URIs, and decides which of them a uid may open."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections.abc import Sequence
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
_READ, _SEARCH = 4, 1
_LOOK = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC


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


def open_path(path: str, access: Access, flags: int) -> int:
    """Opens a path without waiting for FIFOs or devices. For callers that are not privileged it must be
    beneath an allowed prefix. The caller owns the descriptor."""
    if not flags & os.O_PATH:  # O_PATH never waits, and takes no other flags
        flags |= os.O_NONBLOCK | os.O_NOCTTY
    try:
        return open_raw(path, access, flags)
    except OSError as error:
        raise path_error(path, access, error) from error


def list_directory(path: str, access: Access) -> list[str] | None:
    """The names in a directory, sorted and held (`ListingCost.taken`); None if `path` is no directory."""
    fd = open_path(path, access, os.O_RDONLY)
    try:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            return None
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


def check_modes(fd: int, path: str, access: Access) -> None:
    """Raises AccessDeniedError if modes count (`Access.for_fetch`) and forbid the caller to read the open
    file or directory, or to go through the directories between it and the prefix that allows `path`. These
    are the directories where it really lies, by whatever links it was named."""
    if access.privileged or not access.for_fetch:
        return
    top = os.path.realpath(_allowing(path, access)).rstrip("/")
    real = _real_path(fd, path)
    if real != top and not real.startswith(top + "/"):
        raise path_error(path, access, OSError(errno.EXDEV, os.strerror(errno.EXDEV)))
    status = os.fstat(fd)
    if real != top:
        try:
            _check_above(top or "/", real[len(top) + 1 :].split("/"), status, access)
        except OSError as error:
            raise path_error(path, access, error) from error
    _check_mode(path, status, access, _READ | _SEARCH if stat.S_ISDIR(status.st_mode) else _READ)


def _check_above(top: str, names: Sequence[str], status: os.stat_result, access: Access) -> None:
    """Goes from `top` down to the file of that status, by descriptors, and checks each directory between
    them. By paths somebody could put another directory, which may be searched, in the place of one between
    two looks. Raises OSError where the file does not lie there any more, and AccessDeniedError."""
    held = os.open(top, _LOOK | os.O_DIRECTORY)
    try:
        for number, name in enumerate(names, 1):
            fd = os.open(name, _LOOK, dir_fd=held)
            os.close(held)
            held = fd
            found = os.fstat(held)
            if number < len(names):
                _check_mode("/".join((top, *names[:number])), found, access, _SEARCH)
            elif not os.path.samestat(found, status):
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
    finally:
        os.close(held)


def _real_path(fd: int, path: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # /proc is not mounted
        return os.path.realpath(path)


def _check_mode(path: str, status: os.stat_result, access: Access, needed: int) -> None:
    if status.st_uid == access.uid:
        granted = status.st_mode >> 6
    elif status.st_gid in access.gids:
        granted = status.st_mode >> 3
    else:
        granted = status.st_mode
    if granted & needed != needed:
        mode = stat.S_IMODE(status.st_mode)
        raise AccessDeniedError(
            f"uid {access.uid} may not read {path}: its mode {mode:04o} does not let it (the owner is "
            f"{status.st_uid}:{status.st_gid}), which counts for all but weights; change the mode, or leave "
            "it out",
            file=path,
        )


def open_raw(path: str, access: Access, flags: int) -> int:
    """Raises OSError and AccessDeniedError."""
    if access.privileged:
        return os.open(path, flags | os.O_CLOEXEC)
    return _open_allowed(path, access, flags | os.O_CLOEXEC)


def _open_allowed(path: str, access: Access, flags: int) -> int:
    top = _allowing(path, access)
    if path == top:
        return os.open(path, flags)
    inside = top if top == "/" else top + "/"
    root = os.open(top, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return linux.open_beneath(root, path[len(inside) :].lstrip("/") or ".", flags)
    finally:
        os.close(root)


def _allowing(path: str, access: Access) -> str:
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
