"""Directories that are complete or do not exist: written beside their place, and moved there by one rename.

Each has a record of its files (`RECORD`): source, names, sizes, versions and times. A later fetch reads there
which files it need not fetch again, and which files somebody has changed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

RECORD = ".penstock.json"
_DRAFT = ".penstock-"
_SYNCING_THREADS = 8
"""A disk serves several syncs at the same time by one write."""
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Kept:
    """A file of a tree, as it was when it was written."""

    size_bytes: int
    version: str
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Tree:
    """A complete directory, without the files that somebody changed."""

    path: Path
    files: Mapping[str, Kept]
    whole: bool
    """No file of it was changed."""

    @property
    def digest(self) -> str:
        return digest((name, kept.size_bytes, kept.version) for name, kept in self.files.items())


def digest(files: Iterable[tuple[str, int, str]]) -> str:
    """A digest of names, sizes and versions."""
    state = hashlib.sha256()
    for one in sorted(files):
        state.update(json.dumps(one).encode())
    return state.hexdigest()[:20]


def read(path: Path, source: str) -> Tree | None:
    """The tree at `path`. None if there is nothing, or something else than a tree of this source."""
    try:
        record = json.loads((path / RECORD).read_bytes())
        if record["source"] != source:
            return None
        recorded = {str(name): Kept(int(s), str(v), int(t)) for name, (s, v, t) in record["files"].items()}
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # not there, or not whole after a crash
        return None
    files = {name: kept for name, kept in recorded.items() if _is_unchanged(path / name, kept)}
    return Tree(path, files, whole=len(files) == len(recorded))


def _is_unchanged(path: Path, kept: Kept) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    same = (status.st_size, status.st_mtime_ns) == (kept.size_bytes, kept.mtime_ns)
    return same and stat.S_ISREG(status.st_mode)


def is_tree(path: Path) -> bool:
    """Whether a fetch made this directory, from any source."""
    return (path / RECORD).is_file()


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds the directory's lock, for which other threads and processes wait. Does nothing if the file system
    has no locks."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # without a lock files may be fetched twice, which does no harm
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


class Draft:
    """A directory that is being written, beside its final place. A context manager, which removes the draft
    unless `put` has moved it."""

    def __init__(self, parent: Path, source: str) -> None:
        """Makes nothing before the first file."""
        self._parent = parent
        self._source = source
        self._files: dict[str, Kept] = {}
        self._path: Path | None = None
        self._fd = -1
        self._syncing = ThreadPoolExecutor(_SYNCING_THREADS, thread_name_prefix="penstock-sync")
        self._synced: list[Future[None]] = []

    def __enter__(self) -> Draft:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._syncing.shutdown(cancel_futures=True)
        if self._path is not None:
            if self._path.exists():
                shutil.rmtree(self._path, ignore_errors=True)
            os.close(self._fd)

    @property
    def path(self) -> Path:
        """Made at the first use. Also removes drafts beside it that killed processes have left."""
        if self._path is None:
            _remove_abandoned(self._parent)
        while self._path is None:
            path = self._parent / f"{_DRAFT}{secrets.token_hex(8)}"
            path.mkdir()
            try:
                fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            except FileNotFoundError:  # another process or thread removed it as abandoned
                continue
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_EX)  # until it is in its place, or this process is gone
            if path.is_dir():
                self._path, self._fd = path, fd
            else:  # it was removed so before it was locked
                os.close(fd)
        return self._path

    def create(self, name: str) -> IO[bytes]:
        """A new file, for the caller to write and close."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, "xb")

    def add(self, name: str, version: str) -> None:
        """A file from `create` is complete. It is synced to the disk while others are written."""
        self._synced.append(self._syncing.submit(_sync, self.path / name))
        status = (self.path / name).stat()
        self._files[name] = Kept(status.st_size, version, status.st_mtime_ns)

    def copy(self, name: str, tree: Tree) -> None:
        """Copies a file of another tree. Raises FileNotFoundError if that file was changed."""
        kept = tree.files[name]
        with self.create(name) as copied, open(tree.path / name, "rb") as original:
            shutil.copyfileobj(original, copied, 1 << 20)
        if not _is_unchanged(tree.path / name, kept):
            raise FileNotFoundError(f"{tree.path / name} was changed while it was copied; fetch again")
        self.add(name, kept.version)

    def put(self, place: Path, replaces: Callable[[Path], bool]) -> None:
        """Moves the draft to `place` when all of it is on the disk. Replaces a directory there if `replaces`
        allows it. Raises OSError."""
        record = {"source": self._source, "files": {name: _row(kept) for name, kept in self._files.items()}}
        (self.path / RECORD).write_text(json.dumps(record))
        self._sync()
        try:
            os.rename(self.path, place)  # also over an empty directory
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not replaces(place):
                raise
            _exchange(self.path, place)
        _sync(place.parent)

    def _sync(self) -> None:
        for synced in self._synced:
            synced.result()
        for path in (self.path / RECORD, *(Path(top) for top, _, _ in os.walk(self.path))):
            _sync(path)


def _row(kept: Kept) -> tuple[int, str, int]:
    return kept.size_bytes, kept.version, kept.mtime_ns


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _exchange(new: Path, old: Path) -> None:
    """Exchanges the names of two directories: in one step, or in several if the file system cannot do
    that."""
    names = os.fsencode(new), os.fsencode(old)
    try:
        failed = _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) != 0
    except AttributeError:  # an old libc
        failed = True
    if failed:
        aside = new.with_name(new.name + "-old")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except BaseException:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def _remove_abandoned(parent: Path) -> None:
    for path in parent.glob(f"{_DRAFT}*"):
        with contextlib.suppress(OSError):  # in use by another process, or gone
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path)
            finally:
                os.close(fd)
