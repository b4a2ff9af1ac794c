"""Files on a disk or any mounted file system.

How a block is read: first `RWF_NOWAIT`, which copies what is in the page cache and never waits (buffered
where the file system has none and all is there); the rest by `O_DIRECT` into the slab, which costs a tenth
of the CPU and leaves the page cache alone; buffered where the file system refuses direct reads.
"""

from __future__ import annotations

import errno
import math
import os
import resource
import stat
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from urllib.parse import unquote, urlsplit

from .. import linux
from ..errors import (
    AccessDeniedError,
    CheckpointChangedError,
    CheckpointInvalidError,
    CheckpointNotFoundError,
    InvalidRequestError,
    PenstockError,
    SourceUnavailableError,
    TooManyLoadsError,
)
from . import Access, too_slow, without

_NOT_CACHED = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR)
_TOO_MANY = (errno.EMFILE, errno.ENFILE)
_REFUSES_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)
_CACHE_HINT = (
    "the Hugging Face cache keeps files in `blobs` and links to them from `snapshots`: mount or "
    "allow the whole cache"
)
_SHOWN_CHARACTERS = 200


class FileSource:
    """Paths and `file://` URIs. `workers` gives, for a path and a uid, what opens the file and reads its
    header."""

    kind = "file"
    descriptors_per_file = 2  # one of them for direct I/O

    def __init__(self, workers: Callable[[str, int], Executor], *, patience_seconds: float = 60.0) -> None:
        self._workers = workers
        self.patience_seconds = patience_seconds

    def workers(self, location: str, uid: int) -> Executor:
        return self._workers(location, uid)

    def location(self, source: str) -> str:
        return local_path(source)

    def name(self, location: str) -> str:
        return os.path.basename(location)

    def list(self, location: str, access: Access) -> list[str] | None:
        return list_directory(location, access)

    def dangles(self, location: str, access: Access) -> bool:
        try:
            os.close(_open(location, access, os.O_PATH))
        except OSError as error:
            return error.errno in _NOT_THERE
        except AccessDeniedError:
            return False
        return False

    def open(self, location: str, access: Access) -> LocalFile:
        return open_file(location, access)


