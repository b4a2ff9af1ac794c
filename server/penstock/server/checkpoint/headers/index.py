"""`*.index.json` files, which say which file of a checkpoint holds which tensor. Pure."""

from __future__ import annotations

import codecs
import re
import struct
from array import array
from collections.abc import Iterator

import msgspec

from .table import MAX_NAME_BYTES, Buffer, shown

MAX_INDEX_BYTES = 32 * 1024 * 1024
"""Longest `*.index.json` that `parse_index` reads: enough for some 300,000 tensors."""

MAX_FILES = 2_000
"""Files of one load, and so of one index."""

MAX_FILE_NAMES_BYTES = 1024 * 1024
"""Most bytes of all file names of one index together. A load's manifest repeats these names."""


class InvalidIndexError(ValueError):
    """A `*.index.json` is malformed, or names a file that it must not name."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


_INDEX = msgspec.json.Decoder(_Index)
_CLIMBS = re.compile(r"(?:^|/)\.\.(?:/|$)")


class Index:
    """Files by first appearance and, for each, its tensors' names. Immutable.

    Columns of one buffer, as in `table.TensorTable`: a million names cost one allocation and no objects.
    """

    # files, tensors, bytes of file names; then the columns in the order of `__init__`, then the names
    _HEAD = struct.Struct("=3Q")

    __slots__ = ("_buffer", "_name_ends", "_names", "_tensor_ends", "files")

    def __init__(self, buffer: Buffer) -> None:
        """Wraps `buffer` (kept, not copied; it must not change). Raises ValueError where it is no index."""
        view = memoryview(buffer).toreadonly()
        if len(view) < self._HEAD.size:
            raise ValueError("not a packed index: too short")
        files, tensors, file_names_bytes = self._HEAD.unpack_from(view)
        at = self._HEAD.size
        self._buffer = view
        file_ends = view[at : (at := at + 4 * files)].cast("I")
        self._tensor_ends = view[at : (at := at + 4 * files)].cast("I")
        self._name_ends = view[at : (at := at + 4 * tensors)].cast("I")
        file_names = view[at : (at := at + file_names_bytes)]
        self._names = view[at:]
        if len(self._name_ends) != tensors or (tensors and self._name_ends[-1] != len(self._names)):
            raise ValueError("not a packed index: wrong length")
        self.files: tuple[str, ...] = tuple(
            str(file_names[file_ends[i - 1] if i else 0 : file_ends[i]], "utf-8") for i in range(files)
        )

    @classmethod
    def pack(cls, files: dict[str, list[str]]) -> Index:
        """Copies `files`."""
        file_ends, tensor_ends, name_ends = array("I"), array("I"), array("I")
        file_names, names = bytearray(), bytearray()
        for file, tensors in files.items():
            file_names += file.encode()
            file_ends.append(len(file_names))
            for tensor in tensors:
                names += tensor.encode()
                name_ends.append(len(names))
            tensor_ends.append(len(name_ends))
        head = cls._HEAD.pack(len(file_ends), len(name_ends), len(file_names))
        return cls(b"".join((head, file_ends, tensor_ends, name_ends, file_names, names)))

    def to_bytes(self) -> memoryview:
        """The bytes for another process of this machine (native byte order). Not a copy."""
        return self._buffer

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, its objects included."""
        return len(self._buffer) + 1024 + sum(len(file) + 64 for file in self.files)

    def tensor_count(self, file: int) -> int:
        """Tensors of file number `file`."""
        return self._tensor_ends[file] - self._first(file)

    def names(self, file: int) -> Iterator[str]:
        """Names of the tensors of file number `file`, as the index orders them."""
        start = self._first(file)
        at = self._name_ends[start - 1] if start else 0
        for end in self._name_ends[start : self._tensor_ends[file]]:
            yield str(self._names[at:end], "utf-8")
            at = end

    def _first(self, file: int) -> int:
        return self._tensor_ends[file - 1] if file else 0


_UTF8 = codecs.getincrementaldecoder("utf-8")
_CHUNK_BYTES = 64 << 10


def _check_text(raw: bytes | bytearray) -> None:
    """Raises InvalidIndexError unless all of it is UTF-8; the parser skips values that it does not need.
    Decodes in pieces, as text may take four times as much memory as its bytes."""
    if raw.isascii():
        return
    decoder = _UTF8()
    with memoryview(raw) as view:
        for at in range(0, len(raw), _CHUNK_BYTES):
            last = at + _CHUNK_BYTES >= len(raw)
            try:
                decoder.decode(view[at : at + _CHUNK_BYTES], final=last)
            except UnicodeDecodeError:
                raise InvalidIndexError(f"the index is not UTF-8 behind byte {at}") from None


def parse_index(raw: bytes | bytearray) -> Index:
    """Reads a Hugging Face `*.index.json`. File names are relative to it.

    Raises InvalidIndexError: longer than `MAX_INDEX_BYTES`, not UTF-8, not an object with a `weight_map` of
    strings, no tensor at all, more than `MAX_FILES` files, names too long, or a file name that is empty,
    absolute, holds NUL or climbs with `..`.
    """
    if len(raw) > MAX_INDEX_BYTES:
        raise InvalidIndexError(f"the index has {len(raw)} bytes, more than {MAX_INDEX_BYTES}")
    _check_text(raw)
    try:
        weight_map = _INDEX.decode(raw).weight_map
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidIndexError(f"malformed index: {str(error)[:200]}") from None
    if not weight_map:
        raise InvalidIndexError("the index names no tensor")
    files: dict[str, list[str]] = {}
    file_names_bytes = 0
    for tensor, file in weight_map.items():
        if len(tensor.encode()) > MAX_NAME_BYTES:
            raise InvalidIndexError(f"tensor {shown(tensor)}: the name is longer than {MAX_NAME_BYTES} bytes")
        if file in files:
            files[file].append(tensor)
            continue
        if not file or file.startswith("/") or "\0" in file or _CLIMBS.search(file):
            raise InvalidIndexError(f"the index names a file it must not name: {shown(file)}")
        file_names_bytes += len(file.encode())
        if len(files) == MAX_FILES or file_names_bytes > MAX_FILE_NAMES_BYTES:
            raise InvalidIndexError(
                f"the index names more than {MAX_FILES} files, or files with names of more than "
                f"{MAX_FILE_NAMES_BYTES} bytes together"
            )
        files[file] = [tensor]
    return Index.pack(files)
