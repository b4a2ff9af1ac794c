"""From what a client names to open files with parsed headers.

A source is a safetensors file, an index file, or a directory: of that the files which its index names, or
all its `*.safetensors`. What these are in each kind of storage, `sources/` knows. Everything here blocks
and runs on worker threads.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from dataclasses import dataclass
from functools import cached_property

from .checkpoint import InvalidHeaderError
from .errors import CheckpointInvalidError, CheckpointNotFoundError, InvalidRequestError
from .header import read_header
from .index import MAX_INDEX_BYTES, InvalidIndexError, parse_index
from .sources import Access, Patient, Source, SourceFile, join, parent
from .sources.identity import Place
from .statx import root_mount
from .table import Header, TensorTable
from .units import show_size

WEIGHTS_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
MAX_SOURCES = 2_000
MAX_FILES = 2_000
"""Files of one load, each of which takes two descriptors while it is read."""
HEADERS_AT_ONCE = 64
HEADER_BYTES = 80 << 20
"""Most that the headers of one load may take: some 1,300,000 tensors."""
CACHED_HEADER_BYTES = 32 << 20
"""Headers of checkpoints used lately are kept up to so many bytes in all: some 400,000 tensors."""


@dataclass(frozen=True)
class Checkpoint:
    """Files loaded together, in order, and open. Whoever holds it must `close` it, once."""

    sources: tuple[str, ...]
    files: tuple[SourceFile, ...]
    headers: tuple[Header, ...]

    @property
    def tables(self) -> tuple[TensorTable, ...]:
        return tuple(header.tensors for header in self.headers)

    @cached_property
    def version(self) -> str:
        """Identifies the bytes: of every file where it is and which version, and the mounts behind them. To
        be compared by `continues` with one of another daemon."""
        state = hashlib.sha256()
        for file in self.files:
            state.update(f"{file.uri}\0{file.portable_version}\0".encode())
        root = root_mount()
        place = Place.of(f"{root.id:x}" if root.id else "", [file.mount for file in self.files])
        return f"{state.hexdigest()[:32]}{place}"

    def close(self) -> None:
        for file in self.files:
            file.close()


@dataclass(frozen=True, slots=True)
class _Member:
    """A file of the checkpoint, not yet open, and the index that names it."""

    source: Source
    location: str
    index: str | None


class Catalog:
    """Resolves sources. Keeps the headers of unchanged files, so that a warm load reads none."""

    def __init__(self, files: Source, objects: Source) -> None:
        """`files` are what paths and `file://` URIs name, `objects` what `s3://` URIs do. `resolve` must not
        run on the workers of either."""
        self._files = files
        self._objects = objects
        self._lock = threading.Lock()
        self._headers: OrderedDict[str, Header] = OrderedDict()
        self._cached_bytes = 0

    def location(self, source: str) -> str:
        """The one way to write what `source` names. Raises InvalidRequestError."""
        return self._source(source).location(source)

    def is_remote(self, sources: Sequence[str]) -> bool:
        """Resolving them waits for a network."""
        return any(self._source(source) is self._objects for source in sources)

    def resolve(self, sources: Sequence[str], access: Access) -> Checkpoint:
        """Opens every file that the sources name, and reads what it holds.

        Raises CheckpointNotFoundError, CheckpointInvalidError, CheckpointChangedError, AccessDeniedError,
        InvalidRequestError or SourceUnavailableError; nothing stays open then.
        """
        if not sources:
            raise InvalidRequestError("sources: name at least one file, directory or URI")
        if len(sources) > MAX_SOURCES:
            raise InvalidRequestError(f"sources: {len(sources)} are more than {MAX_SOURCES}")
        members: list[_Member] = []
        indexes: list[tuple[str, dict[str, tuple[str, ...]], int]] = []
        for named in sources:
            source = self._source(named)
            index_location, locations = _expand(source, source.location(named), access)
            if index_location is not None:
                index = _read_index(source, index_location, access)
                indexes.append((index_location, index, len(members)))
                locations = [join(parent(index_location), name) for name in index]
            members += [_Member(source, location, index_location) for location in locations]
            if len(members) > MAX_FILES:
                raise CheckpointInvalidError(
                    f"{named[:200]} makes it more than {MAX_FILES} files; load fewer at a time"
                )
        files, headers = self._open_all(members, access)
        checkpoint = Checkpoint(tuple(sources), files, headers)
        try:
            for index_location, index, first in indexes:
                _check_index(index_location, index, headers[first : first + len(index)])
        except BaseException:
            checkpoint.close()
            raise
        return checkpoint

    def _source(self, source: str) -> Source:
        return self._objects if source.startswith("s3://") else self._files

    def _open_all(
        self, members: Sequence[_Member], access: Access
    ) -> tuple[tuple[SourceFile, ...], tuple[Header, ...]]:
        """Many at a time: hundreds of shards must not add up their latencies, nor all their memory."""
        opened: list[tuple[SourceFile, Header]] = []
        try:
            for first in range(0, len(members), HEADERS_AT_ONCE):
                opened += self._open_some(members[first : first + HEADERS_AT_ONCE], access)
                total_bytes = sum(header.size_bytes for _, header in opened)
                if total_bytes > HEADER_BYTES:
                    raise CheckpointInvalidError(
                        f"the headers of the first {len(opened)} of {len(members)} files take "
                        f"{show_size(total_bytes)}, more than the {show_size(HEADER_BYTES)} that one load "
                        "may have; load fewer files at a time"
                    )
        except BaseException:
            for file, _ in opened:
                file.close()
            raise
        return tuple(file for file, _ in opened), tuple(header for _, header in opened)

    def _open_some(self, members: Sequence[_Member], access: Access) -> list[tuple[SourceFile, Header]]:
        """When this raises, none of them is open or being opened."""
        opening: list[Future[tuple[SourceFile, Header]]] = []
        opened = []
        future: Future[tuple[SourceFile, Header]] | None = None
        workers: dict[tuple[str, str], Executor] = {}
        try:
            for member in members:
                place = member.source.kind, parent(member.location)
                if place not in workers:
                    workers[place] = member.source.workers(member.location)
                opening.append(workers[place].submit(self._open, member, access))
            for future in opening:
                opened.append(future.result())
            return opened
        except BaseException:
            for future in opening:
                future.cancel()
            wait(opening)
            for future in filter(_succeeded, opening):
                future.result()[0].close()
            raise
        finally:
            # An error, its future and this frame would keep each other, and a header, until gc comes.
            opening.clear()
            future = None

    def _open(self, member: _Member, access: Access) -> tuple[SourceFile, Header]:
        file = _open_member(member, access)
        try:
            return file, self._header(file)
        except BaseException:
            file.close()
            raise

    def _header(self, file: SourceFile) -> Header:
        with self._lock:
            cached = self._headers.get(file.version)
            if cached is not None:
                self._headers.move_to_end(file.version)
                return cached
        try:
            header = read_header(Patient(file))
        except InvalidHeaderError as error:
            raise CheckpointInvalidError(f"{file.uri}: {error}", file=file.uri) from error
        file.check_unchanged()
        with self._lock:
            if file.version not in self._headers and header.size_bytes <= CACHED_HEADER_BYTES:
                self._headers[file.version] = header
                self._cached_bytes += header.size_bytes
                while self._cached_bytes > CACHED_HEADER_BYTES:
                    _, old = self._headers.popitem(last=False)
                    self._cached_bytes -= old.size_bytes
        return header


def _succeeded(future: Future[tuple[SourceFile, Header]]) -> bool:
    return not future.cancelled() and future.exception() is None


def _expand(source: Source, location: str, access: Access) -> tuple[str | None, list[str]]:
    """The index file that `location` is or has, or else the weights that it is or has."""
    if source.name(location).endswith(INDEX_SUFFIX):
        return location, []
    names = source.list(location, access)
    if names is None:
        return None, [location]
    for name in names:
        if name.endswith((INDEX_SUFFIX, WEIGHTS_SUFFIX)) and not _is_text(name):
            raise CheckpointInvalidError(
                f"{location} holds {name!a}, a name that is not UTF-8", file=location
            )
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise CheckpointInvalidError(
            f"{location} holds several index files ({', '.join(indexes[:4])}); name the one to load",
            file=location,
        )
    if indexes:
        return join(location, indexes[0]), []
    weights = [join(location, name) for name in names if name.endswith(WEIGHTS_SUFFIX)]
    if not weights:
        raise CheckpointNotFoundError(f"{location} holds no *{WEIGHTS_SUFFIX} file", file=location)
    return None, weights


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_index(source: Source, location: str, access: Access) -> dict[str, tuple[str, ...]]:
    file = source.open(location, access)
    try:
        if file.size_bytes > MAX_INDEX_BYTES:
            raise CheckpointInvalidError(
                f"{location}: an index of {show_size(file.size_bytes)}, larger than "
                f"{show_size(MAX_INDEX_BYTES)}",
                file=location,
            )
        raw = bytearray(file.size_bytes)
        Patient(file).read_into(0, [memoryview(raw)])
        file.check_unchanged()
        return parse_index(bytes(raw))
    except InvalidIndexError as error:
        raise CheckpointInvalidError(f"{location}: {error}", file=location) from error
    finally:
        file.close()


def _open_member(member: _Member, access: Access) -> SourceFile:
    try:
        return member.source.open(member.location, access)
    except CheckpointNotFoundError as error:
        if member.index is None:
            raise
        name = member.source.name(member.location)
        raise CheckpointInvalidError(
            f"{member.index} names {name}, which does not exist", file=member.index
        ) from error


def _check_index(path: str, index: dict[str, tuple[str, ...]], headers: Sequence[Header]) -> None:
    for (file, names), header in zip(index.items(), headers, strict=True):
        missing = set(names).difference(header.tensors.names())
        if missing:
            raise CheckpointInvalidError(
                f"{path} says that {file} holds tensor {min(missing)[:200]!r}, which it does not",
                file=path,
                tensor=min(missing)[:200],
            )
