"""Copies files beside the weights from the daemon to a directory, which is complete or does not exist.

fetch to the cache   $PENSTOCK_CACHE_DIR/SOURCE/VERSIONS: files that are there are not asked for again,
                     and another version of any file makes another directory
fetch to a place     the directory that the caller names; one that a fetch made is replaced at once
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from penstock.v1 import streamer_pb2 as pb

from . import errors
from .ring.progress import Bar
from .ring.rpc import Session
from .system import trees
from .system.trees import Draft, Tree

CACHE_VARIABLE = "PENSTOCK_CACHE_DIR"
_ABOUT_THE_DISK = frozenset(
    {
        *(errno.ENOSPC, errno.EDQUOT, errno.EROFS),
        *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG),
    }
)
_HAVE_AT_ONCE = 2000
"""Most files that the client has, in one message. A message has at most 4096 fields and 1 MiB."""
_HAVE_BYTES = 512 << 10


def cache_directory() -> Path:
    """$PENSTOCK_CACHE_DIR, else ~/.cache/penstock."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path("~/.cache/penstock").expanduser()


def to_cache(session: Session, request: pb.FetchRequest, bar: Bar | None) -> Path:
    """Fetches to the cache. Raises the daemon's errors, and OSError."""
    source = request.source.rstrip("/")
    home = cache_directory() / "files" / _key(source)
    with _explained(home):
        home.mkdir(0o700, parents=True, exist_ok=True)
        with trees.locked(home):
            known = [tree for path in sorted(home.iterdir()) if (tree := trees.read(path, source))]
            fetch = _Fetch(session, request, known, bar)
            with fetch.received(home) as (files, draft):
                place = home / trees.digest(files)
                there = next((tree for tree in known if tree.path == place and tree.whole), None)
                if there is None:
                    fetch.copy_unchanged(draft)
                    draft.put(place, lambda path: True)
    return place


def to_place(session: Session, request: pb.FetchRequest, place: Path, bar: Bar | None) -> Path:
    """Fetches to the directory `place`. Raises the daemon's errors, and OSError."""
    place = Path(os.path.realpath(place))
    _check_place(place)
    with _explained(place):
        place.parent.mkdir(parents=True, exist_ok=True)
        old = trees.read(place, request.source.rstrip("/"))
        fetch = _Fetch(session, request, [old] if old else [], bar)
        with fetch.received(place.parent) as (files, draft):
            if old is None or not old.whole or old.digest != trees.digest(files):
                fetch.copy_unchanged(draft)
                draft.put(place, trees.is_tree)
    return place


def into(session: Session, request: pb.FetchRequest, directory: Path, bar: Bar | None) -> None:
    """Fetches into a directory, beside its files. No file of it is touched before all have arrived; then each
    replaces the one of the same name. Raises the daemon's errors, and OSError."""
    with _explained(directory):
        directory.mkdir(parents=True, exist_ok=True)
        with _Fetch(session, request, [], bar).received(directory) as (files, draft):
            for name, _, _ in files:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(draft.path / name, directory / name)


def listed(session: Session, request: pb.FetchRequest) -> list[pb.FetchedFile]:
    """The files that a fetch would copy, without their bytes."""
    request.list_only = True
    return [response.file for response in _responses(session, [request]) if response.HasField("file")]


class _Fetch:
    """One conversation with the daemon."""

    def __init__(
        self, session: Session, request: pb.FetchRequest, known: Sequence[Tree], bar: Bar | None
    ) -> None:
        """`known` are copies of the same source."""
        self._session = session
        self._request = request
        self._bar = bar
        self._has = {(name, kept.version): tree for tree in known for name, kept in tree.files.items()}
        self._unchanged: list[tuple[str, str]] = []

    @contextmanager
    def received(self, parent: Path) -> Iterator[tuple[list[tuple[str, int, str]], Draft]]:
        """Names, sizes and versions of all files, and a draft in `parent` with the new ones."""
        requests = _in_parts(self._request, list(self._has))
        files: list[tuple[str, int, str]] = []
        names: set[str] = set()
        with Draft(parent, self._request.source.rstrip("/")) as draft:
            for file in _files(_responses(self._session, requests), self._bar):
                if file.name in names:
                    raise errors.broken(f"the daemon names a file {file.name[:200]!r} twice")
                names.add(file.name)
                files.append((file.name, file.size_bytes, file.version))
                if file.unchanged:
                    if (file.name, file.version) not in self._has:
                        raise errors.broken(f"{file.name!r} is called unchanged and was not there")
                    self._unchanged.append((file.name, file.version))
                    continue
                with draft.create(file.name) as written:
                    for data in file.data:
                        written.write(data)
                draft.add(file.name, file.version)
            yield files, draft

    def copy_unchanged(self, draft: Draft) -> None:
        for name, version in self._unchanged:
            draft.copy(name, self._has[name, version])