class LocalFile:
    """One open regular file. Owns its descriptors until `close`."""

    kind = "file"
    alignment = linux.PAGE_BYTES

    def __init__(self, path: str, fd: int) -> None:
        """Takes `fd` over, also when it raises."""
        self.uri = path
        self.give_up_at = math.inf
        self._fd = fd
        self._direct_fd: int | None = None
        try:
            status = self._status()
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointInvalidError(f"{path} is not a regular file; name one", file=path)
            self.size_bytes = status.st_size
            self._mtime_ns = status.st_mtime_ns
            # ctime tells apart a file that was written and then given its old mtime back.
            self.version = (
                f"file:{status.st_dev:x}:{status.st_ino}:{status.st_size}"
                f":{status.st_mtime_ns}:{status.st_ctime_ns}"
            )
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # what misses the cache is read directly
            self._direct_fd = _open_direct(fd)
            self._has_nowait = _has_nowait(fd, self.size_bytes)
            # Of files of others mincore says that all is cached.
            self._has_mincore = os.geteuid() in (0, status.st_uid)
        except BaseException:
            self.close()
            raise

    def read_into(self, offset: int, views: Sequence[memoryview]) -> None:
        end = min(offset + sum(map(len, views)), self.size_bytes)
        try:
            position = self._read_cached(offset, end, views)
            if position < end:
                position = self._read_direct(offset, position, end, views)
            while position < end:
                position += self._read_once(self._fd, offset, position, views)
        except OSError as error:
            raise SourceUnavailableError(
                f"{self.uri}: reading at byte {offset} failed: {error.strerror}; check the file system",
                file=self.uri,
            ) from error

    def check_unchanged(self) -> None:
        """By size and mtime. Not by ctime, which changes when the file is linked, unlinked or replaced by
        rename, none of which touches the bytes that are being read."""
        status = self._status()
        if (status.st_size, status.st_mtime_ns) != (self.size_bytes, self._mtime_ns):
            raise self._changed()

    def _status(self) -> os.stat_result:
        try:
            return linux.fresh_status(self._fd)
        except OSError as error:
            raise SourceUnavailableError(
                f"{self.uri}: asking for its size and times failed: {error.strerror}; check the file system",
                file=self.uri,
            ) from error

    def close(self) -> None:
        for fd in (self._fd, self._direct_fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._fd, self._direct_fd = -1, None

    def _read_cached(self, offset: int, end: int, views: Sequence[memoryview]) -> int:
        """Copies what the page cache has from `offset` on; returns the position reached.

        Asking for pages that are not cached makes some kernels read as many ahead, which then are read twice,
        or through the page cache. So the kernel is asked whether it has the first; where it does not say, one
        page is asked for before the others.
        """
        if not self._has_nowait:
            return self._read_if_cached(offset, end, views)
        position = offset
        try:
            while position < end:
                cached = linux.page_is_cached(self._fd, position)
                if cached is False:
                    break
                rest = without(views, position - offset)
                if cached is None and end - position > linux.PAGE_BYTES:
                    os.preadv(self._fd, [rest[0][: linux.PAGE_BYTES]], position, os.RWF_NOWAIT)
                count = os.preadv(self._fd, rest, position, os.RWF_NOWAIT)
                if count == 0:
                    break
                position += count
        except OSError as error:
            if error.errno not in _NOT_CACHED:
                raise
        return position

    def _read_if_cached(self, offset: int, end: int, views: Sequence[memoryview]) -> int:
        """The same where the file system has no RWF_NOWAIT, as overlayfs and FUSE: all or nothing."""
        position = offset
        if self._has_mincore and linux.pages_are_cached(self._fd, offset, end - offset):
            while position < end:
                position += self._read_once(self._fd, offset, position, views)
        return position

    def _read_direct(self, offset: int, position: int, end: int, views: Sequence[memoryview]) -> int:
        """Whole pages from the one that holds `position`; returns the position reached."""
        fd = self._direct_fd
        while fd is not None and position < end:
            aligned = position // linux.PAGE_BYTES * linux.PAGE_BYTES
            if aligned < offset:
                break
            try:
                count = os.preadv(fd, without(views, aligned - offset), aligned)
            except OSError as error:
                if error.errno not in _REFUSES_DIRECT:
                    raise
                break
            if aligned + count <= position:
                break  # the end of the file, or of what can be read so
            position = aligned + count
            self._check_time(position)
        return position

    def _read_once(self, fd: int, offset: int, position: int, views: Sequence[memoryview]) -> int:
        count = os.preadv(fd, without(views, position - offset), position)
        if count == 0:
            raise self._changed()
        self._check_time(position + count)
        return count

    def _check_time(self, position: int) -> None:
        if time.monotonic() > self.give_up_at:
            raise too_slow(self.uri, position)

    def _changed(self) -> CheckpointChangedError:
        return CheckpointChangedError(
            f"{self.uri} was changed while it was read; load it again", file=self.uri
        )


def _open_direct(fd: int) -> int | None:
    """The same file once more for direct I/O. None where that cannot be: the file system has none, /proc is
    not mounted, the file's mode changed since it was opened."""
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _TOO_MANY:  # it would be slow for as long as it is open
            raise
        return None


def _has_nowait(fd: int, size_bytes: int) -> bool:
    """Asked at the end of the file, where there is nothing to be read ahead."""
    try:
        os.preadv(fd, [bytearray(1)], size_bytes, os.RWF_NOWAIT)
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def local_path(source: str) -> str:
    """The path that a path or a `file://` URI names. Raises InvalidRequestError."""
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
    if parts.scheme == "s3":  # or it would not have come here
        raise InvalidRequestError(f"sources: {source[:200]!r}: write s3:// in lower case")
    if parts.scheme and "://" in source:
        raise InvalidRequestError(
            f"sources: {source[:200]!r}: this penstockd knows no {parts.scheme[:20]}:// sources; "
            "use a path or s3://"
        )
    raise InvalidRequestError(
        f"sources: {source[:200]!r} is a relative path, which means nothing to penstockd; make it absolute"
    )


def open_file(path: str, access: Access) -> LocalFile:
    """Opens a regular file that the caller may read. Raises a PenstockError that names it."""
    fd = open_path(path, access, os.O_RDONLY)
    try:
        return LocalFile(path, fd)
    except OSError as error:
        raise _path_error(path, access, error) from error


def open_path(path: str, access: Access, flags: int) -> int:
    """Opens without waiting on FIFOs or devices, and for callers that are not privileged only beneath an
    allowed prefix. The caller owns the descriptor."""
    try:
        return _open(path, access, flags | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError as error:
        raise _path_error(path, access, error) from error


def list_directory(path: str, access: Access) -> list[str] | None:
    """Names in a directory, sorted; None if `path` is something else."""
    fd = open_path(path, access, os.O_RDONLY)
    try:
        return sorted(os.listdir(fd)) if stat.S_ISDIR(os.fstat(fd).st_mode) else None
    except OSError as error:
        if error.errno in _TOO_MANY:
            raise _too_many_files(path, error) from error
        raise SourceUnavailableError(
            f"{path} cannot be listed: {error.strerror}; check the file system", file=path
        ) from error
    finally:
        os.close(fd)


def _open(path: str, access: Access, flags: int) -> int:
    """Raises OSError and AccessDeniedError."""
    if access.privileged:
        return os.open(path, flags | os.O_CLOEXEC)
    return _open_allowed(path, access, flags | os.O_CLOEXEC)


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
        f"uid {access.uid} may not load {path}: penstockd has no --allow prefix that holds it; start it "
        "with one",
        file=path,
    )


def _path_error(path: str, access: Access, error: OSError) -> PenstockError:
    if error.errno in _NOT_THERE:
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
    if error.errno in _TOO_MANY:
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
    """The first link on the way to `path` that leads nowhere, and its target. Of what lies above an allowed
    prefix, or is reached through a link that leaves it, callers who are not privileged learn nothing."""
    ends = [at for at, character in enumerate(path) if character == "/" and at] + [len(path)]
    for link in (path[:end] for end in ends):
        try:
            fd = _open(link, access, os.O_PATH | os.O_NOFOLLOW)
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
        os.close(_open(link, access, os.O_PATH))
    except OSError as error:
        return error.errno in _NOT_THERE
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
