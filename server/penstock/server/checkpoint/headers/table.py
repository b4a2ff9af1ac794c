"""The contents of a header, packed: the tensors of a file as columns, and its metadata. Pure.

A million tensors must cost the daemon tens of megabytes, not hundreds, and pass between processes as bytes.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...sources.checksums import Prefix

Buffer = bytes | bytearray | memoryview

OBJECT_BYTES = 4096
"""What a header takes besides its buffers: objects, its SHA-256, its places in the cache. Measured: 3700."""

DTYPE_BITS: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)
"""Every dtype of safetensors 0.8.0 and the bits of one element."""

_DTYPES = tuple(DTYPE_BITS)
DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

MAX_NAME_BYTES = 16 * 1024
"""Longest name of a tensor, in UTF-8. No writer comes near: the longest names in use have some 200 bytes."""

MAX_DIMS = 64
"""Most dimensions of a tensor: the limit of numpy (its NPY_MAXDIMS) and of torch's reductions (its
dim_bitset_size). Models use at most 8."""

DESCRIPTION_BYTES = 64
"""Bytes of a tensor's description to a client, besides its name and its dimensions: dtype, offset and
size."""
_DIM_DESCRIPTION_BYTES = 10  # a varint of 64 bits

U64_MAX = 2**64 - 1
_ENTRIES_AT_ONCE = 128
"""How many tensors have their columns unpacked together: a name may have 16 KiB."""
_SHOWN_CHARS = 200


def shown(name: str) -> str:
    """A name fit for a message: printable and of bounded length."""
    return repr(name) if len(name) <= _SHOWN_CHARS else f"{name[:_SHOWN_CHARS]!r}... ({len(name)} characters)"


class TensorTable:
    """The tensors of one file in file order: by start, then end, then name. Immutable.

    Columns of one buffer, read in place, so that a million tensors cost one allocation and no objects. Not a
    container of tensor objects: the methods return the fields of tensor `i`.
    """

    # magic, tensors, data start, dims, bytes of names; then the columns in the order of `__init__`
    _HEAD = struct.Struct("=5Q")
    _MAGIC = 0x31656C6261546E50

    __slots__ = ("_buffer", "_data_start", "_dim_ends", "_dims", "_dtypes", "_ends", "_name_ends", "_names")

    def __init__(self, buffer: Buffer) -> None:
        """Wraps `buffer` (kept, not copied; it must not change). Use `from_bytes`."""
        view = memoryview(buffer).toreadonly()
        if len(view) < self._HEAD.size:
            raise ValueError("not a tensor table: too short")
        magic, count, data_start, dims, names_bytes = self._HEAD.unpack_from(view)
        if magic != self._MAGIC or len(view) != self._HEAD.size + 17 * count + 8 * dims + names_bytes:
            raise ValueError("not a tensor table: wrong magic or length")
        at = self._HEAD.size
        self._buffer = view
        self._data_start: int = data_start
        self._ends = view[at : (at := at + 8 * count)].cast("Q")
        self._dims = view[at : (at := at + 8 * dims)].cast("Q")
        self._dim_ends = view[at : (at := at + 4 * count)].cast("I")
        self._name_ends = view[at : (at := at + 4 * count)].cast("I")
        self._dtypes = view[at : (at := at + count)]
        self._names = view[at:]
        if count and (self._dim_ends[-1] != dims or self._name_ends[-1] != names_bytes):
            raise ValueError("not a tensor table: columns disagree")

    @classmethod
    def pack(
        cls,
        *,
        data_start: int,
        ends: array[int],
        dims: array[int],
        dim_ends: array[int],
        name_ends: array[int],
        dtypes: bytearray,
        names: bytearray,
    ) -> TensorTable:
        """A table of columns in file order: `ends` are absolute file offsets, `dim_ends` and `name_ends`
        say where a tensor's part of `dims` and of `names` ends, `dtypes` are DTYPE_CODES."""
        head = cls._HEAD.pack(cls._MAGIC, len(ends), data_start, len(dims), len(names))
        return cls(b"".join((head, ends, dims, dim_ends, name_ends, dtypes, names)))

    @classmethod
    def from_bytes(cls, data: Buffer) -> TensorTable:
        """The table of bytes from `to_bytes`. Keeps `data`; raises `ValueError` if they are no table.

        Checks the shape of the columns, not every value: the bytes come from a process of the daemon's own.
        """
        return cls(data)

    def to_bytes(self) -> memoryview:
        """The table as bytes for another process of this machine (native byte order). Not a copy."""
        return self._buffer

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, i: int) -> str:
        """The tensor's name."""
        return str(self._names[self._name_ends[i - 1] if i else 0 : self._name_ends[i]], "utf-8")

    def names(self) -> Iterator[str]:
        """All names, in file order."""
        return map(self.name, range(len(self)))

    def dtype(self, i: int) -> str:
        """The dtype as the file spells it, a key of `DTYPE_BITS`."""
        return _DTYPES[self._dtypes[i]]

    def shape(self, i: int) -> tuple[int, ...]:
        """The shape in elements, `()` for a scalar."""
        return tuple(self._dims[self._dim_ends[i - 1] if i else 0 : self._dim_ends[i]])

    def described_bytes(self, count: int) -> int:
        """An upper bound of the bytes that describe the first `count` tensors to a client: names, dtypes,
        shapes."""
        if not count:
            return 0
        return (
            DESCRIPTION_BYTES * count
            + _DIM_DESCRIPTION_BYTES * self._dim_ends[count - 1]
            + self._name_ends[count - 1]
        )

    def extents(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """`start` and `end` of each of the tensors `indices`."""
        if isinstance(indices, range) and indices.step == 1 and indices:
            ends = self._ends[indices.start : indices.stop]
            return zip(chain((self.start(indices.start),), ends), ends, strict=False)
        return ((self.start(i), self.end(i)) for i in indices)

    def entries(self, indices: Sequence[int]) -> Iterator[tuple[str, str, Sequence[int], int, int]]:
        """Name, dtype, shape, `start` and `end` of each tensor, as the methods of these names return them,
        for many tensors at a fraction of the cost."""
        if isinstance(indices, range) and indices.step == 1:
            for first in range(indices.start, indices.stop, _ENTRIES_AT_ONCE):
                yield from self._neighbours(first, min(first + _ENTRIES_AT_ONCE, indices.stop))
        else:
            dims, names, dtypes = self._dims, self._names, self._dtypes
            dim_ends, name_ends = self._dim_ends, self._name_ends
            for i in indices:
                name = str(names[name_ends[i - 1] if i else 0 : name_ends[i]], "utf-8")
                shape = dims[dim_ends[i - 1] if i else 0 : dim_ends[i]]
                yield name, _DTYPES[dtypes[i]], shape, self.start(i), self.end(i)

    def _neighbours(self, first: int, last: int) -> Iterator[tuple[str, str, Sequence[int], int, int]]:
        """The entries from `first` to `last`. Their part of the columns is unpacked at once."""
        name_base = name_at = self._name_ends[first - 1] if first else 0
        dim_base = dim_at = self._dim_ends[first - 1] if first else 0
        names = bytes(self._names[name_base : self._name_ends[last - 1]])
        dims = self._dims[dim_base : self._dim_ends[last - 1]].tolist()
        start = self.start(first)
        columns = [
            column[first:last].tolist()
            for column in (self._name_ends, self._dim_ends, self._dtypes, self._ends)
        ]
        for name_end, dim_end, dtype, end in zip(*columns, strict=True):
            name = names[name_at - name_base : name_end - name_base].decode()
            yield name, _DTYPES[dtype], dims[dim_at - dim_base : dim_end - dim_base], start, end
            name_at, dim_at, start = name_end, dim_end, end

    def start(self, i: int) -> int:
        """Absolute offset in the file of the tensor's first byte."""
        # Valid files have no holes: each tensor starts where the one before ends.
        return self._ends[i - 1] if i else self._data_start

    def end(self, i: int) -> int:
        """Absolute offset in the file just after the tensor's last byte."""
        return self._ends[i]


class PackedMetadata(Mapping[str, str]):
    """The `__metadata__` of one file: a read-only mapping over one buffer, sorted by key.

    Packed because hostile metadata may hold millions of pairs, which as a `dict` would cost the daemon
    hundreds of MB and a long hold of the GIL.
    """

    _HEAD = struct.Struct("=Q")

    __slots__ = ("_buffer", "_ends", "_text")

    def __init__(self, buffer: Buffer) -> None:
        """Wraps `buffer` (kept, not copied; it must not change). Use `from_bytes`."""
        view = memoryview(buffer).toreadonly()
        count = self._HEAD.unpack_from(view)[0] if len(view) >= self._HEAD.size else U64_MAX
        text_at = self._HEAD.size + 8 * count  # two ends of 4 bytes a pair
        if len(view) < text_at:
            raise ValueError("not packed metadata: too short")
        self._buffer = view
        self._ends = view[self._HEAD.size : text_at].cast("I")
        self._text = view[text_at:]
        if (self._ends[-1] if count else 0) != len(self._text):
            raise ValueError("not packed metadata: wrong length")

    @classmethod
    def pack(cls, pairs: Mapping[str, str]) -> PackedMetadata:
        """Copies `pairs`."""
        ends = array("I")
        text = bytearray()
        for key in sorted(pairs):
            text += key.encode()
            ends.append(len(text))
            text += pairs[key].encode()
            ends.append(len(text))
        return cls(b"".join((cls._HEAD.pack(len(pairs)), ends, text)))

    @classmethod
    def from_bytes(cls, data: Buffer) -> PackedMetadata:
        """The mapping of bytes from `to_bytes`. Keeps `data`; raises `ValueError` if they are none."""
        return cls(data)

    def to_bytes(self) -> memoryview:
        """The mapping as bytes for another process of this machine. Not a copy."""
        return self._buffer

    def _string(self, i: int) -> str:
        return str(self._text[self._ends[i - 1] if i else 0 : self._ends[i]], "utf-8")

    def __len__(self) -> int:
        return len(self._ends) // 2

    def __iter__(self) -> Iterator[str]:
        return map(self._string, range(0, len(self._ends), 2))

    def __getitem__(self, key: str) -> str:
        low, high = 0, len(self)
        while low < high:
            middle = (low + high) // 2
            found = self._string(2 * middle)
            if found == key:
                return self._string(2 * middle + 1)
            low, high = (middle + 1, high) if found < key else (low, middle)
        raise KeyError(key)

    def __repr__(self) -> str:
        return f"PackedMetadata({len(self)} pairs, {len(self._text)} bytes)"


@dataclass(frozen=True, slots=True)
class Header:
    """The contents of a safetensors header: tensors, metadata (empty if absent), and where the data
    starts."""

    tensors: TensorTable
    metadata: PackedMetadata
    data_start: int
    """Absolute offset of the data in the file: 8 plus the header's bytes."""
    metadata_omitted: bool = False
    """Whether there is more metadata than is worth keeping; `metadata` is empty then."""
    prefix: Prefix | None = field(default=None, compare=False)
    """Checksums of the bytes that it was parsed from, and of the eight before them."""

    @property
    def size_bytes(self) -> int:
        """Memory that it takes, its objects included."""
        return len(self.tensors.to_bytes()) + len(self.metadata.to_bytes()) + OBJECT_BYTES
