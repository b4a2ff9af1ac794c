"""From what a client names to open files with parsed headers.

A source is a safetensors file, an index file, or a directory: of that the files which its index names, or
all its `*.safetensors`. Everything here blocks and runs on worker threads.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, wait
from dataclasses import dataclass
from functools import cached_property
from urllib.parse import unquote, urlsplit

from .checkpoint import InvalidHeaderError
from .errors import CheckpointInvalidError, CheckpointNotFoundError, InvalidRequestError
from .header import read_header
from .index import MAX_INDEX_BYTES, InvalidIndexError, parse_index
from .sources import Access, SourceFile
from .sources.file import list_directory, open_file
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
        """Identifies the bytes: of every file where it is and which version."""
        state = hashlib.sha256()
        for file in self.files:
            state.update(f"{file.uri}\0{file.version}\0".encode())
        return state.hexdigest()[:32]

    def close(self) -> None:
        for file in self.files:
            file.close()


class Catalog:
    """Resolves sources. Keeps the headers of unchanged files, so that a warm load reads none."""

    def __init__(self, workers: Executor) -> None:
        """`workers` runs the reading of headers; `resolve` itself must not run on it."""
        self._workers = workers
        self._lock = threading.Lock()
        self._headers: OrderedDict[str, Header] = OrderedDict()
        self._cached_bytes = 0

    def resolve(self, sources: Sequence[str], access: Access) -> Checkpoint:
        """Opens every file that the sources name, and reads what it holds.

        Raises CheckpointNotFoundError, CheckpointInvalidError, AccessDeniedError, InvalidRequestError or
        SourceUnavailableError; nothing stays open then.
        """
        if not sources:
            raise InvalidRequestError("sources: name at least one file, directory or URI")
        if len(sources) > MAX_SOURCES:
            raise InvalidRequestError(f"sources: {len(sources)} are more than {MAX_SOURCES}")
        files: list[SourceFile] = []
        try:
            indexes: list[tuple[str, dict[str, tuple[str, ...]], int]] = []
            for source in sources:
                index_path, members = _expand(local_path(source), access)
                if index_path is not None:
                    index = _read_index(index_path, access)
                    indexes.append((index_path, index, len(files)))
                    members = [os.path.join(os.path.dirname(index_path), name) for name in index]
                if len(files) + len(members) > MAX_FILES:
                    raise CheckpointInvalidError(
                        f"{source[:200]} makes it more than {MAX_FILES} files; load fewer at a time"
                    )
                for member in members:
                    files.append(_open_member(member, index_path, access))
            headers = self._read_headers(files)
            for index_path, index, first in indexes:
                _check_index(index_path, index, headers[first : first + len(index)])
            return Checkpoint(tuple(sources), tuple(files), headers)
        except BaseException:
            for file in files:
                file.close()
            raise

    def _read_headers(self, files: Sequence[SourceFile]) -> tuple[Header, ...]:
        """Many at a time: hundreds of shards must not add up their latencies, nor all their memory."""
        headers: list[Header] = []
        for first in range(0, len(files), HEADERS_AT_ONCE):
            headers += self._read_some_headers(files[first : first + HEADERS_AT_ONCE])
            total_bytes = sum(header.size_bytes for header in headers)
            if total_bytes > HEADER_BYTES:
                raise CheckpointInvalidError(
                    f"the headers of the first {len(headers)} of {len(files)} files take "
                    f"{show_size(total_bytes)}, more than the {show_size(HEADER_BYTES)} that one load may "
                    "have; load fewer files at a time"
                )
        return tuple(headers)

    def _read_some_headers(self, files: Sequence[SourceFile]) -> list[Header]:
        """No file is being read any more when this ends, also when it raises."""
        reading = [self._workers.submit(self._header, file) for file in files]
        try:
            return [future.result() for future in reading]
        finally:
            for future in reading:
                future.cancel()
            wait(reading)

    def _header(self, file: SourceFile) -> Header:
        with self._lock:
            cached = self._headers.get(file.version)
            if cached is not None:
                self._headers.move_to_end(file.version)
                return cached
        try:
            header = read_header(file)
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
    if parts.scheme and "://" in source:
        raise InvalidRequestError(
            f"sources: {source[:200]!r}: this penstockd knows no {parts.scheme[:20]}:// sources"
        )
    raise InvalidRequestError(
        f"sources: {source[:200]!r} is a relative path, which means nothing to penstockd; make it absolute"
    )


def _expand(path: str, access: Access) -> tuple[str | None, list[str]]:
    """The index file that `path` is or has, or else the weights that `path` is or has."""
    if path.endswith(INDEX_SUFFIX):
        return path, []
    names = list_directory(path, access)
    if names is None:
        return None, [path]
    for name in names:
        if name.endswith((INDEX_SUFFIX, WEIGHTS_SUFFIX)) and not _is_text(name):
            raise CheckpointInvalidError(f"{path} holds {name!a}, a name that is not UTF-8", file=path)
    indexes = [name for name in names if name.endswith(INDEX_SUFFIX)]
    if len(indexes) > 1:
        raise CheckpointInvalidError(
            f"{path} holds several index files ({', '.join(indexes[:4])}); name the one to load", file=path
        )
    if indexes:
        return os.path.join(path, indexes[0]), []
    weights = [os.path.join(path, name) for name in names if name.endswith(WEIGHTS_SUFFIX)]
    if not weights:
        raise CheckpointNotFoundError(f"{path} holds no *{WEIGHTS_SUFFIX} file", file=path)
    return None, weights


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_index(path: str, access: Access) -> dict[str, tuple[str, ...]]:
    file = open_file(path, access)
    try:
        if file.size_bytes > MAX_INDEX_BYTES:
            raise CheckpointInvalidError(
                f"{path}: an index of {show_size(file.size_bytes)}, larger than {show_size(MAX_INDEX_BYTES)}",
                file=path,
            )
        raw = bytearray(file.size_bytes)
        file.read_into(0, [memoryview(raw)])
        return parse_index(bytes(raw))
    except InvalidIndexError as error:
        raise CheckpointInvalidError(f"{path}: {error}", file=path) from error
    finally:
        file.close()


def _open_member(path: str, index_path: str | None, access: Access) -> SourceFile:
    try:
        return open_file(path, access)
    except CheckpointNotFoundError as error:
        if index_path is None:
            raise
        raise CheckpointInvalidError(
            f"{index_path} names {os.path.basename(path)}, which does not exist", file=index_path
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