@dataclass(slots=True)
class _File:
    name: str
    size_bytes: int
    version: str
    unchanged: bool
    data: Iterator[bytes]
    """A file that must be read to its end before the next one is asked for."""


def _files(responses: Iterator[pb.FetchResponse], bar: Bar | None) -> Iterator[_File]:
    """Separates the messages by file. Raises ProtocolError for messages that break the contract."""
    total_bytes = done_bytes = 0
    head: pb.FetchResponse | None = None

    def data(first: pb.FetchResponse) -> Iterator[bytes]:
        nonlocal head, done_bytes
        left, response = first.file.size_bytes, first
        while True:
            left -= len(response.data)
            done_bytes += len(response.data)
            if left < 0:
                raise errors.broken(f"{first.file.name!r} has more bytes than its size")
            yield response.data
            if bar is not None:
                bar.show(done_bytes, total_bytes)
            following = next(responses, None)
            if following is None or following.HasField("file") or following.done:
                head = following
                break
            response = following
        if left:
            raise errors.broken(f"{first.file.name!r} has fewer bytes than its size")

    head = next(responses, None)
    while head is not None:
        response, head = head, None
        if response.HasField("plan"):
            total_bytes = response.plan.total_bytes
        if response.done:
            for _ in responses:  # a call that is left before its status counts as cancelled
                pass
            return
        if response.HasField("file"):
            file = response.file
            _check_name(file.name)
            if file.unchanged:
                done_bytes += file.size_bytes
                yield _File(file.name, file.size_bytes, file.version, True, iter(()))
            else:
                one = _File(file.name, file.size_bytes, file.version, False, data(response))
                yield one
        head = head or next(responses, None)
    raise errors.broken("Fetch ended before it was done")


def _responses(session: Session, requests: Sequence[pb.FetchRequest]) -> Iterator[pb.FetchResponse]:
    """Ends the call when it is closed."""
    call = session.service.Fetch(iter(requests), metadata=session.metadata)
    begun = False
    try:
        for response in call:
            begun = True
            yield response
    except grpc.RpcError as error:
        raise session.error(error, begun=begun) from error
    finally:
        call.cancel()


def _in_parts(request: pb.FetchRequest, have: Sequence[tuple[str, str]]) -> list[pb.FetchRequest]:
    """The request with the versions that the client has, in as many messages as needed. `request` stays as it
    is: a later attempt may have other versions."""
    first = pb.FetchRequest()
    first.CopyFrom(request)
    parts, size_bytes = [first], 0
    for name, version in have:
        file = pb.FetchedFile(name=name, version=version)
        size_bytes += file.ByteSize() + 8
        if len(parts[-1].have) == _HAVE_AT_ONCE or size_bytes > _HAVE_BYTES:
            parts[-1].more = True
            parts.append(pb.FetchRequest())
            size_bytes = file.ByteSize() + 8
        parts[-1].have.append(file)
    return parts


def _check_name(name: str) -> None:
    """Refuses a name that leads out of the directory, whichever daemon sends it."""
    parts = name.split("/")
    if not name or "\0" in name or {"", ".", ".."} & set(parts) or parts == [trees.RECORD]:
        raise errors.broken(f"the daemon names a file {name[:200]!r}, which cannot be made")


def _key(source: str) -> str:
    """The name of a source's directory: readable, and unique for each source."""
    last = re.sub(r"[^A-Za-z0-9._-]+", "-", source.rpartition("/")[2])[:60].strip(".-")
    return f"{last or 'root'}-{hashlib.sha256(source.encode()).hexdigest()[:12]}"


def _check_place(place: Path) -> None:
    if os.path.ismount(place):
        raise OSError(f"{place} is a mount point, which cannot be replaced at once; name a directory in it")
    if place.exists() and not place.is_dir():
        raise NotADirectoryError(f"{place} is a file; name a directory")
    if place.is_dir() and not trees.is_tree(place) and any(place.iterdir()):
        raise FileExistsError(f"{place} is not empty, and no fetch made it; name another directory")


@contextmanager
def _explained(where: Path) -> Iterator[None]:
    """Adds the remedy to errors of the disk."""
    try:
        yield
    except OSError as error:
        if error.errno not in _ABOUT_THE_DISK:
            raise
        explained = type(error)(
            f"{where}: fetched files cannot be written there ({error.strerror}); free space or let this user "
            f"write, set {CACHE_VARIABLE}, or name another directory"
        )
        explained.errno = error.errno
        raise explained from error
